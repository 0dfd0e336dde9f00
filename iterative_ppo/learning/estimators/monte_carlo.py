"""The paper's policy evaluation: Q regressed on Monte Carlo returns (Observation 2)."""

from __future__ import annotations

from dataclasses import dataclass

from iterative_ppo.learning.estimators.protocol import Learner, Transitions


@dataclass(frozen=True)
class MonteCarlo:
    """E[G | s, a] of pi's own conversations: unbiased without any bootstrap, and of the greatest variance."""

    own_only = True
    iterations = None
    needs_ratios = False
    off_policy = False

    def fit(self, learner: Learner, data: Transitions) -> None:
        learner.fit(data.of_own(data.returns))
