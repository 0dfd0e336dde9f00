"""LSTD-Q (Lagoudakis and Parr 2003, section 6): the fixed point of FQE on frozen features, in one solve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iterative_ppo.learning.estimators.protocol import Learner, Transitions
from iterative_ppo.mdp.returns import following


@dataclass(frozen=True)
class LSTDQ:
    """w = (sum phi (phi - gamma (1 - d) phibar')^T + k I)^-1 sum phi r, phibar' = E_pi phi(s', .)."""

    ridge: float
    own_only = False
    needs_ratios = False
    off_policy = True

    def fit(self, learner: Learner, data: Transitions) -> None:
        features = learner.features()
        ahead = data.gamma * following(features.expected, data.last)
        rows = data.fit & data.logged
        phi = features.logged[rows].astype(float)
        temporal = phi - ahead[rows]
        reward, weight = data.reward[rows], learner.weights()[rows]
        penalty = self.ridge * np.eye(phi.shape[1])
        solved = [
            np.linalg.solve((phi * weight[:, [h]]).T @ temporal + penalty, phi.T @ (weight[:, h] * reward[:, h]))
            for h in range(reward.shape[1])
        ]
        learner.solve(np.stack(solved, axis=1))
