"""TD(lambda) and SARSA: returns cut short by Q of the logged actions (Sutton and Barto 2018, chapters 6 and 12)."""

from __future__ import annotations

from dataclasses import dataclass

from iterative_ppo.learning.estimators.protocol import Learner, Transitions
from iterative_ppo.mdp.returns import lambda_returns


@dataclass(frozen=True)
class TDLambda:
    """Q of the policy that wrote the conversations, so pi's own serve it. SARSA is trace_decay = 0.

    Each iteration fits to targets from the Q before it, which stands still meanwhile.
    """

    trace_decay: float
    iterations: int
    own_only = True
    needs_ratios = False
    off_policy = False

    def fit(self, learner: Learner, data: Transitions) -> None:
        learner.fit(data.of_own(data.returns), schedule="value")
        for _ in range(self.iterations):
            q = learner.values().q
            target = lambda_returns(data.reward, data.last, q, data.gamma, self.trace_decay)
            learner.fit(data.of_own(target), share=1 / self.iterations)
