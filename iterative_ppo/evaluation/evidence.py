"""What the offline gate knows of a challenger: Q's opinion, what the logs say, and how what it says compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from iterative_ppo.evaluation.certificate import Certificate
from iterative_ppo.evaluation.non_inferiority import NonInferiority
from iterative_ppo.evaluation.ope import Estimate


@dataclass(frozen=True)
class OfflineEvidence:
    """Champion and challenger on the same held-out states. KL in nats a response; shares in [0, 1].

    Attributes:
        certificate: the single-turn gain on held-out conversations. estimates: off-policy values, by estimator.
        guardrails: those that can be judged on sampled responses. differing: states in which the first response of
            each, drawn with the same random numbers, is another.
    """

    states: int
    samples: int
    q_champion: float
    q_challenger: float
    q_gain_low: float
    q_gain_high: float
    kl_challenger_champion: float
    kl_champion_challenger: float
    missing_eos: float
    repetition: float
    length_ratio: float
    abstained: float
    q_r2: float
    state_baseline_r2: float
    certificate: Certificate
    estimates: Mapping[str, Estimate]
    guardrails: tuple[NonInferiority, ...]
    differing: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: what is not a number becomes null."""
        values: dict[str, Any] = _jsonable(asdict(self))
        return values


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def paired_gain(champion: np.ndarray, challenger: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean gain of (S,) paired values: a t interval over the G conversations that `group` names.

    Conversations are drawn, not states (a linearised ratio of sums). One alone tells nothing: the interval is infinite.
    """
    from scipy.stats import t

    gain = challenger - champion
    _, unit = np.unique(group, return_inverse=True)
    total, size = np.bincount(unit, weights=gain), np.bincount(unit)
    mean, units = gain.mean(), len(total)
    if units < 2:
        return -np.inf, np.inf
    error = np.sqrt(((total - mean * size) ** 2).sum() * units / (units - 1)) / len(gain)
    reach = t.ppf(0.975, units - 1) * error
    return float(mean - reach), float(mean + reach)
