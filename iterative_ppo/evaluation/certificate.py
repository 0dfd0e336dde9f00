"""The certificate: Theorem 1's premise, that the challenger's single turns are worth more in the champion's states.

Unbiased for sum_t gamma^t E[Q^pi(s_t, a')] - V^pi(s_t) under the champion's own states, a' of the challenger. That is
not V^pi' - V^pi: a challenger's own states are others, so a good certificate supports it, and only customers prove it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iterative_ppo.config import GateConfig
from iterative_ppo.evaluation.bootstrap import OneMore, ratio_interval
from iterative_ppo.evaluation.ope import LoggedTurns
from iterative_ppo.evaluation.weights import Support, support


@dataclass(frozen=True)
class Certificate:
    """The single-turn gain a conversation with one-sided bounds, and what the weights behind it are worth.

    Attributes:
        low, high: above 0, the lower one supports the challenger; below 0, the upper one blocks it.
        refusal: why the bounds are not to be trusted, where they are not.
        left_out: turns without a known log-prob, which it does not speak of.
    """

    gain: float
    low: float
    high: float
    support: Support
    conversations: int
    left_out: int
    refusal: str | None

    @property
    def reason(self) -> str:
        """In plain words."""
        gain = f"single-turn gain {self.gain:+.4f} a conversation ({self.low:+.4f} to {self.high:+.4f})"
        aside = f"; {self.left_out} turns without a log-prob are left out" if self.left_out else ""
        return f"{self.refusal or gain}{aside}"


def certify(turns: LoggedTurns, limits: GateConfig, seed: int = 0) -> Certificate:
    """Mean over conversations of sum_t gamma^t (rho_t - 1)(G_t - V(s_t)), by conversation.

    Args:
        turns: of evidence conversations, which neither Q nor the challenger has seen.
    """
    known = turns.known
    weights = support(turns.log_ratio[known])
    edge = np.where(known, (turns.ratio - 1.0) * (turns.returns - turns.baseline), 0.0)
    gains = turns.sums(turns.discount * edge)
    found = ratio_interval(gains, np.ones(len(gains)), 1.0 - limits.alpha, limits.draws, seed)
    if weights.known:
        reach = turns.ratio[known].max() * (turns.high - turns.low)
        found = found.beside(OneMore(1.0, -reach, reach), len(gains))
    left_out, refusal = int((~known).sum()), weights.refusal(limits)
    return Certificate(found.estimate, found.low, found.high, weights, len(gains), left_out, refusal)
