"""Champions and challengers on the enumerable chain, and what their logs hold, a million turns in a second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from iterative_ppo.environments.chain import Chain
from iterative_ppo.evaluation.ope import LoggedTurns

GAMMA = 0.95
CHAIN = Chain.default()


def improved(policy: np.ndarray, kl: float, sign: float = 1.0) -> np.ndarray:
    """(S, A) better than `policy` by its exact Q, at a mean KL(pi' || pi) of `kl` over its states or near it.

    `sign` -1 makes it worse instead.
    """
    return tilted_by(policy, sign * CHAIN.q_pi(policy, GAMMA), kl)


def tilted_by(policy: np.ndarray, q: np.ndarray, kl: float) -> np.ndarray:
    """(S, A) pi' ~ pi exp(k Q), k such that the mean KL is `kl` or near it."""
    advantage = q - (policy * q).sum(axis=1, keepdims=True)
    low, high = 1e-3, 1e5
    for _ in range(80):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if divergence(_tilted(policy, advantage, middle), policy) < kl else (low, middle)
    return _tilted(policy, advantage, low)


def _tilted(policy: np.ndarray, advantage: np.ndarray, factor: float) -> np.ndarray:
    logits = np.log(policy) + factor * advantage
    weights = np.maximum(np.exp(logits - logits.max(axis=1, keepdims=True)), 1e-12)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def divergence(challenger: np.ndarray, policy: np.ndarray) -> float:
    """Mean KL(challenger || policy) over the policy's own states, nats a response."""
    visits = CHAIN.start @ CHAIN.visits(policy, 1.0)
    return float(visits / visits.sum() @ (challenger * np.log(challenger / policy)).sum(axis=1))


def explored(policy: np.ndarray, share: float) -> np.ndarray:
    """`policy`, a share of the time uniform: sampling at temperature 1 leaves every action its chance."""
    return (1 - share) * policy + share / policy.shape[1]


def behaviours() -> dict[str, np.ndarray]:
    """Champions of the first rounds; the later, the rarer their least likely actions (1/3, 1/30, 1/100)."""
    first = CHAIN.uniform()
    second = explored(improved(first, 0.4), 0.1)
    return {"round 0": first, "round 1": second, "round 2": explored(improved(second, 0.3), 0.03)}


@dataclass(frozen=True)
class Log:
    """Conversations of a behaviour on the chain as flat turns: states, actions, rewards and last turns, each (N,)."""

    behaviour: np.ndarray
    state: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    last: np.ndarray

    @classmethod
    def sample(cls, behaviour: np.ndarray, conversations: int, seed: int) -> Log:
        rng = np.random.default_rng(seed)
        won = CHAIN.reward[:, :, None]
        moves = np.concatenate([CHAIN.transition, won, 1 - CHAIN.transition.sum(2, keepdims=True) - won], axis=2)
        talk, turns = np.arange(conversations), []
        state = _drawn(np.broadcast_to(CHAIN.start, (conversations, CHAIN.states)), rng)
        while len(talk):
            action = _drawn(behaviour[state], rng)
            arrival = _drawn(moves[state, action], rng)
            goes_on = arrival < CHAIN.states
            turns.append((talk, state, action, (arrival == CHAIN.states).astype(float), ~goes_on))
            talk, state = talk[goes_on], arrival[goes_on]
        columns = [np.concatenate(column) for column in zip(*turns, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        return cls(behaviour, *(column[order] for column in columns[1:]))

    @cached_property
    def ends(self) -> np.ndarray:
        return np.flatnonzero(self.last) + 1

    def parts(self, conversations: int) -> Iterator[slice]:
        """Rows of successive sets of so many conversations."""
        bounds = np.append(0, self.ends[conversations - 1 :: conversations])
        return (slice(begin, end) for begin, end in pairwise(bounds))

    def turns(self, challenger: np.ndarray, q: np.ndarray, v: np.ndarray, sampled: np.ndarray) -> LoggedTurns:
        """What the gate would know: `q` (S, A), `v` (S,), and `sampled` (N,) mean Q of the challenger's samples."""
        with np.errstate(divide="ignore"):
            log_ratio = np.log(challenger / self.behaviour)[self.state, self.action]
        return LoggedTurns(
            self.last,
            self.reward,
            log_ratio,
            v[self.state],
            q[self.state, self.action],
            sampled,
            GAMMA,
            0.0,
            1.0,
        )


def _drawn(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    edges = probabilities.cumsum(axis=1)
    return np.asarray((edges[:, :-1] <= rng.random((len(edges), 1)) * edges[:, -1:]).sum(axis=1))


def fitted_q(log: Log, challenger: np.ndarray, prior: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """(Q, V) of `challenger` by FQE on tables from a log of its own: with the behaviour itself, its Q and V.

    The fixed point of y = r + gamma E_pi' Q(s', .) under the counted kernel; `prior` visits draw a cell to its state.
    """
    cells, states = CHAIN.reward.size, CHAIN.states
    cell = log.state * CHAIN.reward.shape[1] + log.action
    count = np.bincount(cell, minlength=cells)
    following = np.append(log.state[1:], 0)
    moves = np.zeros((cells, states))
    np.add.at(moves, (cell[~log.last], following[~log.last]), 1.0)
    reward = np.bincount(cell, weights=log.reward, minlength=cells)
    by_state = np.repeat(np.eye(states), CHAIN.reward.shape[1], axis=0)
    share = by_state @ by_state.T / np.maximum(by_state @ by_state.T @ count, 1)[:, None]
    total = (count + prior)[:, None]
    moves, reward = (moves + prior * share @ moves) / total, (reward + prior * share @ reward) / total[:, 0]
    expect = np.zeros((states, cells))
    expect[np.arange(states).repeat(CHAIN.reward.shape[1]), np.arange(cells)] = challenger.ravel()
    q = np.linalg.solve(np.eye(cells) - GAMMA * moves @ expect, reward).reshape(CHAIN.reward.shape)
    return q, (challenger * q).sum(axis=1)


def sampled_q(log: Log, challenger: np.ndarray, q: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(N,) mean of Q over `samples` actions of the challenger in each state."""
    rng = np.random.default_rng(seed)
    draws = [q[log.state, _drawn(challenger[log.state], rng)] for _ in range(samples)]
    return np.asarray(np.mean(draws, axis=0))
