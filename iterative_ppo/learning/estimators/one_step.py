"""One-step targets from a Monte Carlo V: TD(lambda) with lambda = 0 and V in Q's place."""

from __future__ import annotations

from dataclasses import dataclass

from iterative_ppo.learning.estimators.protocol import Learner, Transitions
from iterative_ppo.mdp.returns import one_step_targets


@dataclass(frozen=True)
class OneStep:
    """V of pi's own returns, then Q of r + gamma V(s') from every logged action, whoever chose it.

    P(s' | s, a) does not depend on the policy, so other policies' turns need no weights, as far as V is right in the
    states that they reached.
    """

    own_only = False
    iterations = None
    needs_ratios = False
    off_policy = False

    def fit(self, learner: Learner, data: Transitions) -> None:
        critic = learner.copy()
        critic.fit(data.of_own(data.returns), schedule="value")
        learner.fit(data.of_fit(one_step_targets(data.reward, data.last, critic.values().v, data.gamma)))
