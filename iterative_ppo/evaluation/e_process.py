"""The anytime-valid design: bets on pairs of conversations, valid at whatever moment one looks (Ville's inequality).

A bet on the pair (a of the champion, b of the challenger) multiplies the stake by (1 - l (a - c)) (1 + l (b - m - c)),
with l > 0 and c known before the pair. Where the challenger's mean is at most m above the champion's, the expected
factor is at most 1, whatever the mean is and however it moves from pair to pair: 1 - l^2 (mean - c)^2 at the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from iterative_ppo.config import ABTestConfig
from iterative_ppo.evaluation.clusters import business_means
from iterative_ppo.evaluation.experiment import History, Look, concluded, opening

LEVERAGE = 0.999


@dataclass(frozen=True)
class EProcess:
    """Promotes once the e-process has reached 1 / alpha; ends without at `config.conversations`.

    The statistic is the greatest e-value so far. The interval is the confidence sequence that the same bets give, so
    its lower end passes 0 with the verdict. Where conversations are assigned, businesses need no regard: that outcomes
    of a pair are alike lowers the expected factor.
    """

    config: ABTestConfig
    alpha: float

    def look(self, history: History) -> Look:
        """Raises TurnTableError for a faulty history."""
        look, arms = opening("anytime", history, self.config)
        if arms is None:
            return look
        champion, challenger = self._pairs(history)
        if not len(champion):
            return replace(look, verdict="reject" if look.fraction >= 1 else "continue", reasons=("no pair yet",))
        value = np.exp(min(700.0, log_e_process(champion, challenger, self.config.mde).max(initial=0.0)))
        low, high = confidence_sequence(champion, challenger, self.config.mde, self.alpha)
        estimate = float((challenger - champion).mean())
        found = replace(look, statistic=float(value), bound=1 / self.alpha, estimate=estimate, low=low, high=high)
        return concluded(found, promote=value >= 1 / self.alpha, mde=self.config.mde, alpha=self.alpha)

    def _pairs(self, history: History) -> tuple[np.ndarray, np.ndarray]:
        """Outcomes (K,) of champion and challenger in pairs: of conversations, or means of whole businesses."""
        seen = slice(0, history.matured)
        arm, outcome = history.challenger[seen], history.outcome[seen]
        if self.config.unit == "business":
            codes = history.businesses(whole=True)[seen]
            rows, outcome = business_means(codes, outcome, self.config.business_conversations)
            arm = arm[rows]
        first, second = nearest_pairs(arm)
        return outcome[first], outcome[second]


def nearest_pairs(challenger: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair each unit with the latest unpaired one of the other arm before it, as brackets pair.

    Args:
        challenger: (N,) bool in order of assignment.

    Returns indices (K,) of champions and of challengers, pairs in the order in which they become complete; more units
    do not change earlier pairs. Pairing the k-th with the k-th would do for equal arms; for others, pairs would
    be of ever more distant dates, and a change of rates in time would pass for a difference between the arms.
    """
    step = np.where(challenger, -1, 1)
    level = np.cumsum(step)
    edge = np.minimum(level, level - step)
    order = np.argsort(edge, kind="stable")
    edges = edge[order]
    starts = np.flatnonzero(np.r_[True, edges[1:] != edges[:-1]]) if len(edges) else np.zeros(0, dtype=int)
    rank = np.arange(len(edges)) - np.repeat(starts, np.diff(np.r_[starts, len(edges)]))
    closing = np.flatnonzero(rank % 2)
    closing = closing[np.argsort(order[closing])]
    later, before = order[closing], order[closing - 1]
    return np.where(challenger[later], before, later), np.where(challenger[later], later, before)


def log_e_process(champion: np.ndarray, challenger: np.ndarray, mde: float, margin: float = 0.0) -> np.ndarray:
    """log E after each pair, for the null that the challenger's mean is at most `margin` above the champion's.

    E is the mean over bets made for gains of half, one and two `mde` above the margin. On 0/1 outcomes at margin 0 a
    bet for a gain d has l = h / (p (1 - p)), h = min(d / 2, .999 min(p, 1 - p)), p the mean so far with half a
    success; in general p (1 - p) is the variance so far, which for means of businesses is smaller.

    Args:
        champion, challenger: (..., K) outcomes in [0, 1] of each pair.
    """
    both, squares = champion + challenger, champion**2 + challenger**2
    before = 2.0 * np.arange(both.shape[-1]) + 1.0
    centre = (np.cumsum(both, axis=-1) - both + 0.5) / before
    variance = (np.cumsum(squares, axis=-1) - squares + 0.5) / before - centre**2
    loss, gain = champion - centre, challenger - margin - centre
    bets = leverages(centre, variance, mde, margin)
    return mixture([np.cumsum(np.log((1 - bet * loss) * (1 + bet * gain)), axis=-1) for bet in bets])


def leverages(centre: np.ndarray, variance: np.ndarray, mde: float, margin: float) -> list[np.ndarray]:
    """l of the bets for half, one and two `mde`: what grows fastest for that gain, as far as no bet can lose all."""
    most = LEVERAGE / np.maximum(1 - centre, centre + margin)
    return [np.minimum(aim / (2 * variance), most) for aim in (mde / 2, mde, 2 * mde)]


def mixture(logs: Sequence[np.ndarray]) -> np.ndarray:
    """log of the mean of what the bets have made, from their logs."""
    greatest = np.max(logs, axis=0)
    mixed: np.ndarray = greatest + np.log(np.mean([np.exp(log - greatest) for log in logs], axis=0))
    return mixed


def confidence_sequence(champion: np.ndarray, challenger: np.ndarray, mde: float, alpha: float) -> tuple[float, float]:
    """Bounds of the challenger's gain from (K,) pairs: each end holds at all times at once with 1 - alpha."""
    low = _lower_end(champion, challenger, mde, alpha)
    return low, -_lower_end(challenger, champion, mde, alpha)


def _lower_end(champion: np.ndarray, challenger: np.ndarray, mde: float, alpha: float) -> float:
    """The greatest margin that the bets refute, by bisection; they refute a greater one less."""
    low, high = -1.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        refuted = log_e_process(champion, challenger, mde, middle).max(initial=0.0) >= -np.log(alpha)
        low, high = (middle, high) if refuted else (low, middle)
    return low
