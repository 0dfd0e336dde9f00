"""Importance weights in log space: what a log is worth for another policy, and when it is worth too little."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iterative_ppo.config import GateConfig

NO_LOG_PROBS = "these logs carry no behaviour log-probs"


@dataclass(frozen=True)
class Support:
    """How well logged actions stand for another policy's.

    Attributes:
        known: number of weights. effective: (sum w)^2 / sum w^2, how many of its own they are worth (Kish).
        largest: the share that one weight holds of their sum.
        mean: their mean; 1 where the log holds whatever the policy does, less by the share that it never saw.
    """

    known: int
    effective: float
    largest: float
    mean: float

    def refusal(self, limits: GateConfig) -> str | None:
        """Why nothing can be told from these weights, or None."""
        if not self.known:
            return NO_LOG_PROBS
        if not self.effective >= limits.min_effective:
            return (
                f"the logs are worth {self.effective:.0f} of the challenger's own (at least {limits.min_effective:g})"
            )
        if not self.largest <= limits.max_weight:
            return f"one weight holds {self.largest:.1%} of all (at most {limits.max_weight:.1%})"
        if not self.mean >= limits.min_support:
            return f"the logs hold {self.mean:.0%} of what the challenger does (at least {limits.min_support:.0%})"
        return None


def support(log_weight: np.ndarray) -> Support:
    """Of (N,) log weights, all known."""
    if not len(log_weight):
        return Support(0, 0.0, float("nan"), float("nan"))
    top = log_weight.max()
    if not np.isfinite(top):
        return Support(len(log_weight), 0.0, float("nan"), 0.0 if top < 0 else float("inf"))
    scaled = np.exp(log_weight - top)
    total = scaled.sum()
    with np.errstate(over="ignore"):
        mean = float(np.exp(top + np.log(total / len(scaled))))
    return Support(len(scaled), float(total**2 / (scaled**2).sum()), float(1.0 / total), mean)


def unweighted(count: int) -> Support:
    """Of `count` observations of the policy's own."""
    return Support(count, float(count), 1.0 / count if count else float("nan"), 1.0)
