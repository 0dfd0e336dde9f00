"""One-step targets from a Monte Carlo V: TD(lambda) with lambda = 0 and V in Q's place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iterative_ppo.learning.estimators.protocol import Learner, Transitions
from iterative_ppo.mdp.returns import lambda_returns


@dataclass(frozen=True)
class OneStep:
    """V of pi's own returns, then Q of r + gamma V(s') from every logged action, whoever chose it.

    P(s' | s, a) does not depend on the policy, so other policies' turns need no weights, as far as V is right in the
    states that they reached. V learns where an action was logged, and stands nowhere else: over a suggestion that is
    missing the return goes on.
    """

    own_only = False
    iterations = None
    needs_ratios = False
    off_policy = False

    def fit(self, learner: Learner, data: Transitions) -> None:
        critic = learner.copy()
        critic.fit(data.of_own(data.returns), schedule="value")
        v = np.where(data.logged[:, None], critic.values().v, np.nan)
        learner.fit(data.of_fit(lambda_returns(data.reward, data.last, v, data.gamma, trace_decay=0.0)))
