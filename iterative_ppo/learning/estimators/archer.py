"""ArCHer's critic, the named rival (Zhou et al. 2024, arXiv 2402.19446, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from iterative_ppo.learning.estimators.protocol import Learner, Transitions
from iterative_ppo.mdp.returns import one_step_targets


@dataclass(frozen=True)
class ArCHer:
    """Two heads: Q of r + gamma Vbar(s'), V of E_pi Qbar(s, .), the bars a target network that follows by Polyak.

    Attributes:
        expectile: V is that expectile of Qbar(s, a) over the logged actions instead: its offline form, by implicit
            Q-learning (Kostrikov et al. 2021, arXiv 2110.06169, equation 5). .5 makes it Q of who wrote the log.
    """

    iterations: int
    expectile: float | None = None
    own_only = False
    needs_ratios = False

    @property
    def off_policy(self) -> bool:
        return self.expectile is None

    def fit(self, learner: Learner, data: Transitions) -> None:
        learner.fit(data.behaviour_returns, schedule="value")
        target, share = learner.copy(), 1 / self.iterations
        for _ in range(self.iterations):
            seen = target.values()
            y = data.of_fit(one_step_targets(data.reward, data.last, seen.v, data.gamma))
            v = target.expected() if self.expectile is None else seen.q
            learner.fit(y, v, share=share, target=target, expectile=self.expectile)
