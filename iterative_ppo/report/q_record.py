"""What a round's Q is about and how good it is, as its stage left it: credit, each outcome, calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_ppo.evaluation.metrics import Calibration
from iterative_ppo.report.stored import finite, numbers, optional, part, shaped

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class CreditRecord:
    """Turn rewards that Q was fitted to in place of the outcome: by which assigner, and figures of them."""

    assigner: str
    objective: str
    figures: Numbers


@dataclass(frozen=True)
class OutcomeRecord:
    """One named outcome's weight in R, and how good Q's head for it is on held-out conversations."""

    weight: float
    figures: Numbers
    calibration: Calibration


def credit_of(folder: Path) -> CreditRecord | None:
    """From the folder of a Q stage; None where Q was fitted to the outcome itself."""
    path = folder / "credit.json"
    values = optional(path)
    if values is None:
        return None
    inputs = part(folder / "stage.json", "inputs")
    with shaped(folder / "stage.json"):
        assigner = str(inputs["credit"]["assigner"])
    with shaped(path):
        return CreditRecord(assigner, str(values["objective"]), numbers(path, "metrics"))


def outcomes_of(path: Path) -> dict[str, OutcomeRecord]:
    """By name; empty where Q has one head."""
    values = optional(path) or {}
    with shaped(path):
        return {str(name): _outcome(one) for name, one in values.items()}


def _outcome(value: Mapping[str, Any]) -> OutcomeRecord:
    found = bins_of(value["calibration"])
    assert found is not None
    return OutcomeRecord(float(value["weight"]), finite(value["metrics"]), found)


def forecast_of(path: Path) -> dict[str, Calibration]:
    """Q as a forecast of the undiscounted outcome, as it is and mapped; empty where it could not be judged."""
    values = optional(path) or {}
    with shaped(path):
        return {str(name): found for name, one in values.items() if (found := bins_of(one))}


def calibration_of(path: Path) -> Calibration | None:
    values = optional(path)
    with shaped(path):
        return bins_of(values) if values else None


def bins_of(values: Mapping[str, Any]) -> Calibration:
    """Raises KeyError, TypeError or ValueError where these are no bins."""
    predicted, observed = ([float(x) for x in values[name]] for name in ("predicted", "observed"))
    count = [int(x) for x in values["count"]]
    if not len(predicted) == len(observed) == len(count):
        raise ValueError("as many predicted as observed values and counts are expected")
    return Calibration(predicted, observed, count, float(values["error"]), float(values["chance_95"]))
