"""LSTD-Q (Lagoudakis and Parr 2003, section 6): the fixed point of FQE on frozen features, in one solve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iterative_ppo.learning.estimators.protocol import Learner, Transitions
from iterative_ppo.mdp.returns import following

ROWS = 4096
"""Rows whose features are in memory at a time."""


@dataclass(frozen=True)
class LSTDQ:
    """w = (sum phi (phi - gamma (1 - d) phibar')^T + k I)^-1 sum phi r, phibar' = E_pi phi(s', .)."""

    ridge: float
    own_only = False
    iterations = None
    needs_ratios = False
    off_policy = True

    def fit(self, learner: Learner, data: Transitions) -> None:
        features, weights = learner.features(), learner.weights()
        width, heads = features.logged.shape[1], data.reward.shape[1]
        moments = np.tile(self.ridge * np.eye(width), (heads, 1, 1))
        products = np.zeros((heads, width))
        for begin in range(0, len(data.last), ROWS):
            block, and_next = slice(begin, begin + ROWS), slice(begin, begin + ROWS + 1)
            rows = (data.fit & data.logged)[block]
            phi = features.logged[block][rows].astype(float)
            ahead = following(features.expected[and_next].astype(float), data.last[and_next])[:ROWS]
            temporal = phi - data.gamma * ahead[rows]
            for h in range(heads):
                weighted = phi * weights[block][rows, h, None]
                moments[h] += weighted.T @ temporal
                products[h] += weighted.T @ data.reward[block][rows, h]
        learner.solve(np.linalg.solve(moments, products[..., None])[..., 0].T)
