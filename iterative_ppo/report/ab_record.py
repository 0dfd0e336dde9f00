"""The A/B test that runs, or the last that ended, as its looks found it: bounds, arms, gain and guardrails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_ppo.errors import ConfigError
from iterative_ppo.evaluation.bounds import Bound, bounds
from iterative_ppo.evaluation.experiment import Look
from iterative_ppo.evaluation.non_inferiority import Found, NonInferiority
from iterative_ppo.report.stored import finite, label, shaped


@dataclass(frozen=True)
class Checked:
    """A guardrail of the two arms; a value that is not known is not among `values`."""

    measure: str
    values: Mapping[str, float]
    found: Found


@dataclass(frozen=True)
class ABRecord:
    """A test of round `number`. `verdict` is the last look's, or how it ended: promote, reject, void.

    Attributes:
        bounds: by rising fraction of the `planned` conversations, the looks taken first.
        looks: those that compared the arms, oldest first.
    """

    number: int
    champion: str
    challenger: str
    running: bool
    verdict: str
    reasons: tuple[str, ...]
    design: str
    planned: int
    alpha: float
    bounds: tuple[Bound, ...]
    looks: tuple[Look, ...]
    guardrails: tuple[Checked, ...]


def ab_record(state: Mapping[str, Any], path: Path) -> ABRecord | None:
    """Of the run's state, read from `path`; None before the first test, and for a test that names no settings."""
    with shaped(path):
        rows = [row for row in state.get("rounds", []) if row.get("experiment")]
        if (tested := state.get("experiment")) is not None:
            return _record(int(state["round"]), tested, True, *_so_far(tested, state.get("phase")))
        if rows:
            return _record(int(rows[-1]["round"]), rows[-1]["experiment"], False, *_ended(rows[-1]))
    return None


def _so_far(tested: Mapping[str, Any], phase: str | None) -> tuple[str, list[str]]:
    looks = tested.get("looks", [])
    verdict = str(looks[-1]["verdict"]) if looks else "continue"
    reasons = list(looks[-1]["reasons"]) if looks else ["no look has been taken yet"]
    return ("awaits approval" if phase == "approve" and verdict == "promote" else verdict), reasons


def _ended(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    if "void" in row:
        return "void", [str(row["void"])]
    return str(row["decision"]["verdict"]), list(row["decision"]["reasons"])


def _record(number: int, tested: Mapping[str, Any], running: bool, verdict: str, reasons: list[str]) -> ABRecord | None:
    settings = tested.get("settings", {})
    if "abtest.design" not in settings:
        return None
    alpha = float(settings["gate.alpha"])
    design, taken = settings["abtest.design"], [_look(one) for one in tested.get("looks", [])]
    return ABRecord(
        number,
        str(label(tested["champion"])),
        str(label(tested["challenger"])),
        running,
        verdict,
        tuple(map(str, reasons)),
        design,
        int(settings["abtest.conversations"]),
        alpha,
        tuple(bounds(design, int(settings["abtest.looks"]), alpha, taken)),
        tuple(look for look in taken if look.statistic is not None),
        tuple(
            Checked(str(one["measure"]), finite(one), NonInferiority.from_dict(one).found)
            for one in tested.get("guardrails", [])
        ),
    )


def _look(values: Mapping[str, Any]) -> Look:
    try:
        return Look.from_dict(values)
    except ConfigError as error:
        raise ValueError(str(error)) from None
