"""What Q is worth on the evidence part: as a whole, for each named outcome, and as a forecast of how it ends."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from iterative_ppo.errors import TrainingError
from iterative_ppo.evaluation.doubts import doubts
from iterative_ppo.evaluation.metrics import Calibration, Method, auc, calibration, r_squared, recalibration
from iterative_ppo.files import read_json, write_json
from iterative_ppo.mdp.turn_table import conversation_numbers, last_rows, outcome_columns

if TYPE_CHECKING:
    from iterative_ppo.learning.policy_evaluation import Round
    from iterative_ppo.learning.q_model import QModel

CALIBRATION, OUTCOMES, FORECAST = "calibration.json", "outcomes.json", "forecast.json"
_LOG = logging.getLogger(__name__)


def write_q_report(
    q: QModel, current: Round, frame: pd.DataFrame, folder: Path, above: float = 0.0
) -> dict[str, float]:
    """Write the reliability of Q into `folder`, and return its figures; it warns where they tell nothing.

    The calibration error is of Q as it is, against the discounted returns that it promises, which a perfect one meets
    whatever the discount. As a forecast of the undiscounted outcome, as it is and mapped, it has errors of their own;
    mapped onto those very outcomes almost anything is right on average, so that none of these judges it.
    """
    metrics, bins = q_report(q, current, frame, above)
    write_json(folder / CALIBRATION, bins)
    if each := outcome_report(q, current, frame):
        write_json(folder / OUTCOMES, each)
        metrics |= {f"held_out_successes_{name}": one["metrics"]["held_out_successes"] for name, one in each.items()}
    myopic = list(q.settings.outcomes) == ["acceptance"] and np.array_equal(current.returns, current.reward)
    said = forecast(q, current, frame) if current.assigner == "outcome" and not myopic else None
    metrics["forecast_untold"] = float(said is not None and not said)
    if said:
        write_json(folder / FORECAST, {name: asdict(one) for name, one in said.items()})
        metrics |= {f"forecast_error_{name}": one.error for name, one in said.items()}
        metrics["forecast_error_by_chance_95"] = said["as_it_is"].chance_95
    for doubt in doubts(q.report | metrics):
        _LOG.warning("%s", doubt)
    return metrics


def judged(folder: Path) -> Calibration | None:
    """Q's calibration as its calibration error tells it, from the folder of its report; None where nothing is."""
    found = read_json(folder / CALIBRATION)
    return Calibration(**found) if found else None


def q_report(
    q: QModel, current: Round, frame: pd.DataFrame, above: float = 0.0
) -> tuple[dict[str, float], dict[str, Any]]:
    """R2, AUC and calibration of Q on the evidence part, beside a baseline that sees the state alone.

    R2 and calibration are about the returns that Q was fitted to, the AUC about the outcome in any case.

    Args:
        above: the R above which a conversation is a success.
    """
    values = q.evaluate(current.encoded)
    held = ~current.fit & np.isfinite(values.q)
    ids = frame["conversation_id"].to_numpy(dtype=str)[held]
    won = _ending(frame, "outcome")[held] > above
    metrics = {"held_out_turns": float(held.sum()), "held_out_conversations": float(len(np.unique(ids)))}
    metrics["held_out_successes"] = float(len(np.unique(ids[won])))
    if not held.any():
        return metrics, {}
    returns = current.returns[held]
    plain = values if not q.settings.pessimism else q.with_settings(pessimism=0.0).evaluate(current.encoded)
    bins = _reliability(plain.q[held], returns, ids, value_range(q))  # pessimism promises less on purpose
    metrics |= {
        **_fit(values.q[held], values.v[held], returns, won, bins),
        "action_spread": float((values.q[held] - values.v[held]).std()),
        "truncated_turns": float(current.encoded.truncated_turns),
    }
    return metrics, asdict(bins)


def outcome_report(q: QModel, current: Round, frame: pd.DataFrame) -> dict[str, Any]:
    """The same for the head of each named outcome, with its weight in R; empty where Q has one head."""
    if current.outcome_returns is None:
        return {}
    values = q.outcome_values(current.encoded)
    held = ~current.fit & np.isfinite(values.q[:, 0])
    ids = frame["conversation_id"].to_numpy(dtype=str)[held]
    found: dict[str, Any] = {}
    for k, (name, weight) in enumerate(q.settings.outcomes.items()):
        if not held.any():
            break
        within = q.settings.outcome_ranges[k]
        returns, won = current.outcome_returns[held, k], _ending(frame, outcome_columns([name])[0])[held] > 0
        bins = _reliability(values.q[held, k], returns, ids, within)
        figures = _fit(values.q[held, k], values.v[held, k], returns, won, bins)
        figures["held_out_successes"] = float(len(np.unique(ids[won])))
        known = {key: value for key, value in figures.items() if np.isfinite(value)}
        found[name] = {"weight": weight, "metrics": known, "calibration": asdict(bins)}
    return found


def forecast(q: QModel, current: Round, frame: pd.DataFrame) -> dict[str, Calibration]:
    """Q against the undiscounted outcome of its conversation: as it is, and mapped by each way of calibration.

    A map never sees the conversation that it is applied to. Empty where all end alike or there are too few.
    """
    values = q.evaluate(current.encoded)
    held = ~current.fit & np.isfinite(values.q)
    ids = frame["conversation_id"].to_numpy(dtype=str)[held]
    return _forecasts(values.q[held], _ended(current, current.reward[:, None])[held, 0], ids, value_range(q))


def _ended(current: Round, rewards: np.ndarray) -> np.ndarray:
    """(N, K) what the rewards (N, K) of each row's conversation sum to."""
    number = conversation_numbers(current.last)
    return np.stack([np.bincount(number, column)[number] for column in rewards.T], axis=1)


def _forecasts(
    predicted: np.ndarray, ended: np.ndarray, ids: np.ndarray, low_high: tuple[float, float]
) -> dict[str, Calibration]:
    unit, ended = (_unit(x, low_high) for x in (predicted, ended))
    ways: tuple[Method, ...] = ("isotonic", "temperature")
    try:
        mapped = {str(method): recalibration(unit, ended, ids, method) for method in ways}
    except TrainingError:
        return {}
    return {"as_it_is": calibration(unit, ended, ids), **mapped}


def value_range(q: QModel) -> tuple[float, float]:
    """Least and greatest weighted sum of what the heads can say."""
    weighted = zip(q.settings.outcomes.values(), q.settings.outcome_ranges, strict=True)
    ends = [sorted((weight * low, weight * high)) for weight, (low, high) in weighted]
    return sum(low for low, _ in ends), sum(high for _, high in ends)


def _fit(q: np.ndarray, v: np.ndarray, returns: np.ndarray, won: np.ndarray, bins: Calibration) -> dict[str, float]:
    return {
        "r2": r_squared(returns, q),
        "state_only_r2": r_squared(returns, v),
        "auc": auc(won, q),
        "state_only_auc": auc(won, v),
        "calibration_error": bins.error,
        "calibration_error_by_chance_95": bins.chance_95,
    }


def _reliability(
    predicted: np.ndarray, returns: np.ndarray, ids: np.ndarray, low_high: tuple[float, float]
) -> Calibration:
    return calibration(_unit(predicted, low_high), _unit(returns, low_high), ids)


def _unit(values: np.ndarray, low_high: tuple[float, float]) -> np.ndarray:
    low, high = low_high
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def _ending(frame: pd.DataFrame, column: str) -> np.ndarray:
    """(N,) a column's value at the end of each row's conversation."""
    last = last_rows(frame)
    ends: np.ndarray = frame[column].to_numpy(dtype=float)[last][conversation_numbers(last)]
    return ends
