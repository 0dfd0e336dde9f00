"""Where a test's looks lie, taken and planned, and what the statistic must reach there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iterative_ppo.config import ABTestConfig
from iterative_ppo.evaluation.experiment import Look
from iterative_ppo.evaluation.spending import upper_bounds


@dataclass(frozen=True)
class Bound:
    """At this fraction of the planned conversations the statistic (z, or the e-value) must reach `bound`.

    `statistic` is None where the look is not taken yet.
    """

    fraction: float
    bound: float
    statistic: float | None = None


def bounds(config: ABTestConfig, alpha: float, looks: Sequence[Look]) -> list[Bound]:
    """The looks taken, then those planned; in the anytime design, whose bound is always the same, the plan's end."""
    from scipy.stats import norm

    taken = [(look.fraction, look.statistic) for look in looks if look.statistic is not None]
    last = taken[-1][0] if taken else 0.0
    planned = range(1, config.looks + 1) if config.design == "group_sequential" else [config.looks]
    ahead = [k / config.looks for k in planned if k / config.looks > last + 1e-9]
    fractions = [*(fraction for fraction, _ in taken), *ahead]
    if config.design == "group_sequential":
        reach = upper_bounds(fractions, alpha)
    else:
        reach = [1 / alpha if config.design == "anytime" else float(norm.isf(alpha))] * len(fractions)
    found = [*(statistic for _, statistic in taken), *([None] * len(ahead))]
    return [Bound(*one) for one in zip(fractions, reach, found, strict=True)]
