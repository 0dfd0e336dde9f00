"""Turns go to the remote and come back byte for byte, whatever was lost, repeated, killed or damaged in between."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import StoreError
from tasks.versioning import checkout, checkout_round, ensure_repository, rounds, version, version_round

ROOT = Path(__file__).parents[1]
Lose = Callable[[Path], None]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configured(tmp_path / "data")


def configured(root: Path, **more: Any) -> Config:
    return load_config(overrides={"data.root": str(root), **{f"data.{key}": value for key, value in more.items()}})


def collect(config: Config, number: int, rows: int = 20, files: int = 2) -> Path:
    place = config.data.root / "turns" / f"round={number:04d}"
    place.mkdir(parents=True, exist_ok=True)
    for part in range(files):
        values = np.random.default_rng([number, part, rows]).random(rows)
        pd.DataFrame({"outcome": values}).to_parquet(place / f"part-{part}.parquet")
    return place


def content(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()}


def in_git(command: str, folder: Path) -> str:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *command.split()]
    return subprocess.run(git, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_round_comes_back_after_the_folder_and_the_cache_are_lost(config: Config) -> None:
    place = collect(config, 0)
    before = content(place)
    done = version(0, config)
    assert (done.path, done.rows, done.files) == (place, 40, 2)
    assert done.dvc_file == place.with_suffix(".dvc") and done.md5 in done.dvc_file.read_text()
    shutil.rmtree(place)
    shutil.rmtree(config.data.root / ".dvc")
    assert checkout(0, config) == place
    assert content(place) == before
    assert version(0, config) == done


def test_a_pointer_from_elsewhere_restores_on_a_machine_that_has_the_remote_alone(
    config: Config, tmp_path: Path
) -> None:
    place = collect(config, 3)
    done = version(3, config)
    pointer = Path(shutil.copy(done.dvc_file, tmp_path / "artifact.dvc"))
    other = configured(tmp_path / "other", remote=str(config.data.root / "remote"))
    restored = checkout(3, other, pointer)
    assert content(restored) == content(place)
    assert [(one.round_number, one.md5) for one in rounds(other)] == [(3, done.md5)]
    with pytest.raises(StoreError, match=r"pointer to round=0003, expected one to round=0004"):
        checkout(4, other, pointer)


def test_an_older_version_of_a_round_comes_back_by_its_pointer(config: Config, tmp_path: Path) -> None:
    before = content(collect(config, 0))
    old = version(0, config)
    pointer = Path(shutil.copy(old.dvc_file, tmp_path / "old.dvc"))
    place = collect(config, 0, rows=30)
    new = version(0, config)
    assert new.md5 != old.md5 and new.rows == 60
    checkout(0, config, pointer)
    assert content(place) == before
    assert rounds(config)[0].md5 == old.md5


def test_the_second_call_changes_nothing(config: Config) -> None:
    collect(config, 0)
    first = version(0, config)
    remote = config.data.root / "remote"
    files = {file: file.stat().st_mtime_ns for file in remote.rglob("*") if file.is_file()}
    assert len(files) == 3
    settings = (config.data.root / ".dvc" / "config.local").stat().st_mtime_ns
    assert version(0, config) == first
    checkout(0, config)
    assert {file: file.stat().st_mtime_ns for file in remote.rglob("*") if file.is_file()} == files
    assert (config.data.root / ".dvc" / "config.local").stat().st_mtime_ns == settings


def test_two_rounds_are_listed_and_are_each_their_own(config: Config) -> None:
    assert rounds(config) == []
    places = [collect(config, number, rows=10 + number) for number in (0, 12)]
    done = [version(number, config) for number in (0, 12)]
    before = content(places[1])
    shutil.rmtree(places[0])
    listed = rounds(config)
    assert [(one.round_number, one.md5, one.files) for one in listed] == [(0, done[0].md5, 2), (12, done[1].md5, 2)]
    assert [one.present for one in listed] == [False, True]
    assert listed[1].size == sum(len(file) for file in before.values())
    checkout(0, config)
    assert content(places[1]) == before


def test_a_missing_round_is_one_clear_line(config: Config) -> None:
    with pytest.raises(StoreError, match=r"round=0005: no Parquet files there to version"):
        version(5, config)
    with pytest.raises(StoreError, match=r"round=0005.dvc: no such pointer.*versioned: none") as missing:
        checkout(5, config)
    assert "\n" not in str(missing.value)


def lose_remote(remote: Path) -> None:
    shutil.rmtree(remote)


def lose_one_file(remote: Path) -> None:
    next(file for file in sorted(remote.rglob("*")) if file.is_file() and file.suffix != ".dir").unlink()


def damage_one_file(remote: Path) -> None:
    file = next(file for file in sorted(remote.rglob("*")) if file.is_file() and file.suffix != ".dir")
    file.chmod(0o644)
    file.write_bytes(b"not what it was")


@pytest.mark.parametrize("lose", [lose_remote, lose_one_file, damage_one_file])
def test_a_remote_that_lost_or_damaged_a_file_leaves_no_half_round(config: Config, lose: Lose) -> None:
    place = collect(config, 0)
    version(0, config)
    shutil.rmtree(place)
    shutil.rmtree(config.data.root / ".dvc")
    lose(config.data.root / "remote")
    with pytest.raises(StoreError, match=r"round=0000 .*remote lacks some of its files, or they are damaged") as lost:
        checkout(0, config)
    assert "\n" not in str(lost.value) and "\x1b" not in str(lost.value)
    assert not place.exists() and not (config.data.root / ".restore").exists()


@pytest.mark.parametrize("lose", [lose_remote, lose_one_file])
def test_versioning_again_mends_the_remote(config: Config, lose: Lose) -> None:
    place = collect(config, 0)
    before = content(place)
    version(0, config)
    lose(config.data.root / "remote")
    version(0, config)
    shutil.rmtree(place)
    shutil.rmtree(config.data.root / ".dvc")
    assert content(checkout(0, config)) == before


def test_files_that_were_never_versioned_are_not_overwritten(config: Config) -> None:
    place = collect(config, 0)
    version(0, config)
    new = collect(config, 0, rows=31)
    with pytest.raises(StoreError, match=r"part-0.parquet: was never versioned and would be lost"):
        checkout(0, config)
    assert len(pd.read_parquet(new / "part-0.parquet")) == 31
    (place / "part-1.parquet").unlink()
    version(0, config)
    (place / "part-0.parquet").unlink()
    assert len(pd.read_parquet(checkout(0, config))) == 31


def test_what_a_kill_leaves_behind_is_in_nobodys_way(config: Config) -> None:
    place = collect(config, 0)
    before, done = content(place), version(0, config)
    root = config.data.root
    (root / ".dvc" / "tmp" / "rwlock").write_text('{"write": {')
    (root / ".restore").mkdir()
    (root / ".restore" / "round=0000.dvc").write_text("outs:\n- md5:")
    (place / ".part-0.parquet.x1").write_bytes(b"half a fi")
    assert version(0, config) == done
    shutil.rmtree(place)
    assert content(checkout(0, config)) == before
    done.dvc_file.write_text("outs:\n- md5: 12")
    for reader in (lambda: checkout(0, config), lambda: rounds(config)):
        with pytest.raises(StoreError, match=r"round=0000.dvc: not a whole DVC pointer"):
            reader()
    collect(config, 1)
    with pytest.raises(StoreError, match=r"round=0000.dvc: not a whole DVC pointer"):
        version(1, config)
    assert version(0, config) == done
    assert version(1, config).rows == 40


KILLED = """
import os, sys
from pathlib import Path
from dvc.repo import Repo
from iterative_ppo.config import load_config
from tasks import versioning
setattr(Repo, sys.argv[1], lambda *given, **named: os._exit(9))
getattr(versioning, sys.argv[2])(0, load_config(overrides={"data.root": sys.argv[3]}))
"""


def test_a_process_that_dies_half_way_is_repeated_by_the_next(config: Config) -> None:
    def die(at: str, doing: str) -> None:
        command = [sys.executable, "-c", KILLED, at, doing, str(config.data.root)]
        assert subprocess.run(command, cwd=ROOT, check=False, timeout=120).returncode == 9

    place = collect(config, 0)
    before = content(place)
    die("push", "version")
    assert place.with_suffix(".dvc").exists() and not (config.data.root / "remote").exists()
    version(0, config)
    shutil.rmtree(place)
    shutil.rmtree(config.data.root / ".dvc")
    die("checkout", "checkout")
    assert not place.exists()
    assert content(checkout(0, config)) == before


def test_a_damaged_parquet_file_is_not_versioned(config: Config) -> None:
    (collect(config, 0) / "part-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"part-1.parquet: not a readable Parquet file"):
        version(0, config)
    assert not rounds(config)


@pytest.mark.parametrize("remote", ["gopher://x", "/proc/no-such-folder", "s3://bucket/x"])
def test_a_remote_that_cannot_be_is_a_store_error(config: Config, remote: str) -> None:
    collect(config, 0)
    with pytest.raises(StoreError, match=remote):
        version(0, configured(config.data.root, remote=remote))
    version(0, config)


def test_the_environments_remote_wins_and_its_password_is_not_told(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(config, 0)
    monkeypatch.setenv("IPPO_DATA_REMOTE", "gopher://me:secret@127.0.0.1/x")
    with pytest.raises(StoreError, match=r"pushing round=0000 to gopher://\*\*\*@127.0.0.1/x: ") as refused:
        version(0, config)
    assert "secret" not in str(refused.value)


def test_git_sees_nothing_of_it(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    (tmp_path / "data").mkdir()
    in_git("init -q", tmp_path)
    in_git("add -A", tmp_path)
    in_git("commit -qm start", tmp_path)
    config = configured(tmp_path / "data")
    place = collect(config, 0)
    version(0, config)
    shutil.rmtree(place)
    checkout(0, config)
    assert in_git("status --porcelain --untracked-files=all", tmp_path) == ""
    assert not (tmp_path / ".dvc").exists()


TWICE = """
import sys
from pathlib import Path
from iterative_ppo.config import load_config
from tasks.versioning import ensure_repository, version
root, number = sys.argv[1:]
ensure_repository(Path(root))
version(int(number), load_config(overrides={"data.root": root}))
"""


def test_two_processes_may_start_at_once(config: Config) -> None:
    for number in (0, 1):
        collect(config, number)
    command = [sys.executable, "-c", TWICE, str(config.data.root)]
    running = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in (0, 1)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert [one.round_number for one in rounds(config)] == [0, 1]


def test_ensuring_a_repository_keeps_the_users_own_settings(tmp_path: Path) -> None:
    ensure_repository(tmp_path)
    local = tmp_path / ".dvc" / "config.local"
    assert str(tmp_path / "remote") in local.read_text()
    local.write_text(local.read_text() + "    jobs = 3\n")
    ensure_repository(tmp_path, str(tmp_path / "elsewhere"))
    assert "jobs = 3" in local.read_text() and str(tmp_path / "elsewhere") in local.read_text()


def test_dvc_itself_understands_the_data_root(config: Config) -> None:
    collect(config, 0)
    version(0, config)
    from dvc.repo import Repo

    with Repo(str(config.data.root)) as repo:
        assert repo.status() == {} and repo.status(cloud=True) == {}


def test_the_tasks_are_the_functions_and_import_no_dvc() -> None:
    assert version_round.fn is version and checkout_round.fn is checkout
    code = "import sys, tasks.versioning; sys.exit('dvc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120).returncode == 0
