"""Retrace(lambda) (Munos et al. 2016, arXiv 1606.02647)."""

from __future__ import annotations

from dataclasses import dataclass

from iterative_ppo.learning.estimators.protocol import Learner, Transitions
from iterative_ppo.mdp.returns import retrace_targets


@dataclass(frozen=True)
class Retrace:
    """FQE that looks further along a conversation for as long as pi would have said what was logged."""

    trace_decay: float
    iterations: int
    own_only = False
    needs_ratios = True
    off_policy = True

    def fit(self, learner: Learner, data: Transitions) -> None:
        learner.fit(data.behaviour_returns, schedule="value")
        for _ in range(self.iterations):
            q, v = learner.values().q, learner.expected()
            target = retrace_targets(data.reward, data.last, q, v, data.log_ratio, data.gamma, self.trace_decay)
            learner.fit(data.of_fit(target), v, share=1 / self.iterations)
