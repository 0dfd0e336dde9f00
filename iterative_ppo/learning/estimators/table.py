"""Q as a table, for environments that can be enumerated: the referee of the estimators, exact where they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from iterative_ppo.learning.estimators.protocol import Features, Learner, Schedule, Transitions
from iterative_ppo.learning.q_model import Values
from iterative_ppo.mdp.returns import discounted_returns, rewards
from iterative_ppo.mdp.turn_table import last_rows


@dataclass
class Table:
    """Means of the targets in each cell; a cell without rows keeps what it has. A fit is one step.

    Attributes:
        policy: (S, A) pi. state: (N,) number of s_i, -1 in terminal rows. action: (N,) number of a_i, -1 where none.
        polyak: how far a target table follows in a step.
        q: (S, A). v: (S,).
    """

    policy: np.ndarray
    state: np.ndarray
    action: np.ndarray
    polyak: float = 0.1
    q: np.ndarray = field(init=False)
    v: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.q, self.v = np.zeros(self.policy.shape), np.zeros(len(self.policy))

    def copy(self) -> Table:
        return copy.deepcopy(self)

    def values(self) -> Values:
        q = np.where(self.action < 0, np.nan, self.q[self.state, self.action])
        return Values(self._of_state(self.v), q[:, None])

    def expected(self) -> np.ndarray:
        return self._of_state((self.policy * self.q).sum(axis=1))

    def fit(
        self,
        q: np.ndarray,
        v: np.ndarray | None = None,
        schedule: Schedule = "q",
        share: float = 1.0,
        target: Learner | None = None,
        expectile: float | None = None,
    ) -> None:
        wanted = q if v is None else v
        rows = np.isfinite(q[:, 0]) & (self.action >= 0)
        state, action = self.state[rows], self.action[rows]
        cell = np.ravel_multi_index((state, action), self.q.shape)
        self.q = _means(cell, q[rows, 0], self.q.ravel()).reshape(self.q.shape)
        self.v = _expectiles(state, wanted[rows, 0], self.v, 0.5 if expectile is None else expectile)
        if target is not None:
            assert isinstance(target, Table)
            target.q += self.polyak * (self.q - target.q)
            target.v += self.polyak * (self.v - target.v)

    def features(self) -> Features:
        cells = np.eye(self.q.size).reshape(*self.q.shape, -1)
        expected = np.einsum("sa,saf->sf", self.policy, cells)[self.state]
        logged = cells[self.state, self.action]
        return Features(*(np.where(self.action[:, None] < 0, 0.0, phi) for phi in (logged, expected)))

    def weights(self) -> np.ndarray:
        return np.ones((len(self.state), 1))

    def solve(self, weights: np.ndarray) -> None:
        self.q = weights[:, 0].reshape(self.q.shape)
        self.v = (self.policy * self.q).sum(axis=1)

    def _of_state(self, values: np.ndarray) -> np.ndarray:
        return np.where(self.action < 0, np.nan, values[self.state])[:, None]


def _means(cell: np.ndarray, values: np.ndarray, before: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    count = np.bincount(cell, weight, minlength=len(before))
    total = np.bincount(cell, values if weight is None else values * weight, minlength=len(before))
    return np.where(count > 0, total / np.where(count > 0, count, 1.0), before)


def _expectiles(cell: np.ndarray, values: np.ndarray, before: np.ndarray, expectile: float) -> np.ndarray:
    """The mean where what is above it weighs `expectile` and the rest 1 - expectile: found by repeating it."""
    found, last = _means(cell, values, before), np.full(len(before), np.nan)
    while expectile != 0.5 and not np.allclose(found, last, rtol=1e-12, atol=1e-15):
        weight = np.where(values > found[cell], expectile, 1 - expectile)
        found, last = _means(cell, values, before, weight), found
    return found


def enumerated(
    frame: pd.DataFrame,
    state_of: Callable[[str], int],
    actions: Sequence[str],
    policy: np.ndarray,
    gamma: float,
    own: np.ndarray | None = None,
) -> tuple[Table, Transitions]:
    """A turn table whose states and actions can be numbered, as an empty table and what estimators know of the log.

    Args:
        state_of: number of the state that a customer's message tells of. actions: all suggestions.
        policy: (S, A) pi. own: (N,) rows of pi's own conversations; None means all.
    """
    last = last_rows(frame)
    codes, messages = pd.factorize(frame["customer_message"].where(~last))
    state = np.append([state_of(message) for message in messages], -1)[codes].astype(int)
    action = pd.Index(actions).get_indexer(frame["suggestion"].where(~last))
    logprob = frame["behaviour_logprob"].to_numpy(dtype=float, na_value=np.nan)
    with np.errstate(divide="ignore"):
        log_ratio = np.where(action < 0, np.nan, np.log(policy)[state, action] - logprob)
    reward = rewards(frame)[:, None]
    data = Transitions(
        reward=reward,
        returns=discounted_returns(reward, last, gamma),
        last=last,
        own=np.ones(len(last), bool) if own is None else own,
        fit=np.ones(len(last), bool),
        logged=action >= 0,
        log_ratio=log_ratio,
        gamma=gamma,
    )
    return Table(policy, state, action), data
