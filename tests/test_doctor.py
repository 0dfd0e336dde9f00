"""`ippo doctor`: a line a check, whatever a check meets."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from flows import doctor
from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import StoreError
from iterative_ppo.mdp import turn_table
from tasks.audit import audit_file
from tasks.datasets import inbox, round_folder
from tasks.state import NightState, save_state


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(None, {"data.root": str(tmp_path / "data")})


def laid(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def test_a_check_that_meets_a_read_only_file_system_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "data/night.lock")

    assert not doctor._checked("state", refused)
    told = capsys.readouterr().out
    assert told.startswith("wrong state: data/night.lock: Read-only file system")
    assert told.count("\n") == 1


def test_a_damaged_audit_trail_is_found(config: Config) -> None:
    file = laid(audit_file(config.data.root), b"garbage\n")
    with pytest.raises(StoreError, match="line 1 is damaged"):
        doctor._audit_trail(config)
    file.write_bytes(b'{"event": "declined"}\n')
    assert doctor._audit_trail(config) == "1 records"


def test_what_arrived_and_is_no_turn_table_is_named(config: Config) -> None:
    empty = turn_table.to_frame([], config.outcomes, config.data.evidence_share)
    turn_table.write(empty, inbox(config) / "good.parquet", config.outcomes)
    assert doctor._arrived(config) == "1 files readable"
    bad = [
        laid(round_folder(config, 3) / "arrived" / "old.parquet", b"PAR1"),
        laid(inbox(config) / "new.parquet", b"no table"),
    ]
    with pytest.raises(StoreError) as told:
        doctor._arrived(config)
    for file in bad:
        assert f"{file}: not a readable Parquet file" in str(told.value)
    assert "good.parquet" not in str(told.value)
    assert str(config.data.root / "quarantine") in str(told.value)


def test_what_no_night_takes_is_named_and_no_failure(config: Config) -> None:
    laid(inbox(config) / "log.csv", b"")
    laid(inbox(config) / ".draft.parquet", b"")
    told = doctor._arrived(config)
    assert told.startswith("0 files readable; no night takes .draft.parquet, log.csv")


def test_an_mde_too_large_for_the_champion_is_warned_of(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    for rate, warned in ((0.3, False), (0.02, True)):
        save_state(config.data.root, NightState(champion=4, outcome_rates={"3": 0.01, "4": rate}))
        doctor._warn_of_the_test(config)
        told = capsys.readouterr().out
        assert told.startswith("warn  A/B test: abtest.mde 5.0% beside") == warned == bool(told)


def test_a_test_too_small_for_its_guardrails_is_warned_of(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    doctor._warn_of_the_test(
        config.model_copy(update={"abtest": config.abtest.model_copy(update={"conversations": 400})})
    )
    assert capsys.readouterr().out.startswith("warn  A/B test: guardrail pii needs ")


def test_every_check_has_a_line(config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    laid(audit_file(config.data.root), b"garbage\n")
    tracking = config.tracking.model_copy(
        update={"uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "artifacts": tmp_path / "artifacts"}
    )
    assert not doctor.examine(config.model_copy(update={"tracking": tracking}))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0][6:] for line in lines if line.startswith("wrong")] == ["champion", "audit trail"]
    assert {"Prefect", "arrived", "datasets"} <= {line.split(":")[0][6:] for line in lines if line.startswith("ok")}
