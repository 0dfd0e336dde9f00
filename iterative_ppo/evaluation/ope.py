"""Off-policy estimates of a challenger's value from the champion's conversations, each with bounds or a refusal.

Importance sampling, per decision and doubly robust, as in Precup et al. 2000 and Jiang and Li 2016 (arXiv 1511.03722).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from iterative_ppo.config import GateConfig
from iterative_ppo.evaluation.bootstrap import Interval, OneMore, ratio_interval
from iterative_ppo.evaluation.weights import Support, support, unweighted
from iterative_ppo.mdp.returns import backward_recursion, discounted_returns
from iterative_ppo.mdp.turn_table import conversation_numbers

CEILING = 50.0
"""Log ratios above this are refused in any case; cut here, their products stay numbers."""
BLIND = "its bounds would know nothing of Q's own errors"
INCOMPLETE = "no conversation holds all that this needs in every turn"


@dataclass(frozen=True, eq=False)
class LoggedTurns:
    """N turns of C closed conversations of one behaviour policy, in table order, terminal rows left out.

    Attributes:
        last: (N,) bool, the last turn of each conversation. reward: (N,) r_i, paid on arrival in the next state.
        log_ratio: (N,) log pi'(a_i | s_i) - log b(a_i | s_i) of whole responses, NaN where unknown.
        baseline: (N,) V(s_i). q: (N,) Q(s_i, a_i), NaN where no action was logged; both fitted on other conversations.
        sampled_q: (N,) mean of Q(s_i, a') over samples a' of pi', NaN where nothing was sampled.
        low, high: the range of returns.
    """

    last: np.ndarray
    reward: np.ndarray
    log_ratio: np.ndarray
    baseline: np.ndarray
    q: np.ndarray
    sampled_q: np.ndarray
    gamma: float
    low: float
    high: float

    @cached_property
    def conversation(self) -> np.ndarray:
        """(N,) 0 to C - 1."""
        return conversation_numbers(self.last)

    @cached_property
    def first(self) -> np.ndarray:
        """(N,) bool, the first turn of each conversation."""
        return np.append(True, self.last[:-1]) if len(self.last) else self.last

    @cached_property
    def known(self) -> np.ndarray:
        """(N,) bool, turns whose ratio is known."""
        return ~np.isnan(self.log_ratio)

    @cached_property
    def returns(self) -> np.ndarray:
        """(N,) G_i."""
        return discounted_returns(self.reward, self.last, self.gamma)

    @cached_property
    def ratio(self) -> np.ndarray:
        """(N,) rho_i, NaN where unknown."""
        return np.exp(np.minimum(self.log_ratio, CEILING))

    @cached_property
    def discount(self) -> np.ndarray:
        """(N,) gamma^t, t = 0 in the first turn of a conversation."""
        start = np.flatnonzero(self.first)[self.conversation]
        weight: np.ndarray = self.gamma ** (np.arange(len(self.last)) - start)
        return weight

    @cached_property
    def heaviest(self) -> float:
        """The largest product of a conversation's ratios up to any of its turns."""
        log_ratio = np.minimum(self.log_ratio, CEILING)
        sums = np.cumsum(np.maximum(log_ratio, -CEILING))
        before = sums - np.maximum(log_ratio, -CEILING)
        running = sums - before[self.first][self.conversation]
        return float(np.exp(min(running.max(initial=-np.inf), CEILING)))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(C,) sums of (N,) values over each conversation."""
        return np.bincount(self.conversation, weights=values, minlength=int(self.last.sum())).astype(float)

    def whole(self, known: np.ndarray) -> LoggedTurns:
        """The conversations whose turns are all `known`, (N,) bool."""
        return self.rows((self.sums(~known) == 0)[self.conversation])

    def rows(self, chosen: np.ndarray | slice) -> LoggedTurns:
        """Some of the turns, whole conversations of them."""
        return replace(
            self,
            last=self.last[chosen],
            reward=self.reward[chosen],
            log_ratio=self.log_ratio[chosen],
            baseline=self.baseline[chosen],
            q=self.q[chosen],
            sampled_q=self.sampled_q[chosen],
        )


@dataclass(frozen=True)
class Estimate:
    """A value with one-sided bounds; `refusal` says why they are not to be trusted.

    Attributes:
        support: of the conversations that it rests on. left_out: those that lack what it needs.
    """

    name: str
    value: float
    low: float
    high: float
    support: Support
    left_out: int
    refusal: str | None

    @property
    def reason(self) -> str:
        """In plain words."""
        return self.refusal or f"{self.value:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def estimates(
    turns: LoggedTurns, limits: GateConfig, seed: int = 0, model: Literal["q_model", "fqe"] = "q_model"
) -> dict[str, Estimate]:
    """What the champion's conversations tell of the challenger's value, the mean return at the start.

    logged: the champion's own. wis, per_decision, doubly_robust: the challenger's. doubly_robust_gain: its difference
    to the champion's on the same conversations. And `model`, the challenger's first responses in Q's eyes: fqe, its
    value, where Q is its own (`gate.fqe`); q_model, the value of one turn of it, where Q is the champion's. Their
    bounds are refused: they know of the states that were drawn, not of Q's own errors, which doubly_robust corrects.

    Conversations with a turn whose log-prob is unknown are left out of the weighted estimates, those whose states were
    not sampled of the estimates that need Q.
    """
    weighted = turns.whole(turns.known)
    modelled = weighted.whole(np.isfinite(weighted.q) & np.isfinite(weighted.sampled_q))
    robust = doubly_robust(modelled)
    starts = turns.sampled_q[turns.first]
    judge = _Judge(limits, seed, int(turns.last.sum()))
    found = (
        judge.plain("logged", turns.returns[turns.first]),
        judge.self_normalised("wis", weighted),
        judge.weighted("per_decision", per_decision(weighted), weighted),
        judge.weighted("doubly_robust", robust, modelled),
        judge.weighted("doubly_robust_gain", robust - modelled.returns[modelled.first], modelled),
        replace(judge.plain(model, starts[np.isfinite(starts)]), refusal=BLIND),
    )
    return {estimate.name: estimate for estimate in found}


def untold(name: str, conversations: int, reason: str) -> Estimate:
    """One that could not be made of any of the conversations."""
    nan = float("nan")
    return Estimate(name, nan, nan, nan, unweighted(0), conversations, reason)


def per_decision(turns: LoggedTurns) -> np.ndarray:
    """(C,) V_i = rho_i (r_i + gamma V_{i+1}) at the start."""
    return backward_recursion(turns.ratio * turns.reward, turns.gamma * turns.ratio, turns.last)[turns.first]


def doubly_robust(turns: LoggedTurns) -> np.ndarray:
    """(C,) V_i = E_pi' Q(s_i, .) + rho_i (r_i + gamma V_{i+1} - Q(s_i, a_i)) at the start. Unbiased for any Q."""
    constant = turns.sampled_q + turns.ratio * (turns.reward - turns.q)
    return backward_recursion(constant, turns.gamma * turns.ratio, turns.last)[turns.first]


@dataclass(frozen=True)
class _Judge:
    """Bounds and refusals of estimates over some of `total` conversations."""

    limits: GateConfig
    seed: int
    total: int

    def plain(self, name: str, values: np.ndarray) -> Estimate:
        """Mean of (C,) values without weights."""
        return self._estimate(name, self._mean(values), unweighted(len(values)))

    def weighted(self, name: str, values: np.ndarray, turns: LoggedTurns) -> Estimate:
        """Mean of (C,) values that carry the product of their conversation's ratios."""
        found = self._mean(values)
        reach = turns.heaviest * (turns.high - turns.low)
        found = found.beside(OneMore(1.0, found.estimate - reach, found.estimate + reach), len(values))
        return self._estimate(name, found, support(turns.sums(turns.log_ratio)))

    def self_normalised(self, name: str, turns: LoggedTurns) -> Estimate:
        """sum w G / sum w, with weights in units of the largest."""
        log_weight = turns.sums(turns.log_ratio)
        top = log_weight.max(initial=-np.inf)
        weight = np.exp(log_weight - top) if np.isfinite(top) else np.zeros(len(log_weight))
        found = self._interval(weight * turns.returns[turns.first], weight)
        found = found.beside(OneMore(1.0, turns.low, turns.high), float(weight.sum()))
        return self._estimate(name, found, support(log_weight))

    def _mean(self, values: np.ndarray) -> Interval:
        return self._interval(values, np.ones(len(values)))

    def _interval(self, numerator: np.ndarray, denominator: np.ndarray) -> Interval:
        return ratio_interval(numerator, denominator, 1.0 - self.limits.alpha, self.limits.draws, self.seed)

    def _estimate(self, name: str, found: Interval, worth: Support) -> Estimate:
        refusal = worth.refusal(self.limits) if worth.known else INCOMPLETE
        return Estimate(name, found.estimate, found.low, found.high, worth, self.total - worth.known, refusal)
