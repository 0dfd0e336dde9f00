"""LSTD-Q (Lagoudakis and Parr 2003, section 6): the fixed point of FQE on frozen features, in one solve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iterative_ppo.learning.estimators.protocol import Learner, Transitions
from iterative_ppo.mdp.returns import one_step_targets

ROWS = 4096
"""Rows whose features are in memory at a time."""


@dataclass(frozen=True)
class LSTDQ:
    """w = (sum phi (phi - gamma (1 - d) phibar')^T + k I)^-1 sum phi r, phibar' = E_pi phi(s', .).

    s' is the next state in which an action was logged, r what is paid until then, gamma that of as many turns.
    """

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
        reward, following, discount = _to_the_next_logged(data)
        fit = np.flatnonzero(data.fit & data.logged)
        for begin in range(0, len(fit), ROWS):
            rows = fit[begin : begin + ROWS]
            phi = features.logged[rows].astype(float)
            temporal = phi - discount[rows, None] * features.expected[following[rows]]
            for h in range(heads):
                weighted = phi * weights[rows, h, None]
                moments[h] += weighted.T @ temporal
                products[h] += weighted.T @ reward[rows, h]
        learner.solve(np.linalg.solve(moments, products[..., None])[..., 0].T)


def _to_the_next_logged(data: Transitions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, H) what is paid until the next row with an action, (N,) that row, (N,) its discount, 0 where none follows."""
    known = np.where(data.logged, 0.0, np.nan)
    paid = one_step_targets(data.reward, data.last, np.broadcast_to(known[:, None], data.reward.shape), data.gamma)
    discount = one_step_targets(np.zeros(len(known)), data.last, known + 1.0, data.gamma)
    logged = np.flatnonzero(data.logged)
    place = np.searchsorted(logged, np.arange(len(known)), side="right")
    return paid, logged[np.minimum(place, len(logged) - 1)], discount
