"""What a challenger's responses on held-out states tell: E[Q], KL in both directions, and signs of degeneration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class OfflineEvidence:
    """Champion and challenger on the same held-out states. KL in nats a response; shares in [0, 1]."""

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

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: what is not a number becomes null."""
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(self).items()}


def repetition(responses: Sequence[Sequence[int]]) -> float:
    """Mean share of bigrams in a response that already stood in it; 0 for responses of one token."""
    shares = [1.0 - len(set(pairs)) / len(pairs) for r in responses if (pairs := list(pairwise(r)))]
    return float(np.mean(shares)) if shares else 0.0


def paired_gain(champion: np.ndarray, challenger: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean gain of (S,) paired values, states of one conversation resampled together."""
    gain = challenger - champion
    _, unit = np.unique(group, return_inverse=True)
    total, size = np.bincount(unit, weights=gain), np.bincount(unit)
    mean = gain.mean()
    spread = np.sqrt(((total - mean * size) ** 2).sum()) / len(gain)
    return float(mean - 1.96 * spread), float(mean + 1.96 * spread)
