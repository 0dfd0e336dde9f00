"""Two arms' outcomes as sufficient statistics, and what every design makes of them: gain, score statistic, error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

PSEUDO = 2
"""A success and a failure an arm in the standard error (Agresti & Caffo 2000): it is never 0 on few successes."""


@dataclass(frozen=True)
class Tally:
    """Outcomes in [0, 1] of an arm: how many, their sum, their sum of squares. Arrays of one shape, or numbers."""

    count: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, outcome: np.ndarray) -> Tally:
        """Of an arm's (N,) outcomes."""
        return cls(np.array(outcome.size), outcome.sum(), (outcome**2).sum())

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count


@dataclass(frozen=True)
class Comparison:
    """Champion beside challenger; both hold an outcome.

    The design effects (`clusters.py`) multiply the variance were the arms alike, and that of each as it is; `freedom`
    is the degrees of freedom of the latter.
    """

    champion: Tally
    challenger: Tally
    design_effect: np.ndarray | float = 1.0
    own_design_effect: np.ndarray | float = 1.0
    freedom: np.ndarray | float = math.inf

    @property
    def gain(self) -> np.ndarray:
        """Difference of means, challenger less champion."""
        return self.challenger.mean - self.champion.mean

    @property
    def z(self) -> np.ndarray:
        """Score statistic of no difference; 0 where outcomes do not vary.

        For 0/1 outcomes it is the score test of two proportions with Miettinen & Nurminen's n / (n - 1)
        (`statsmodels.stats.proportion.test_proportions_2indep`, method "score", value 0).
        """
        variance = self.null_variance * self.design_effect
        varies = variance > 1e-15
        return np.where(varies, self.gain / np.sqrt(np.where(varies, variance, 1.0)), 0.0)

    @property
    def null_variance(self) -> np.ndarray:
        """Variance of the gain of independent outcomes were the arms alike: one variance about the common mean."""
        a, b = self.champion, self.challenger
        count = a.count + b.count
        spread = a.squares + b.squares - (a.total + b.total) ** 2 / count
        pooled: np.ndarray = spread / np.maximum(count - 1, 1) * (1 / a.count + 1 / b.count)
        return pooled

    @property
    def error(self) -> np.ndarray:
        """Standard error of the gain whatever the truth, each arm with its own variance."""
        return np.sqrt(self.own_variance * self.own_design_effect)

    def half_width(self, bound: float) -> np.ndarray:
        """Of the gain's interval, whose ends are as far out in t as `bound` is in the normal distribution."""
        from scipy.stats import norm, t

        return np.asarray(t.isf(norm.sf(bound), self.freedom) * self.error)

    @property
    def own_variance(self) -> np.ndarray:
        """Variance of the gain of independent outcomes, whatever the truth."""
        return _variance_of_mean(self.champion) + _variance_of_mean(self.challenger)


def _variance_of_mean(arm: Tally) -> np.ndarray:
    count, total, squares = arm.count + PSEUDO, arm.total + PSEUDO / 2, arm.squares + PSEUDO / 2
    variance: np.ndarray = (squares / count - (total / count) ** 2) / count
    return variance
