"""Fitted Q evaluation (Le, Voloshin and Yue 2019, arXiv 1903.08738)."""

from __future__ import annotations

from dataclasses import dataclass

from iterative_ppo.learning.estimators.protocol import Learner, Transitions
from iterative_ppo.mdp.returns import one_step_targets


@dataclass(frozen=True)
class FQE:
    """Q of r + gamma E_pi Q(s', .) with the Q before it, from the log of any policy; at least a horizon's times."""

    iterations: int
    own_only = False
    needs_ratios = False
    off_policy = True

    def fit(self, learner: Learner, data: Transitions) -> None:
        learner.fit(data.behaviour_returns, schedule="value")
        for _ in range(self.iterations):
            v = learner.expected()
            target = one_step_targets(data.reward, data.last, v, data.gamma)
            learner.fit(data.of_fit(target), v, share=1 / self.iterations)
