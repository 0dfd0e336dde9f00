"""Where a test's looks lie, taken and planned, and what the statistic must reach there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iterative_ppo.evaluation.experiment import DesignName, Look
from iterative_ppo.evaluation.spending import upper_bounds


@dataclass(frozen=True)
class Bound:
    """At this fraction of the planned conversations the statistic (z, or the e-value) must reach `bound`.

    `statistic` is None where the look is not taken yet.
    """

    fraction: float
    bound: float
    statistic: float | None = None


def bounds(design: DesignName, planned: int, alpha: float, looks: Sequence[Look]) -> list[Bound]:
    """The looks taken, then those ahead of `planned` equal ones; other designs than the group sequential plan its end.

    In the anytime design the bound is always the same.
    """
    from scipy.stats import norm

    taken = [(look.fraction, look.statistic) for look in looks if look.statistic is not None]
    last = taken[-1][0] if taken else 0.0
    due = range(1, planned + 1) if design == "group_sequential" else [planned]
    ahead = [k / planned for k in due if k / planned > last + 1e-9]
    fractions = [*(fraction for fraction, _ in taken), *ahead]
    if design == "group_sequential":
        reach = upper_bounds(fractions, alpha)
    else:
        reach = [1 / alpha if design == "anytime" else float(norm.isf(alpha))] * len(fractions)
    found = [*(statistic for _, statistic in taken), *([None] * len(ahead))]
    return [Bound(*one) for one in zip(fractions, reach, found, strict=True)]
