"""One bootstrap for all offline estimates: conversations resampled whole, estimates ratios of sums over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK = 1 << 22
"""Resampled counts held at a time."""


@dataclass(frozen=True)
class OneMore:
    """A conversation that was not drawn but could have been: its denominator, and how its numerator may turn out."""

    denominator: float
    least: float
    most: float


@dataclass(frozen=True)
class Interval:
    """An estimate with its lower and its upper bound, each one-sided at the level that was asked for."""

    estimate: float
    low: float
    high: float

    def beside(self, one: OneMore, denominator: float) -> Interval:
        """The bounds had `one` been drawn too, turning out worst for the lower and best for the upper one.

        Bounds from a sample cannot know of heavy weights that it happens to lack; this is what one of them would do.
        """
        total = denominator + one.denominator
        low = min(self.low, (self.low * denominator + one.least) / total)
        return Interval(self.estimate, low, max(self.high, (self.high * denominator + one.most) / total))


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, level: float, draws: int, seed: int = 0) -> Interval:
    """Bootstrap-t bounds of sum(numerator) / sum(denominator) over C conversations.

    Args:
        numerator: (C,). denominator: (C,), at least 0; ones give a mean. level: of each bound, say .95.

    Studentised resamples follow the skewness that importance weights bring, which percentiles of the estimate do not
    (Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 12.5). Bounds are NaN below two
    conversations.
    """
    total = denominator.sum()
    if len(numerator) < 2 or not np.isfinite(numerator.sum() + total) or total <= 0:
        return Interval(float(numerator.sum() / total) if total > 0 else float("nan"), float("nan"), float("nan"))
    estimate = float(numerator.sum() / total)
    residual = numerator - estimate * denominator
    error = float(np.sqrt((residual**2).sum()) / total)
    columns = np.stack([residual, denominator, residual**2, residual * denominator, denominator**2], axis=1)
    sums = np.concatenate([counts @ columns for counts in _resamples(len(numerator), draws, seed)])
    top, bottom, squares, mixed, square = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = top / bottom
        spread = np.sqrt(np.maximum(squares - 2 * shift * mixed + shift**2 * square, 0.0)) / bottom
        studentised = np.nan_to_num(shift / spread, nan=0.0, posinf=np.inf, neginf=-np.inf)
    least, most = np.quantile(studentised, [1.0 - level, level], method="inverted_cdf")
    bounds = (estimate - x * error if error > 0 else estimate for x in (most, least))
    return Interval(estimate, *map(float, bounds))


def _resamples(units: int, draws: int, seed: int) -> list[np.ndarray]:
    """(draws, units) how often each unit is drawn, in blocks."""
    size = max(1, min(draws, BLOCK // units))
    return [_counts(units, min(size, draws - begun), seed + begun) for begun in range(0, draws, size)]


@lru_cache(maxsize=2)
def _counts(units: int, draws: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).integers(units, size=(draws, units)) + units * np.arange(draws)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=draws * units).reshape(draws, units).astype(np.float64)
    counts.setflags(write=False)
    return counts
