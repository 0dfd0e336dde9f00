"""What a look that decides comes to in the terms of a plain test: arms, gain, interval, p-value.

All of it holds however often was looked before: the interval is the design's own, at 2.5 % an end, and the p-value is
the least level at which the design would have promoted at this look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from iterative_ppo.config import ABTestConfig
from iterative_ppo.evaluation.ab_test import ABTest, Arm, ab_test
from iterative_ppo.evaluation.designs import design_of
from iterative_ppo.evaluation.experiment import History, Look
from iterative_ppo.evaluation.spending import upper_bounds

EACH_END = 0.025
LEAST_P = 1e-12


def inference(config: ABTestConfig, alpha: float, history: History, look: Look) -> ABTest:
    """The two-sided 95 % interval and the p-value of a look with conversations in both arms.

    Args:
        history: what the look saw. look: the design's at one-sided `alpha`.

    A look that could not compare anything, as where no conversation succeeded, has those of a fixed sample; where
    businesses are assigned, whose conversations are no such sample, it tells nothing of the gain.
    """
    champion, challenger = arms(look)
    wider = design_of(config, EACH_END).look(history)
    if look.statistic is None or look.estimate is None or wider.low is None or wider.high is None:
        plain = ab_test(champion, challenger, alpha)
        return plain if config.unit == "conversation" else replace(plain, p_value=1.0, gain_low=-1.0, gain_high=1.0)
    return ABTest(champion, challenger, alpha, p_value(history, look), look.estimate, wider.low, wider.high)


def arms(look: Look) -> tuple[Arm, Arm]:
    """Champion and challenger, counted."""
    champion, challenger = (
        Arm(round((rate or 0.0) * count), count) for rate, count in zip(look.rates, look.conversations, strict=True)
    )
    return champion, challenger


def p_value(history: History, look: Look) -> float:
    """fixed: of the score test. group_sequential: the repeated p-value (Jennison & Turnbull 2000, chapter 9).

    anytime: the inverse of the e-value (Ville's inequality).
    """
    from scipy.stats import norm

    assert look.statistic is not None
    if look.design == "anytime":
        return min(1.0, 1 / look.statistic)
    if look.design == "fixed":
        return float(norm.sf(look.statistic))
    taken = [earlier.fraction for earlier in history.earlier if earlier.statistic is not None]
    return repeated_p_value([*taken, look.fraction], look.statistic)


def repeated_p_value(fractions: Sequence[float], z: float) -> float:
    """The least level whose bound at the last of these information fractions `z` reaches; never given below 1e-12."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    if len(fractions) == 1 and fractions[0] >= 1:
        return float(norm.sf(z))

    def missing(level: float) -> float:
        return upper_bounds(fractions, level)[-1] - z

    least, most = LEAST_P, 1 - 1e-9
    if missing(least) <= 0:
        return least
    return 1.0 if missing(most) > 0 else float(brentq(missing, least, most, xtol=1e-12))
