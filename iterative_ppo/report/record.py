"""A run as it lies on disk. What is not there yet is None or empty, damage is an error that names the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from iterative_ppo.errors import StoreError
from iterative_ppo.evaluation.ab_test import ABTest
from iterative_ppo.files import fingerprint
from iterative_ppo.learning.objective import usual_success
from iterative_ppo.mdp.labels import judged
from iterative_ppo.report.ab_record import ABRecord, ab_record
from iterative_ppo.report.customers import CHALLENGER, CHAMPION, Group, groups, outcome_weights, read_turns
from iterative_ppo.report.round_record import Numbers, RoundRecord, read_round
from iterative_ppo.report.stored import label, optional, part, shaped, test_of
from iterative_ppo.report.tested import TEST, read_tested

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
    serves: str | None = None
    """The policy that is the champion by the audit trail; None where there is none."""

    @property
    def promotions(self) -> int:
        return sum(one.promoted for one in self.rounds)

    @property
    def changed(self) -> bool:
        """Whether another policy serves now than at the start; a promotion by hand or a rollback counts."""
        if self.closing and self.closing.first and self.closing.last:
            return self.closing.first != self.closing.last
        if self.serves and self.rounds and self.rounds[0].champion:
            return self.serves != self.rounds[0].champion
        return self.promotions > 0

    @property
    def success_above(self) -> float:
        """The R above which a conversation is a success, by the last round."""
        known = [one.success_above for one in self.rounds if one.success_above is not None]
        return known[-1] if known else usual_success(self.outcomes)

    @property
    def unmet(self) -> bool:
        """Whether the last round was a log's, and its challenger has not met customers yet, as far as is known."""
        return bool(self.rounds) and self.rounds[-1].from_logs and not (self.ab and self.ab.looks)

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
        outcomes = _outcomes(root)
        rounds = _armed([read_round(root, k, rows.get(k, {}), path, outcomes) for k in sorted({*rows, *_begun(root)})])
        seed, settings_hash = _settings(rounds)
        return cls(
            rounds,
            phase,
            number,
            pair,
            _tested(root, rounds, outcomes),
            _closing(root),
            outcomes,
            seed,
            settings_hash,
            ab_record(state, path),
            _serving(root / "audit.jsonl"),
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


def _armed(rounds: list[RoundRecord]) -> tuple[RoundRecord, ...]:
    """The rounds; conversations that name no arm, of a challenger that the round before tested, are its arm's."""
    found = rounds[:1]
    for before, one in pairwise(rounds):
        tested = before.challenger if before.test and not before.counted else None
        told = [replace(g, arm=CHALLENGER) if g.arm is None and g.policy == tested else g for g in one.groups]
        found.append(replace(one, groups=tuple(told)))
    return tuple(found)


def _closing(root: Path) -> Closing | None:
    path = root / "rounds" / "closing" / "closing.json"
    with shaped(path):
        test = test_of(optional(path))
    if test is None:
        return None
    inputs = part(path.with_name("stage.json"), "inputs")
    return Closing(test, label(inputs.get("first")), label(inputs.get("last")))


def _tested(root: Path, rounds: tuple[RoundRecord, ...], outcomes: Numbers) -> tuple[Group, ...]:
    """A decided test's conversations, which lie unfrozen where no round follows. A running test is not looked at."""
    if not rounds or rounds[-1].decision is None or rounds[-1].test is None:
        return ()
    last, test, folder = rounds[-1], rounds[-1].test, root / "rounds"
    frame = read_turns(folder / f"{last.number + 1:04d}" / "arrived", outcomes)
    if frame is None:
        return ()
    tested = read_tested(folder / f"{last.number:04d}" / TEST)
    frame = judged(frame, outcomes, tested.rules if tested else None)
    if tested:
        return tuple(map(tested.judged, groups(tested.of(frame), last.success_above or 0.0)))
    arms = {last.champion: (CHAMPION, test.champion), last.challenger: (CHALLENGER, test.challenger)}
    found = []
    for group in groups(frame, last.success_above or 0.0):
        arm, success = arms.get(group.policy, (group.arm, group.success))
        found.append(replace(group, arm=group.arm or arm, success=success))
    return tuple(found)


def _serving(trail: Path) -> str | None:
    """Who a run's moves that were done have made the champion; what a kill left of a last line does not count."""
    moves: dict[str, str | None] = {}
    champion = None
    for line in trail.read_text(encoding="utf-8").splitlines() if trail.exists() else ():
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(line)
            if record["event"] == "done":
                champion = moves.get(record["id"], champion)
            elif "to" in record:
                moves[record["id"]] = label(record["to"])
    return champion


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
