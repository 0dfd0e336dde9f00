"""A run as it lies on disk. What is not there yet is None or empty, damage is an error that names the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterative_ppo.errors import StoreError
from iterative_ppo.evaluation.ab_test import ABTest
from iterative_ppo.files import fingerprint
from iterative_ppo.report.ab_record import ABRecord, ab_record
from iterative_ppo.report.customers import Group, groups, outcome_weights, read_turns
from iterative_ppo.report.round_record import Numbers, RoundRecord, read_round
from iterative_ppo.report.stored import label, optional, part, shaped, test_of

STATE_FORMAT = 1
PHASES = ("collect", "train", "test", "approve", "finished")


@dataclass(frozen=True)
class Closing:
    """The last champion (the test's challenger) against the first policy (its champion), on fresh customers."""

    test: ABTest
    first: str | None = None
    last: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """A whole run, finished or under way."""

    rounds: tuple[RoundRecord, ...] = ()
    phase: str | None = None
    round: int = 0
    experiment: tuple[str, str] | None = None
    """Champion and challenger of the A/B test that is open."""
    tested: tuple[Group, ...] = ()
    """Conversations of the last decided A/B test, where no later round has taken them as its data."""
    closing: Closing | None = None
    outcomes: Numbers = field(default_factory=dict)
    seed: int | None = None
    settings_hash: str | None = None
    ab: ABRecord | None = None
    """The A/B test that runs, or the last that ended."""

    @property
    def promotions(self) -> int:
        return sum(one.promoted for one in self.rounds)

    @property
    def changed(self) -> bool:
        """Whether another policy serves now than at the start; a promotion by hand or a rollback counts."""
        if self.closing and self.closing.first and self.closing.last:
            return self.closing.first != self.closing.last
        return self.promotions > 0

    @classmethod
    def read(cls, root: Path) -> RunRecord:
        """Read the run below `root`. Raises StoreError, naming the file, where one is damaged or newer."""
        if not root.is_dir():
            raise StoreError(f"{root}: no such folder; name the data root of a run")
        path = root / "state.json"
        state = optional(path) or {}
        with shaped(path):
            phase, number = _phase(state), int(state.get("round", 0))
            rows = {int(row["round"]): row for row in state.get("rounds", [])}
            experiment = state.get("experiment")
            pair = (str(experiment["champion"]), str(experiment["challenger"])) if experiment else None
        rounds = tuple(read_round(root, k, rows.get(k, {}), path) for k in sorted({*rows, *_begun(root)}))
        seed, settings_hash = _settings(rounds)
        return cls(
            rounds,
            phase,
            number,
            pair,
            _tested(root, rounds),
            _closing(root),
            _outcomes(root),
            seed,
            settings_hash,
            ab_record(state, path),
        )


def _phase(state: Mapping[str, Any]) -> str | None:
    if (version := int(state.get("format", STATE_FORMAT))) > STATE_FORMAT:
        raise ValueError(f"format {version}, this program knows up to {STATE_FORMAT}")
    phase = state.get("phase")
    if phase is not None and phase not in PHASES:
        raise ValueError(f"phase {phase!r}, expected one of {', '.join(PHASES)}")
    return phase


def _begun(root: Path) -> list[int]:
    """Rounds whose data were validated: a folder that only gathers arrivals is none yet."""
    folders = (root / "rounds").glob("[0-9]*")
    return [int(f.name) for f in folders if f.name.isdecimal() and (f / "validated").is_dir()]


def _closing(root: Path) -> Closing | None:
    path = root / "rounds" / "closing" / "closing.json"
    with shaped(path):
        test = test_of(optional(path))
    if test is None:
        return None
    inputs = part(path.with_name("stage.json"), "inputs")
    return Closing(test, label(inputs.get("first")), label(inputs.get("last")))


def _tested(root: Path, rounds: tuple[RoundRecord, ...]) -> tuple[Group, ...]:
    """A decided test's conversations, which lie unfrozen where no round follows. A running test is not looked at."""
    if not rounds or rounds[-1].decision is None or rounds[-1].test is None:
        return ()
    frame = read_turns(root / "rounds" / f"{rounds[-1].number + 1:04d}" / "arrived")
    return groups(frame) if frame is not None else ()


def _outcomes(root: Path) -> dict[str, float]:
    files = sorted((root / "turns").glob("round=[0-9]*/*.parquet"))
    return outcome_weights(files[-1]) if files else {}


def _settings(rounds: tuple[RoundRecord, ...]) -> tuple[int | None, str | None]:
    """The seed, and a fingerprint of the settings that the last round with a fitted Q recorded; places do not count."""
    for one in reversed(rounds):
        known = {f"{stage}.{key}": one.settings.get(stage, {}).get(key) for stage, key in _RECORDED}
        if isinstance(data := known["validated.data"], dict):
            known["validated.data"] = {key: value for key, value in data.items() if key not in ("root", "remote")}
        if isinstance(known["q.seed"], int):
            return known["q.seed"], fingerprint(known)
    return None, None


_RECORDED = (
    ("validated", "data"),
    *(("q", key) for key in ("q", "reward", "gamma", "outcomes", "seed")),
    ("improved", "improve"),
    ("gate", "gate"),
)
