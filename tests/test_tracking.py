"""Runs are found again, whatever repeats or is killed; every fault of the store is one clear line."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import monotonic, sleep

import pandas as pd
import pytest
from mlflow.entities import Dataset, Run

from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import StoreError
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.tiny import build_policy
from iterative_ppo.mdp.conversation import Conversation, Turn
from tasks import registry
from tasks.mlflow_store import shown
from tasks.tracking import Tracking, open_tracking

MD5 = f"{'0123456789abcdef' * 2}.dir"
OPEN = """
import sys
from iterative_ppo.config import load_config
from tasks.tracking import open_tracking
uri, artifacts, die = sys.argv[1:]
if die == "die":
    import os, alembic.runtime.migration as migration
    steps, update = iter(range(4)), migration.HeadMaintainer.update_to_step
    def dying(self, step):
        return update(self, step) if next(steps, None) is not None else os._exit(9)
    migration.HeadMaintainer.update_to_step = dying
tracking = open_tracking(load_config(overrides={"tracking.uri": uri, "tracking.artifacts": artifacts}))
print(tracking.experiment_id, tracking.round_run(0))
"""


def started(place: Path, die: str = "live") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, f"sqlite:///{place}/mlflow.db", f"{place}/artifacts", die]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str, str]]]:
    """A store that two processes made at once, after a third was killed amid its migrations; and what the two said."""
    place = tmp_path_factory.mktemp("fresh")
    assert started(place, "die").wait() == 9
    both = [started(place), started(place)]
    said = [process.communicate() for process in both]
    return place, [(process.returncode, *texts) for process, texts in zip(both, said, strict=True)]


@pytest.fixture
def config(fresh: tuple[Path, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A store of its own, whose schema is there already, in a folder whose name is not plain."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = tmp_path / "a folder é"
    place.mkdir()
    shutil.copy(fresh[0] / "mlflow.db", place / "mlflow.db")
    with closing(sqlite3.connect(place / "mlflow.db")) as database, database:
        database.execute("update experiments set name = 'old' where name = 'iterative-ppo'")
    monkeypatch.chdir(place)
    return load_config(overrides={"tracking.uri": "sqlite:///mlflow.db", "tracking.artifacts": "artifacts"})


@pytest.fixture
def tracking(config: Config) -> Tracking:
    return open_tracking(config)


def test_two_processes_make_one_store_out_of_what_a_killed_one_left(
    fresh: tuple[Path, list[tuple[int, str, str]]],
) -> None:
    place, said = fresh
    assert [code for code, _, _ in said] == [0, 0], said
    assert said[0][1] == said[1][1] != ""
    assert [error for _, _, error in said] == ["", ""]
    assert sorted(path.name for path in place.iterdir()) == [".mlflow.db.lock", "artifacts", "mlflow.db"]


def test_importing_is_light() -> None:
    heavy = "[m for m in ('mlflow', 'torch', 'pandas') if m in sys.modules]"
    code = f"import sys, tasks.tracking, tasks.registry; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_a_round_and_its_stages_are_found_again(tracking: Tracking, config: Config) -> None:
    parent = tracking.round_run(3, {"source": "renovation"})
    stages = [tracking.stage_run(parent, "fit q", key) for key in ("a", "it's", "")]
    assert len({parent, tracking.round_run(30), *stages}) == 5
    tracking.finish(stages[0])
    again = open_tracking(config)
    assert (again.round_run(3), again.find_round(3), again.find_round(4)) == (parent, parent, None)
    assert [again.stage_run(parent, "fit q", key) for key in ("a", "it's", "")] == stages
    run, stage = tracking.client.get_run(parent), tracking.client.get_run(stages[0])
    assert (run.info.run_name, stage.info.run_name, stage.info.status) == ("round 3", "fit q", "RUNNING")
    assert run.data.tags["iterative_ppo.source"] == "renovation"
    assert stage.data.tags["mlflow.parentRunId"] == parent
    tracking.finish(parent, "FAILED")
    assert tracking.client.get_run(parent).info.status == "FAILED"


def test_threads_and_processes_at_once_get_one_run_and_leave_no_stray(tracking: Tracking, config: Config) -> None:
    import mlflow

    copies = [pickle.loads(pickle.dumps(tracking)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda one: one.round_run(1), copies))) == 1
    assert len(tracking.client.search_runs([tracking.experiment_id])) == 1
    assert mlflow.active_run() is None
    assert sorted(path.name for path in Path().iterdir()) == [".mlflow.db.lock", "artifacts", "mlflow.db"]


def test_what_is_logged_is_there_once_however_often_it_is_logged(tracking: Tracking, tmp_path: Path) -> None:
    run = tracking.round_run(0)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    curve = [{"step": 10 * k, "loss": 1.0 / (k + 1), "kl": None} for k in range(700)]
    plain = [{"return": float(k), "parts": {"first": k}} for k in range(600)]
    begun = monotonic()
    for _ in range(2):
        tracking.log(
            run,
            params={"q": {"loss": "bce", "epochs": 2.0}, "path": folder, "list": [1], "none": None, "o é!": 1},
            metrics={"gain": 0.25, "nothing": None, "nan": float("nan"), "rate": {"first": 1}},
            curves={"q": curve, "ppo": plain},
            artifacts=[folder, folder / "a.txt"],
        )
    assert monotonic() - begun < 10
    data = tracking.client.get_run(run).data
    assert data.params == {
        "q.loss": "bce", "q.epochs": "2.0", "path": str(folder), "list": "[1]", "none": "None", "o é_": "1",
    }  # fmt: skip
    assert data.metrics["gain"] == 0.25 and data.metrics["rate.first"] == 1.0 and data.metrics["nan"] != 0
    assert "nothing" not in data.metrics and "q.kl" not in data.metrics
    history = tracking.client.get_metric_history(run, "q.loss")
    assert [(point.step, point.value) for point in history] == [(10 * k, 1.0 / (k + 1)) for k in range(700)]
    assert len(tracking.client.get_metric_history(run, "ppo.parts.first")) == 600
    assert [len(tracking.client.get_metric_history(run, name)) for name in ("gain", "nan")] == [1, 1]
    assert {found.path for found in tracking.client.list_artifacts(run)} == {"folder", "a.txt"}


def test_new_values_are_told_from_old_ones(tracking: Tracking) -> None:
    run = tracking.round_run(0)
    tracking.log(run, {"rate": 0.1, "same": 1}, {"gain": 0.5})
    tracking.log(run, {"rate": 0.2, "same": 1}, {"gain": 0.4})
    data = tracking.client.get_run(run).data
    assert data.params["rate"] == "0.1" and data.tags["iterative_ppo.changed.rate"] == "0.2"
    assert "iterative_ppo.changed.same" not in data.tags
    assert data.metrics["gain"] == 0.4


def test_texts_and_values_are_artifacts(tracking: Tracking) -> None:
    run = tracking.round_run(0)
    tracking.log_json(run, {"verdict": "test", "é": Path("x")}, "gate.json")
    tracking.log_text(run, "<h1>Round</h1>", "report.html")
    assert tracking.artifact(0, "report.html").read_text() == "<h1>Round</h1>"
    assert '"é": "x"' in tracking.artifact(0, "gate.json").read_text(encoding="utf-8")


def inputs(run: Run) -> list[Dataset]:
    assert run.inputs is not None
    return [given.dataset for given in run.inputs.dataset_inputs]


def test_data_are_searchable_by_their_md5_and_their_pointer_comes_back(tracking: Tracking, tmp_path: Path) -> None:
    place = tmp_path / "turns" / "round=0002"
    place.mkdir(parents=True)
    pointer = place.with_name("round=0002.dvc")
    pointer.write_text(f"outs:\n- md5: {MD5}\n")
    frame = pd.DataFrame({"reward": [0.0, 1.0], "message": ["hello", None], "ids": [[1], [2, 3]]})
    stage = tracking.stage_run(tracking.round_run(2), "fit q")
    for _ in range(2):
        tracking.log_dataset(stage, frame, place, MD5, pointer)
    tracking.log_dataset(tracking.round_run(5), 1_000_000, place, "f" * 32)
    (found,) = tracking.client.search_runs([tracking.experiment_id], f"datasets.digest = '{MD5}'")
    assert found.info.run_id == stage
    (given,) = inputs(found)
    assert given.name == "round=0002" and str(place) in given.source
    assert '"num_rows": 2' in str(given.profile) and "message" in str(given.schema)
    (counted,) = inputs(tracking.client.get_run(tracking.round_run(5)))
    assert "1000000" in str(counted.profile)
    assert tracking.artifact(2, "round=0002.dvc").read_text() == pointer.read_text()
    with pytest.raises(StoreError, match=r"round 2: no artifact 'other.dvc' in run \w+ or in its 1 stages"):
        tracking.artifact(2, "other.dvc")
    with pytest.raises(StoreError, match=r"round 7 has no run in experiment 'iterative-ppo' of sqlite:///"):
        tracking.artifact(7, "x")
    with pytest.raises(StoreError, match=r"lost.dvc: not found, so run \w+ cannot keep it"):
        tracking.log_dataset(stage, 1, place, MD5, tmp_path / "lost.dvc")


def test_the_environment_wins_and_a_relative_file_stays_where_it_is(
    config: Config, tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracking.round_run(0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    other = load_config(overrides={"tracking.uri": "sqlite:///nowhere/else.db"})
    monkeypatch.chdir(tmp_path)
    assert open_tracking(other).round_run(0) == run
    tracking.log_text(run, "here", "a.txt")
    assert tracking.artifact(0, "a.txt").is_relative_to(tmp_path / "a folder é" / "artifacts")
    assert os.environ["DO_NOT_TRACK"] == "1"


def test_the_settings_behind_a_file_are_the_databases(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no part of its name."""
    monkeypatch.setattr("tasks.mlflow_store.LOCK_SECONDS", 0.1)
    before = open_tracking(config)
    tracking = open_tracking(load_config(overrides={"tracking.uri": f"{config.tracking.uri}?timeout=5"}))
    assert tracking.uri == f"{before.uri}?timeout=5"
    assert tracking.client.get_run(before.round_run(0))
    with before.locked():
        refused(config, "has held the store", uri=f"{config.tracking.uri}?timeout=5")
    assert not list(Path().glob("*timeout*"))


def test_unknown_runs_and_statuses_are_one_line(tracking: Tracking) -> None:
    for call in (lambda: tracking.finish("0" * 32), lambda: tracking.log("0" * 32, {"a": 1})):
        with pytest.raises(StoreError, match=r"run 0{32}: .*not found") as error:
            call()
        assert "\n" not in str(error.value)


def refused(config: Config, said: str, **tracking: str) -> None:
    values = {f"tracking.{key}": value for key, value in {**config.tracking.model_dump(), **tracking}.items()}
    begun = monotonic()
    with pytest.raises(StoreError, match=said) as error:
        open_tracking(load_config(overrides=values))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert monotonic() - begun < 15, "MLflow retries for minutes"


def test_a_newer_schema_is_named(config: Config) -> None:
    for name, more in {"newer.db": "", "newest.db": "drop table trace_info"}.items():
        shutil.copy("mlflow.db", name)
        with closing(sqlite3.connect(name)) as database, database:
            database.execute("update alembic_version set version_num = 'fffffffffff1'")
            database.execute(more)
        refused(config, r"its schema \(fffffffffff1\) is not that of the installed MLflow 3", uri=f"sqlite:///{name}")


def test_damaged_files_are_named_and_left_alone(config: Config) -> None:
    Path("text.db").write_text("not a database, but long enough to be looked at " * 10)
    shutil.copy("mlflow.db", "torn.db")
    with Path("torn.db").open("r+b") as file:
        file.seek(4096)
        file.write(b"garbage" * 50_000)
    Path("folder.db").mkdir()
    with closing(sqlite3.connect("other.db")) as database, database:
        database.execute("create table customers (name text)")
    content = {path.name: path.read_bytes() for path in Path().glob("*.db") if path.is_file()}
    refused(config, r"text.db: file is not a database", uri="sqlite:///text.db")
    refused(config, r"torn.db: .*malformed", uri="sqlite:///torn.db")
    refused(config, r"folder.db: unable to open database file", uri="sqlite:///folder.db")
    refused(config, r"other.db: a database, but not MLflow's; name another file", uri="sqlite:///other.db")
    refused(config, r"x/mlflow.db: Not a directory: .*text.db/x$", uri="sqlite:///text.db/x/mlflow.db")
    assert content == {name: Path(name).read_bytes() for name in content}


def test_stores_that_cannot_serve_are_refused_at_once(config: Config) -> None:
    refused(config, r"http://127.0.0.1:9: cannot be reached \(ConnectionError\); is it", uri="http://127.0.0.1:9")
    refused(config, r"//\*\*\*@127.0.0.1:9/x: cannot be reached", uri="postgresql+psycopg2://me:secret@127.0.0.1:9/x")
    settings = "postgresql+psycopg2://127.0.0.1:9/x?user=me&password=secret"
    refused(config, r"//127.0.0.1:9/x\?\*\*\*: cannot be reached \(\w+\); is it running\?$", uri=settings)
    for uri in ("mlruns", "file:///tmp/mlruns", "sqlit:///a.db"):
        refused(config, rf"tracking.uri '{uri}': expected sqlite:///FILE, a database or a server", uri=uri)
    refused(config, r"tracking.uri 'psql://\*\*\*@there/x': expected", uri="psql://me:secret@there/x")
    for uri in ("sqlite:///:memory:", "sqlite://"):
        refused(config, r"runs must outlive the process", uri=uri)


def test_an_address_is_shown_without_what_may_be_secret_in_it() -> None:
    told = "lacks s3://me:secret@there/a?key=secret, and http://there/?token=secret too; is it up?"
    assert shown(told) == "lacks s3://***@there/a?*** and http://there/?*** too; is it up?"
    assert shown("sqlite:////there/a.db?mode=rwc") == "sqlite:////there/a.db?mode=rwc"


def test_a_database_without_its_driver_is_refused_at_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with socket.create_server(("127.0.0.1", 0)) as there:
        place = f"127.0.0.1:{there.getsockname()[1]}/x"
        said = rf"//\*\*\*@{place}: its driver psycopg is not installed; install it, .*'\.\[postgres\]'"
        refused(config, said, uri=f"postgresql://me:secret@{place}")
        refused(
            config,
            rf"//\*\*\*@{place}: Can't load plugin: .*postgresql.nosuch",
            uri=f"postgresql+nosuch://me:x@{place}",
        )


def test_a_deleted_experiment_and_lost_artifacts_are_told(config: Config, tracking: Tracking) -> None:
    shutil.rmtree("artifacts")
    refused(config, r"keeps its artifacts in .*artifacts, which is gone; bring that folder back")
    Path("artifacts").mkdir()
    tracking.client.delete_experiment(tracking.experiment_id)
    said = r"'iterative-ppo' was deleted; run `MLFLOW_TRACKING_URI='sqlite:.*' mlflow experiments restore -x \d+`"
    refused(config, said)
    with pytest.raises(StoreError) as told:
        open_tracking(config)
    advised, path = str(told.value).split("`")[1], f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(advised, shell=True, check=True, env={**os.environ, "PATH": path}, cwd="/", capture_output=True)
    assert open_tracking(config).experiment_id == tracking.experiment_id


def test_a_store_that_another_holds_is_told(
    config: Config, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.mlflow_store.LOCK_SECONDS", 0.1)
    with tracking.locked():
        refused(config, r"mlflow.db: another process has held the store for 0.1 seconds")


@pytest.mark.slow
def test_a_server_serves_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = f"-m mlflow server --backend-store-uri sqlite:///server.db --artifacts-destination kept --port {port}"
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with Path("log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, *command.split(), "--workers", "1"], env=environment, stdout=log, stderr=log
        )
    try:
        tracking = open_when_up(f"http://127.0.0.1:{port}")
        run = tracking.round_run(0)
        stage = tracking.stage_run(run, "fit q")
        for _ in range(2):
            tracking.log(stage, {"a": 1}, {"b": 2.0}, {"c": [{"x": k} for k in range(1500)]})
        assert len(tracking.client.get_metric_history(stage, "c.x")) == 1500
        for text in ("one", "two"):
            tracking.log_text(stage, text, "a.txt")
            assert tracking.artifact(0, "a.txt").read_text() == text
        policy = build_policy([Conversation("c", (Turn("hello"),), "u")], load_config().policy, 0)
        policy.save(tmp_path / "policy")
        assert registry.register(tracking, registry.POLICY, tmp_path / "policy", run, {"round": 0}) == 1
        registry.promote(tracking, 1, {}, "test", tmp_path)
        place = registry.fetch(tracking, registry.POLICY, "champion")
        assert LanguagePolicy.load(place).settings == policy.settings
        assert registry.fetch(tracking, registry.POLICY, 1) == place
    finally:
        server.terminate()
        server.wait()


def open_when_up(uri: str) -> Tracking:
    config = load_config(overrides={"tracking.uri": uri, "tracking.artifacts": "copies"})
    for _ in range(100):
        try:
            return open_tracking(config)
        except StoreError:
            sleep(0.5)
    raise AssertionError(Path("log").read_text())
