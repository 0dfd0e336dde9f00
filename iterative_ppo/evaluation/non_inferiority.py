"""Guardrails: in a measure that it need not improve, is the challenger worse by less than a margin?

Everything is put as a loss: how much worse the challenger is, in the measure's own units and good direction. A
guardrail holds where a loss of the margin or more is refuted at one-sided alpha; what cannot be told does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from iterative_ppo.errors import ConfigError, TurnTableError
from iterative_ppo.evaluation.ab_test import Arm, p_in_words

Better = Literal["higher", "lower"]
Found = Literal["holds", "not told", "broken"]
DRAWS = 2000
SHOWN = 0.05


@dataclass(frozen=True)
class Guardrail:
    """A measure: its name, which direction is good, the loss (>= 0) that would be too much, and the level."""

    measure: str
    better: Better
    margin: float
    alpha: float

    def __post_init__(self) -> None:
        if self.margin < 0 or not 0 < self.alpha < 1:
            raise ConfigError(
                f"guardrail {self.measure}: margin {self.margin:g} and alpha {self.alpha:g}; expected a margin of 0 "
                "or more and alpha between 0 and 1"
            )


@dataclass(frozen=True)
class NonInferiority:
    """What a guardrail found: the arms' values, the loss with its one-sided upper bound, and whether it holds.

    The p-value is NaN where no arm is tested: there the champion's value is the most that chance gives. `missed`: what
    was seen is within the margin, but in too few conversations to tell of what is rare; it does not hold.
    """

    measure: str
    champion: float
    challenger: float
    margin: float
    loss: float
    loss_bound: float
    p_value: float
    holds: bool
    missed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: an unknown value is null."""
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NonInferiority:
        """As `as_dict` wrote it, `missed` or not. Raises KeyError where something else is missing."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name != "missed"}
        known["missed"] = bool(values.get("missed"))
        numbers: dict[str, Any] = {name: float("nan") if value is None else value for name, value in known.items()}
        return cls(**numbers)

    @property
    def found(self) -> Found:
        """Whether it holds, is shown to be broken, or neither."""
        return "holds" if self.holds else "broken" if self.broken else "not told"

    @property
    def broken(self) -> bool:
        """Whether a loss beyond the margin is shown, at a level of 5 %; what does not hold may just not be known."""
        return bool(self.loss > self.margin and (np.isnan(self.p_value) or 1.0 - self.p_value < SHOWN))

    @property
    def reason(self) -> str:
        """In plain words."""
        if np.isnan(self.loss):
            return f"{self.measure}: cannot tell, an arm holds too few values"
        if np.isnan(self.p_value):
            return f"{self.measure} {self.challenger:.4g}, chance {self.champion:.4g} (margin {self.margin:g})"
        return (
            f"{self.measure} {self.challenger:.4g}, champion {self.champion:.4g}: at most {self.loss_bound:.3g} worse "
            f"(margin {self.margin:g}, {p_in_words(self.p_value)})"
        )


def proportion(guardrail: Guardrail, champion: Arm, challenger: Arm) -> NonInferiority:
    """Score test of two shares. Where businesses are assigned, use `mean` of each business's share instead."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    if not champion.conversations or not challenger.conversations:
        return _unknown(guardrail)
    worse, base = (challenger, champion) if guardrail.better == "lower" else (champion, challenger)
    ends, bound = (-1 + 1e-9, 1 - 1e-9), norm.isf(guardrail.alpha)

    def beyond(loss: float) -> float:
        return score_z(worse, base, loss) + bound

    highest = ends[1] if beyond(ends[1]) > 0 else brentq(beyond, *ends)
    p_value = float(norm.cdf(score_z(worse, base, guardrail.margin)))
    return _found(guardrail, champion.rate, challenger.rate, float(highest), p_value)


def mean(guardrail: Guardrail, champion: np.ndarray, challenger: np.ndarray) -> NonInferiority:
    """Welch's t test of (N,) and (M,) values, a conversation's each; or a business's each, where those are assigned."""
    from scipy.stats import ttest_ind

    champion, challenger = _values(guardrail, champion), _values(guardrail, challenger)
    if min(len(champion), len(challenger)) < 2:
        return _unknown(guardrail)
    averages = float(champion.mean()), float(challenger.mean())
    if np.ptp(champion) == 0 == np.ptp(challenger):
        loss = _loss(guardrail, *averages)
        return _found(guardrail, *averages, loss, 0.0 if loss < guardrail.margin else 1.0)
    worse, base = (challenger, champion) if guardrail.better == "lower" else (champion, challenger)
    test = ttest_ind(worse - guardrail.margin, base, equal_var=False, alternative="less")
    highest = test.confidence_interval(1 - guardrail.alpha).high + guardrail.margin
    return _found(guardrail, *averages, float(highest), float(test.pvalue))


def quantile(
    guardrail: Guardrail,
    champion: np.ndarray,
    challenger: np.ndarray,
    level: float = 0.95,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> NonInferiority:
    """Percentile bootstrap of the difference of quantiles, as of response lengths.

    Args:
        champion, challenger: (N,) and (M,) values. groups: their (N,) and (M,) conversations or businesses, resampled
            whole; None where every value stands alone.
    """
    rng, (first, second) = np.random.default_rng(seed), groups or (None, None)
    champion, challenger = _values(guardrail, champion), _values(guardrail, challenger)
    if min(len(champion), len(challenger)) < 2:
        return _unknown(guardrail)
    losses = _loss(guardrail, _resampled(champion, first, level, rng), _resampled(challenger, second, level, rng))
    p_value = float((1 + (losses >= guardrail.margin).sum()) / (1 + DRAWS))
    ours, theirs = (float(np.quantile(values, level, method="inverted_cdf")) for values in (champion, challenger))
    return _found(guardrail, ours, theirs, float(np.quantile(losses, 1 - guardrail.alpha)), p_value)


def score_z(worse: Arm, base: Arm, difference: float) -> float:
    """The score statistic of rate(worse) - rate(base) = difference (Miettinen & Nurminen 1985, closed form).

    Not statsmodels' `method="score"`: for values other than 0 its cubic has a count where the formula has a size
    (https://github.com/statsmodels/statsmodels/issues/10269), which overstates z where successes are few.
    """
    x, n, y, m, d = worse.successes, worse.conversations, base.successes, base.conversations, difference
    square = ((n + 2 * m) * d - (n + m) - (x + y)) / (3 * (n + m))
    linear = ((m * d - (n + m) - 2 * y) * d + x + y) / (3 * (n + m))
    constant = y * d * (1 - d) / (n + m)
    q = square**3 - 3 * square * linear / 2 + constant / 2
    p = np.copysign(np.sqrt(max(square**2 - linear, 0.0)), q)
    angle = (np.pi + np.arccos(np.clip(q / p**3 if p else 0.0, -1.0, 1.0))) / 3
    low = float(np.clip(2 * p * np.cos(angle) - square, max(0.0, -d), min(1.0, 1.0 - d)))
    high = low + d
    variance = (high * (1 - high) / n + low * (1 - low) / m) * (n + m) / (n + m - 1)
    gap = worse.rate - base.rate - d
    return float(gap / np.sqrt(variance)) if variance > 0 else float(np.sign(gap) * np.inf if gap else 0.0)


def _resampled(values: np.ndarray, groups: np.ndarray | None, level: float, rng: np.random.Generator) -> np.ndarray:
    """(DRAWS,) quantiles, groups drawn with replacement."""
    order = np.argsort(values, kind="stable")
    _, codes = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    count = int(codes.max()) + 1
    found = np.empty(DRAWS)
    for draw in range(DRAWS):
        weights = np.bincount(rng.integers(count, size=count), minlength=count)[codes[order]]
        reached = np.cumsum(weights)
        found[draw] = values[order[np.searchsorted(reached, level * reached[-1])]]
    return found


def _loss(guardrail: Guardrail, champion: Any, challenger: Any) -> Any:
    return challenger - champion if guardrail.better == "lower" else champion - challenger


def _values(guardrail: Guardrail, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise TurnTableError(f"guardrail {guardrail.measure}: value {row} is {values[row]}; leave out what is unknown")
    return values


def _unknown(guardrail: Guardrail) -> NonInferiority:
    nan = float("nan")
    return NonInferiority(guardrail.measure, nan, nan, guardrail.margin, nan, nan, 1.0, False)


def _found(guardrail: Guardrail, champion: float, challenger: float, bound: float, p_value: float) -> NonInferiority:
    loss = _loss(guardrail, champion, challenger)
    return NonInferiority(
        guardrail.measure, champion, challenger, guardrail.margin, loss, bound, p_value, p_value < guardrail.alpha
    )
