"""ArCHer's critic, the named rival (Zhou et al. 2024, arXiv 2402.19446, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from iterative_ppo.learning.estimators.protocol import Learner, Transitions
from iterative_ppo.mdp.returns import one_step_targets


@dataclass(frozen=True)
class ArCHer:
    """Two heads: Q of r + gamma Vbar(s'), V of E_pi Qbar(s, .), the bars a target network that follows by Polyak."""

    iterations: int
    own_only = False
    needs_ratios = False
    off_policy = True

    def fit(self, learner: Learner, data: Transitions) -> None:
        learner.fit(data.behaviour_returns, schedule="value")
        target = learner.copy()
        for _ in range(self.iterations):
            y = one_step_targets(data.reward, data.last, target.values().v, data.gamma)
            learner.fit(data.of_fit(y), target.expected(), share=1 / self.iterations, target=target)
