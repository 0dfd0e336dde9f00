"""Killed, damaged, repeated or begun twice: a stage is whole or not there, and a night takes up the thread."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock, Timeout

from iterative_ppo.config import Config, load_config
from iterative_ppo.environments.chain import Chain
from iterative_ppo.errors import StoreError
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.returns import monte_carlo, rewards
from iterative_ppo.mdp.turn_table import to_frame
from tasks import notify
from tasks.datasets import (
    Dataset,
    arm,
    arrived,
    closed,
    datasets_before,
    inbox,
    of_policy,
    round_folder,
    trained_on_before,
    turns_folder,
    write_once,
)
from tasks.inbox import take_up
from tasks.stage import RECORD, load_stage, made_with, run_stage
from tasks.state import Approval, Experiment, NightState, load_state, only_one, save_state, state_file

# --- stages ----------------------------------------------------------------------------------------------------------


class Work:
    """Writes a file and a folder, and counts how often it was called."""

    def __init__(self, text: str = "weights", metrics: Mapping[str, float] | None = None) -> None:
        self.text, self.metrics, self.calls = text, metrics or {"loss": 0.5}, 0

    def __call__(self, draft: Path) -> Mapping[str, float]:
        self.calls += 1
        assert not any(draft.iterdir()), "work begins in an empty directory"
        (draft / "model").mkdir()
        (draft / "model" / "weights.txt").write_text(self.text)
        (draft / "numbers.json").write_text('{"a": [1, 2]}')
        return self.metrics


INPUTS = {"policy": "abc", "config": {"epochs": 2.0, "path": Path("x")}, "seed": 0}


def test_a_finished_stage_is_not_done_again(tmp_path: Path) -> None:
    work = Work(metrics={"loss": 0.5, "turns": 3})
    first = run_stage(tmp_path / "q", INPUTS, work)
    again = run_stage(tmp_path / "q", dict(reversed(INPUTS.items())), work)
    assert work.calls == 1
    assert (first.done_before, again.done_before) == (False, True)
    assert (first.path, first.key, first.metrics) == (again.path, again.key, again.metrics)
    assert again.metrics == {"loss": 0.5, "turns": 3.0}
    assert again.read("numbers.json") == {"a": [1, 2]}
    assert load_stage(tmp_path / "q") == again


@pytest.mark.parametrize(
    "changed", [INPUTS | {"seed": 1}, INPUTS | {"config": {"epochs": 3.0}}, INPUTS | {"more": None}, {}]
)
def test_other_inputs_are_other_work(tmp_path: Path, changed: dict[str, Any]) -> None:
    run_stage(tmp_path / "q", INPUTS, Work("old"))
    work = Work("new")
    assert not run_stage(tmp_path / "q", changed, work).done_before
    assert work.calls == 1
    assert (tmp_path / "q" / "model" / "weights.txt").read_text() == "new"
    assert run_stage(tmp_path / "q", changed, work).done_before and work.calls == 1


def write_record(text: str) -> Callable[[Path], object]:
    return lambda path: (path / RECORD).write_text(text)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: (path / "model" / "weights.txt").write_text("weighty"), id="a file changed"),
        pytest.param(lambda path: (path / "model" / "weights.txt").write_text("weight"), id="a file cut short"),
        pytest.param(lambda path: (path / "numbers.json").unlink(), id="a file removed"),
        pytest.param(lambda path: (path / "model" / "more.txt").write_text("x"), id="a file added"),
        pytest.param(lambda path: (path / "model").rename(path / "other"), id="a folder renamed"),
        pytest.param(shutil.rmtree, id="all removed"),
        pytest.param(lambda path: (path / RECORD).unlink(), id="record removed"),
        pytest.param(write_record("{"), id="record is no JSON"),
        pytest.param(write_record("{}"), id="record is empty"),
        pytest.param(write_record("[]"), id="record is a list"),
        pytest.param(write_record("null"), id="record is null"),
        pytest.param(lambda path: (path / RECORD).write_bytes(b"\xff\xfe"), id="record is no text"),
    ],
)
def test_a_damaged_stage_is_done_anew(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    work = Work()
    run_stage(tmp_path / "q", INPUTS, work)
    damage(tmp_path / "q")
    assert not run_stage(tmp_path / "q", INPUTS, work).done_before
    assert work.calls == 2
    assert (tmp_path / "q" / "model" / "weights.txt").read_text() == "weights"
    assert sorted(p.name for p in (tmp_path / "q").iterdir()) == ["model", "numbers.json", RECORD]


def test_a_stage_that_holds_another_stage_is_not_done_again(tmp_path: Path) -> None:
    def outer(draft: Path) -> Mapping[str, float]:
        run_stage(draft / "inner", INPUTS, Work())
        return {}

    run_stage(tmp_path / "q", INPUTS, outer)
    assert run_stage(tmp_path / "q", INPUTS, outer).done_before
    (tmp_path / "q" / "inner" / RECORD).write_text("{}")
    assert not run_stage(tmp_path / "q", INPUTS, outer).done_before


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_work_that_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException], before: bool) -> None:
    if before:
        run_stage(tmp_path / "q", INPUTS, Work("old"))
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fails(draft: Path) -> Mapping[str, float]:
        Work("half")(draft)
        raise error

    with pytest.raises(error):
        run_stage(tmp_path / "q", {"seed": 1}, fails)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    assert [p.name for p in tmp_path.iterdir()] == (["q"] if before else []), "nor any draft"
    if before:
        assert run_stage(tmp_path / "q", INPUTS, Work()).done_before


def test_a_killed_stage_leaves_what_was_there_and_is_done_by_the_next_run(tmp_path: Path) -> None:
    run_stage(tmp_path / "q", INPUTS, Work("old"))
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom tasks.stage import run_stage\n"
        "def work(draft):\n    (draft / 'half').write_text('x')\n    os._exit(9)\n"
        "run_stage(Path(sys.argv[1]), {'seed': 1}, work)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "q")], check=False).returncode == 9
    assert (tmp_path / "q" / "model" / "weights.txt").read_text() == "old"
    assert run_stage(tmp_path / "q", INPUTS, Work()).done_before
    assert not run_stage(tmp_path / "q", {"seed": 1}, Work("new")).done_before


def test_metrics_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    work = Work(metrics={"loss": 0.5, "auc": float("nan"), "kl": float("inf"), "r2": -float("inf"), "n": np.float32(2)})
    stage = run_stage(tmp_path / "q", INPUTS, work)
    assert stage.metrics == load_stage(tmp_path / "q").metrics == {"loss": 0.5, "n": 2.0}


def test_the_record_tells_what_the_stage_was_made_from(tmp_path: Path) -> None:
    run_stage(tmp_path / "q", INPUTS, Work())
    record = json.loads((tmp_path / "q" / RECORD).read_text())
    assert record["inputs"] == {"policy": "abc", "config": {"epochs": 2.0, "path": "x"}, "seed": 0}
    assert set(record) == {"key", "inputs", "metrics", "content"}


def test_what_a_stage_was_made_with_is_told_where_all_else_is_the_same(tmp_path: Path) -> None:
    inputs = {"weights": {"sale": 1.0}, "md5": "a"}
    assert made_with(tmp_path / "q", inputs, "weights") is None
    run_stage(tmp_path / "q", inputs, lambda draft: ((draft / "model").write_text("w"), {})[1])
    assert made_with(tmp_path / "q", {**inputs, "weights": 2}, "weights") == {"sale": 1.0}
    assert made_with(tmp_path / "q", {**inputs, "md5": "b"}, "weights") is None
    assert made_with(tmp_path / "q", {**inputs, "seed": 0}, "weights") is None
    (tmp_path / "q" / "model").write_text("damaged")
    assert made_with(tmp_path / "q", inputs, "weights") is None


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", "null", '{"key": "a"}'])
def test_a_stage_that_is_not_there_cannot_be_loaded(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / RECORD).write_text(text)
    with pytest.raises(StoreError, match=str(tmp_path / RECORD)):
        load_stage(tmp_path)


# --- the state between nights ----------------------------------------------------------------------------------------

TESTING = NightState(
    round=2,
    phase="test",
    experiment=Experiment(salt="round-2", champion=3, challenger=5),
    outcome_rates={"3": 0.21, "5": 0.25},
    rounds=[{"round": 0, "verdict": "promote", "gain": 0.04}, {"round": 1, "verdict": "reject"}],
)


def test_a_new_folder_has_a_new_state(tmp_path: Path) -> None:
    state = load_state(tmp_path / "nowhere")
    assert state == NightState() and (state.round, state.phase, state.experiment) == (0, "collect", None)
    assert not (tmp_path / "nowhere").exists(), "reading writes nothing"


def test_a_state_is_read_back_as_it_was(tmp_path: Path) -> None:
    for state in (TESTING, NightState(), TESTING.advance(phase="collect", experiment=None, round=3)):
        save_state(tmp_path, state)
        assert load_state(tmp_path) == state
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_conversations_that_arrive_after_a_dataset_is_frozen_are_the_next_rounds() -> None:
    assert TESTING.gathering == 3
    assert [TESTING.advance(phase=phase).gathering for phase in ("collect", "train")] == [2, 3]


def test_what_arrives_after_the_last_round_does_not_join_its_tests_conversations() -> None:
    tested = [{"round": 2, "decision": {"verdict": "promote"}}]
    assert TESTING.advance(phase="finished", rounds=tested).gathering == 4
    assert TESTING.advance(phase="finished", rounds=[{"round": 2}]).gathering == 3, "a log's, or one that fell before"
    waiting = Approval(id="a", kind="promote", version=5, reasons=(), evidence={}, resume="test")
    assert TESTING.advance(phase="approve", approval=waiting).gathering == TESTING.gathering


def test_advance_changes_a_copy() -> None:
    later = TESTING.advance(round=7)
    assert (later.round, later.phase, TESTING.round) == (7, "test", 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 2}', "format 2, this program knows up to 1"),
        ('{"format": 99, "colour": "red"}', "format 99"),
        ('{"format": "two"}', "format"),
        ('{"format": null}', "format"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", ""),
        ("null", ""),
        ('{"round": "two"}', "round"),
        ('{"phase": "sleep"}', "phase"),
        ('{"colour": "red"}', "colour"),
        ('{"experiment": {"salt": "a"}}', "experiment.champion"),
    ],
)
def test_a_damaged_or_newer_state_is_refused_and_kept(tmp_path: Path, text: str, words: str) -> None:
    state_file(tmp_path).write_text(text)
    with pytest.raises(StoreError) as error:
        load_state(tmp_path)
    assert str(state_file(tmp_path)) in str(error.value) and words in str(error.value)
    assert state_file(tmp_path).read_text() == text


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    save_state(tmp_path, TESTING)
    with pytest.raises(ValueError, match="JSON"):
        save_state(tmp_path, TESTING.advance(outcome_rates={"3": float("nan")}))
    assert load_state(tmp_path) == TESTING and len(list(tmp_path.iterdir())) == 1


# --- one night at a time ---------------------------------------------------------------------------------------------

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom tasks.state import only_one\n"
    "with only_one(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.readline()\n"
)


def holding(root: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of `root` until it is told to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_never_hold_a_night_together(tmp_path: Path, killed: bool) -> None:
    with holding(tmp_path) as other:
        with pytest.raises(StoreError, match="another run is at work here"), only_one(tmp_path):
            pytest.fail("both hold it")
        with only_one(tmp_path / "other root"):
            pass
        if killed:
            other.kill()
        else:
            other.communicate("end\n")
        other.wait(30)
        with only_one(tmp_path):
            pass


def test_a_root_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"a file")
    with pytest.raises(StoreError, match=r"data: cannot be written to"), only_one(tmp_path / "data"):
        pass


def test_a_night_that_fails_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), only_one(tmp_path):
        raise RuntimeError("broken")
    with only_one(tmp_path):
        pass


def test_another_lock_that_is_busy_is_not_taken_for_the_nights(tmp_path: Path) -> None:
    """A night that waited in vain for the registry's lock must not say that another night is at work."""
    with FileLock(tmp_path / "registry.lock"), pytest.raises(Timeout, match=r"registry\.lock"), only_one(tmp_path):
        FileLock(tmp_path / "registry.lock", timeout=0).acquire()


def draft(path: Path, hours: float) -> Path:
    """A draft as `files` names it, last written some hours ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("half")
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600 * hours))
    return path


def test_drafts_of_a_killed_night_are_swept_and_nothing_else(tmp_path: Path) -> None:
    old = [
        draft(tmp_path / "rounds" / "0000" / ".q.a1b2c3d4" / "model" / "weights", 30),
        draft(tmp_path / "turns" / "round=0000" / ".turns.parquet.a1b2c3d4", 30),
        draft(tmp_path / "inbox" / ".night.parquet.a1b2c3d4", 30),
        draft(tmp_path / ".state.json.a1b2c3d4", 0),
    ]
    kept = [
        draft(tmp_path / "turns" / "round=0000" / "turns.parquet", 30),
        draft(tmp_path / "turns" / ".gitignore", 30),
        draft(tmp_path / "rounds" / "0000" / "q" / "stage.json", 30),
    ]
    with only_one(tmp_path):
        assert [path for path in old if path.exists()] == []
        assert [path for path in kept if not path.exists()] == []


def test_what_is_being_delivered_is_not_swept(tmp_path: Path) -> None:
    """Who delivers holds no lock of a night: an importer, or rsync, may be writing `.name.parquet.suffix` right now."""
    arriving = draft(tmp_path / "inbox" / ".night.parquet.a1b2c3d4", 0)
    with only_one(tmp_path):
        assert arriving.exists()


# --- what arrives ----------------------------------------------------------------------------------------------------

CHAIN = Chain.default()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(overrides={"data.root": str(tmp_path)})


def deliver(config: Config, name: str, seed: int, version: str = "1") -> Path:
    """20 conversations of a policy version in the inbox."""
    talks = CHAIN.sample(CHAIN.uniform(), 20, seed, version)
    return write_once(inbox(config) / f"{name}.parquet", to_frame(talks, config.outcomes, 0.2), config)


def test_what_arrives_is_moved_whole_once(config: Config) -> None:
    assert take_up(config, 0) == [] and arrived(config, 0) is None
    content = [deliver(config, name, seed).read_bytes() for seed, name in enumerate("ab")]
    (inbox(config) / "notes.txt").write_text("not a turn table")
    files = take_up(config, 0)
    assert [file.name for file in files] == ["a.parquet", "b.parquet"]
    assert [file.read_bytes() for file in files] == content
    assert [p.name for p in inbox(config).iterdir()] == ["notes.txt"]
    assert take_up(config, 0) == files, "a second night finds the same"
    frame = arrived(config, 0)
    assert frame is not None and frame["conversation_id"].nunique() == 40


def test_later_arrivals_join_and_another_round_has_its_own(config: Config) -> None:
    deliver(config, "a", 0)
    take_up(config, 0)
    deliver(config, "b", 1)
    assert [file.name for file in take_up(config, 0)] == ["a.parquet", "b.parquet"]
    deliver(config, "c", 2)
    assert [file.name for file in take_up(config, 1)] == ["c.parquet"]
    assert [file.name for file in take_up(config, 0)] == ["a.parquet", "b.parquet"]


def test_a_damaged_file_is_set_aside_with_an_alarm_once_nobody_can_be_writing_it(
    config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(notify, "tell", lambda _, event, subject, body: told.append((f"{event}: {subject}", body)))
    deliver(config, "whole", 0)
    cut = deliver(config, "cut", 1)
    content = cut.read_bytes()
    broken = {"cut": content[:-100], "scrambled": content[:300] + bytes(50) + content[350:], "empty": b""}
    for name, part in broken.items():
        (inbox(config) / f"{name}.parquet").write_bytes(part)
    assert [file.name for file in take_up(config, 0)] == ["whole.parquet"]
    assert len(list(inbox(config).iterdir())) == 3 and "perhaps it is being written" in caplog.text and not told
    for name in broken:
        os.utime(inbox(config) / f"{name}.parquet", (0, 0))
    assert [file.name for file in take_up(config, 0)] == ["whole.parquet"]
    aside = config.data.root / "quarantine" / "inbox"
    assert not list(inbox(config).iterdir())
    assert sorted(file.read_bytes() for file in aside.iterdir()) == sorted(broken.values())
    assert [subject for subject, _ in told] == [f"alarm: {name}.parquet arrived damaged" for name in sorted(broken)]
    for _, body in told:
        assert "not a readable Parquet file" in body and f"set aside as {aside}" in body and "deliver it again" in body
    cut.write_bytes(content)
    assert [file.name for file in take_up(config, 0)] == ["cut.parquet", "whole.parquet"]


def test_a_file_that_is_still_being_written_is_left_alone(config: Config) -> None:
    draft(inbox(config) / ".a.parquet.a1b2c3d4", 0)
    assert take_up(config, 0) == []
    assert (inbox(config) / ".a.parquet.a1b2c3d4").exists()


def test_an_arrival_under_a_name_that_was_taken_loses_nothing(config: Config) -> None:
    """Traffic that is exported as `turns.parquet` every day."""
    deliver(config, "turns", 0)
    take_up(config, 0)
    deliver(config, "turns", 1)
    assert len(take_up(config, 0)) == 2
    frame = arrived(config, 0)
    assert frame is not None and frame["conversation_id"].nunique() == 40
    assert len(take_up(config, 0)) == 2


def test_a_repeated_delivery_is_taken_once(config: Config) -> None:
    for _ in range(2):
        deliver(config, "a", 0)
        take_up(config, 0)
    frame = arrived(config, 0)
    assert frame is not None and frame["conversation_id"].nunique() == 20


def test_what_an_earlier_round_took_is_set_aside(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    content = deliver(config, "a", 0).read_bytes()
    take_up(config, 0)
    deliver(config, "again", 0)
    deliver(config, "b", 1)
    assert [file.name for file in take_up(config, 1)] == ["b.parquet"]
    assert [file.read_bytes() for file in (config.data.root / "quarantine" / "inbox").iterdir()] == [content]
    assert "again.parquet is" in caplog.text and not list(inbox(config).iterdir())


def test_hidden_files_and_folders_stay_in_the_inbox(config: Config) -> None:
    deliver(config, "a", 0).rename(inbox(config) / ".a.parquet")
    (inbox(config) / "spark.parquet").mkdir()
    assert take_up(config, 0) == []
    assert sorted(place.name for place in inbox(config).iterdir()) == [".a.parquet", "spark.parquet"]


def test_a_conversation_of_an_earlier_dataset_is_found(config: Config) -> None:
    frame = turn_table.read(deliver(config, "a", 0), config.outcomes)
    ids = frame["conversation_id"].unique().tolist()
    write_once(turns_folder(config, 2) / "turns.parquet", frame, config)
    assert trained_on_before(config, ids[3:4], 3) == (ids[3], 2)
    assert trained_on_before(config, ids, 2) is None and trained_on_before(config, ["new"], 3) is None


@pytest.mark.parametrize("nights", [1, 2, 3])
def test_of_a_conversation_that_arrives_again_the_first_stands(
    config: Config, caplog: pytest.LogCaptureFixture, nights: int
) -> None:
    """In the same night's files, in a later night's, and in a later round's: an export whose window overlaps."""
    early = turn_table.read(deliver(config, "a", 0), config.outcomes)
    ids = early["conversation_id"].unique()
    if nights > 1:
        take_up(config, 0)
    late = turn_table.read(deliver(config, "b", 1), config.outcomes)
    again = early[early["conversation_id"].isin(ids[:3])].assign(outcome=0.0)
    write_once(inbox(config) / "b.parquet", pd.concat([late, again]), config)
    gathering = int(nights == 3)
    take_up(config, gathering)
    assert "3 of the conversations of b.parquet are here already" in caplog.text
    found = pd.concat([frame for k in range(2) if (frame := arrived(config, k)) is not None])
    assert len(found) == len(early) + len(late) and found["conversation_id"].nunique() == 40
    assert (
        found[found["conversation_id"].isin(ids[:3])]["outcome"].sum()
        == early[early["conversation_id"].isin(ids[:3])]["outcome"].sum()
    )
    (aside,) = (config.data.root / "quarantine" / "inbox").iterdir()
    assert set(turn_table.read(aside, config.outcomes)["conversation_id"]) == set(ids[:3])
    assert not list(inbox(config).iterdir())
    write_once(inbox(config) / "c.parquet", again, config)
    files = [file.name for file in take_up(config, gathering)]
    assert "c.parquet" not in files and not list(inbox(config).iterdir()), "one of which nothing is new"


def test_what_was_quarantined_may_arrive_again_mended(config: Config) -> None:
    frame = turn_table.read(deliver(config, "a", 0), config.outcomes)
    take_up(config, 0)
    bad = frame["conversation_id"].unique()[:3]
    good = frame[~frame["conversation_id"].isin(bad)]
    write_once(turns_folder(config, 0) / "turns.parquet", good, config)
    mended = frame.assign(context=frame["context"].fillna("mended"))
    write_once(inbox(config) / "mended.parquet", mended, config)
    take_up(config, 1)
    found = arrived(config, 1)
    assert found is not None and set(found["conversation_id"]) == set(bad)


def test_turns_that_are_text_count_up_as_numbers_do(config: Config) -> None:
    frame = turn_table.read(deliver(config, "a", 0), config.outcomes)
    (inbox(config) / "a.parquet").unlink()
    long = pd.concat([frame.iloc[[0]].assign(turn=n) for n in range(1, 13)], ignore_index=True)
    long.assign(turn=long["turn"].astype(str)).to_parquet(inbox(config) / "text.parquet")
    take_up(config, 0)
    found = arrived(config, 0)
    assert found is not None and list(found["turn"]) == list(range(1, 13))


def test_rows_that_arrive_out_of_order_are_put_into_it(config: Config) -> None:
    """An export of a data base has no order of its own; conversations keep that of their first rows."""
    frame = turn_table.read(deliver(config, "a", 0), config.outcomes)
    (inbox(config) / "a.parquet").unlink()
    shuffled = frame.sample(frac=1.0, random_state=0)
    shuffled.to_parquet(inbox(config) / "shuffled.parquet")
    take_up(config, 0)
    found = arrived(config, 0)
    assert found is not None and not list(inbox(config).iterdir())
    assert list(found["conversation_id"].unique()) == list(shuffled["conversation_id"].unique())
    both = [one.sort_values(["conversation_id", "turn"], ignore_index=True) for one in (frame, found)]
    assert both[0].equals(both[1]) and (found.groupby("conversation_id")["turn"].diff().dropna() == 1).all()
    assert len(list(turn_table.conversations(found))) == 20


def test_a_file_that_is_no_turn_table_holds_nothing_up(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(notify, "tell", lambda _, event, subject, body: told.append(body))
    frame = turn_table.read(deliver(config, "good", 0), config.outcomes)
    frame.drop(columns="adoption").to_parquet(inbox(config) / "old.parquet")
    frame.assign(timestamp="yesterday").to_parquet(inbox(config) / "odd.parquet")
    assert [file.name for file in take_up(config, 0)] == ["good.parquet"]
    assert arrived(config, 0) is not None and not list(inbox(config).iterdir())
    odd, old = told
    assert "column 'timestamp': expected timestamp" in odd and "column 'adoption' is missing" in old


def test_the_same_file_under_another_name_is_set_aside(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    content = deliver(config, "a", 0).read_bytes()
    for round_number, name in ((0, "a (1)"), (1, "a")):
        take_up(config, round_number)
        (inbox(config) / f"{name}.parquet").write_bytes(content)
    assert [file.name for file in take_up(config, 0)] == ["a.parquet"]
    assert take_up(config, 1) == []
    frame = arrived(config, 0)
    assert frame is not None and frame["conversation_id"].nunique() == 20
    assert "is set aside as" in caplog.text and len(list((config.data.root / "quarantine").rglob("*.parquet"))) == 1


# --- rows of a policy version ----------------------------------------------------------------------------------------


def test_an_arm_counts_the_successes_of_its_own_version(config: Config) -> None:
    talks = [CHAIN.sample(CHAIN.uniform(), size, seed, version) for size, seed, version in ((60, 0, "1"), (30, 1, "2"))]
    frame = to_frame([talk for some in talks for talk in some], config.outcomes, 0.2)
    for some, version in zip(talks, ("1", "2"), strict=True):
        counted = arm(frame, version)
        assert counted.conversations == len(some)
        assert counted.successes == sum(talk.turns[-1].outcomes[0] > 0 for talk in some) > 0
    assert arm(frame, "3").conversations == 0
    assert len(closed(frame)) == 90
    frame["policy_version"] = None
    assert not of_policy(frame, "1").any()


def test_earlier_rounds_are_found_newest_first(config: Config) -> None:
    assert datasets_before(config, 3, 2) == []
    for number in (0, 1, 2, 3):
        turns = to_frame(CHAIN.sample(CHAIN.uniform(), 5, number), config.outcomes, 0.2)
        turn_table.write(turns, turns_folder(config, number) / "turns.parquet", config.outcomes)
    assert [d.round_number for d in datasets_before(config, 3, 2)] == [2, 1]
    assert [d.round_number for d in datasets_before(config, 1, 5)] == [0]
    assert datasets_before(config, 3, 0) == []
    one = datasets_before(config, 1, 1)[0]
    assert isinstance(one, Dataset) and one.read(config)["conversation_id"].nunique() == 5
    assert round_folder(config, 12).name == "0012"


# --- a dataset some conversations at a time --------------------------------------------------------------------------


@pytest.fixture
def in_blocks(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, pd.DataFrame]:
    """A dataset that can be read in small blocks alone, and what it holds."""
    talks = [CHAIN.sample(CHAIN.uniform(), size, seed, version) for size, seed, version in ((60, 0, "1"), (30, 1, "2"))]
    turn_table.write(
        to_frame([talk for some in talks for talk in some], config.outcomes, 0.2),
        turns_folder(config, 0) / "turns.parquet",
        config.outcomes,
    )
    dataset = Dataset(0, turns_folder(config, 0), "md5")
    whole = dataset.read(config)
    small = partial(turn_table.blocks, rows=40)
    assert len(list(small(dataset.path, config.outcomes))) > 3
    monkeypatch.setattr(turn_table, "blocks", small)
    monkeypatch.setattr(turn_table, "read", None)
    return dataset, whole


def test_returns_are_made_by_blocks_and_are_those_of_the_whole(
    config: Config, in_blocks: tuple[Dataset, pd.DataFrame], tmp_path: Path
) -> None:
    from tasks.learning import returns_stage

    dataset, whole = in_blocks
    stage, returns = returns_stage(config, dataset, tmp_path / "round"), monte_carlo(whole, config.gamma)
    expected = whole[["conversation_id", "turn"]].assign(reward=rewards(whole), **{"return": returns})
    pd.testing.assert_frame_equal(pd.read_parquet(stage.path / "returns.parquet"), as_read(expected, tmp_path))
    first = returns[(whole["turn"] == 1).to_numpy()]
    assert stage.metrics == {"mean_return": first.mean(), "conversations": 90.0, "turns": len(whole)}


def as_read(frame: pd.DataFrame, folder: Path) -> pd.DataFrame:
    frame.to_parquet(folder / "expected.parquet", index=False)
    return pd.read_parquet(folder / "expected.parquet")


def test_a_dataset_that_ends_too_early_leaves_no_returns(
    config: Config, in_blocks: tuple[Dataset, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.learning import returns_stage

    def cut(path: Path, outcomes: Mapping[str, float]) -> Iterator[pd.DataFrame]:
        yield next(small(path, outcomes))
        raise StoreError("damaged")

    small = turn_table.blocks
    monkeypatch.setattr(turn_table, "blocks", cut)
    with pytest.raises(StoreError, match="damaged"):
        returns_stage(config, in_blocks[0], tmp_path / "round")
    assert not list((tmp_path / "round").iterdir())


def test_outcome_rates_are_read_by_blocks(config: Config, in_blocks: tuple[Dataset, pd.DataFrame]) -> None:
    from flows.night import outcome_rates

    dataset, whole = in_blocks
    rates = {version: arm(whole, version) for version in ("1", "2")}
    expected = {version: found.successes / found.conversations for version, found in rates.items()}
    assert outcome_rates(dataset, config) == pytest.approx(expected)
