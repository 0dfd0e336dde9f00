"""The A/B test of outcomes between champion and challenger: fixed sample, matured conversations, score test."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from iterative_ppo.errors import ConfigError


@dataclass(frozen=True)
class Arm:
    """Successes among matured conversations."""

    successes: int
    conversations: int

    @property
    def rate(self) -> float:
        return self.successes / self.conversations if self.conversations else float("nan")


@dataclass(frozen=True)
class ABTest:
    """One-sided test of challenger > champion, with a two-sided 95 % interval of the difference of rates."""

    champion: Arm
    challenger: Arm
    alpha: float
    p_value: float
    gain: float
    gain_low: float
    gain_high: float

    @property
    def better(self) -> bool:
        """Whether the challenger is shown to be better."""
        return self.p_value < self.alpha and self.gain > 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def p_in_words(p: float) -> str:
    """p < 0.001, or p = 0.012."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def level_of(alpha: float) -> str:
    """The level of an interval of which each end holds at `alpha`: 90%."""
    return f"{100 * (1 - 2 * alpha):.3g}%"


def ab_test(champion: Arm, challenger: Arm, alpha: float) -> ABTest:
    """Score test of two proportions (statsmodels) with Newcombe's interval. Raises ConfigError for an empty arm."""
    from statsmodels.stats.proportion import confint_proportions_2indep, test_proportions_2indep

    for name, arm in (("champion", champion), ("challenger", challenger)):
        if arm.conversations == 0:
            raise ConfigError(f"the A/B test's {name} arm holds no matured conversation; wait for traffic")
    counts = (challenger.successes, challenger.conversations, champion.successes, champion.conversations)
    if challenger.successes + champion.successes in (0, challenger.conversations + champion.conversations):
        p_value = 1.0  # both arms all failures or all successes: the statistic is 0 / 0 and nothing differs
    else:
        with np.errstate(divide="ignore"):  # in its odds ratio, which nobody asked for, where one arm has no success
            result = test_proportions_2indep(*counts, value=0, method="score", compare="diff", alternative="larger")
        p_value = float(result.pvalue)
    low, high = confint_proportions_2indep(*counts, method="newcomb", compare="diff", alpha=0.05)
    gain = challenger.rate - champion.rate
    return ABTest(champion, challenger, alpha, p_value, gain, float(low), float(high))


def assign(unit: str, salt: str, challenger_share: float) -> str:
    """The sticky arm of a unit: a place below the share is the challenger's."""
    return "challenger" if position(unit, salt) < challenger_share else "champion"


def position(unit: str, salt: str) -> float:
    """A unit's place in [0, 1), uniform over units and new with each salt: sha256(salt:unit) as 64 bits / 2^64."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{unit}".encode()).digest()[:8], "big") / 2**64
