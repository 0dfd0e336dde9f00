"""A Suggested Response MDP small enough to solve exactly: the referee of everything that is estimated elsewhere.

The customer is at some progress towards buying and has some patience left; both are written in the customer's message,
so the last message is the whole state. The agent suggests a question, suggests closing, or abstains; the business sends
that, sends an edit of it, writes something of its own, or falls silent. Closing early pays at once, though rarely, and
costs patience: who maximises the next outcome alone does badly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import cast

import numpy as np

from iterative_ppo.mdp.conversation import ADOPTIONS, Adoption, Conversation, Suggestion, SuggestionStatus, Turn

ACTIONS = ("ask", "close", "")
"""Texts of the A = 3 suggestions; the last one is the decision to abstain."""
OWN_MESSAGE = "hello"
ABSTAIN = len(ACTIONS) - 1
OWN = len(ACTIONS) - 1
"""Messages m have the actions' numbers; the last one is the business's own, sent after a rejection or an abstention."""
REJECTED, NO_REPLY = ADOPTIONS.index("rejected"), ADOPTIONS.index("no_reply")

_STATE = re.compile(r"progress (\d+) patience (\d+)")
_CLOSING = (0.04, 0.08, 0.15, 0.35, 0.8)
_ADOPTED = ((0.62, 0.2, 0.15, 0.03), (0.7, 0.1, 0.17, 0.03), (0.0, 0.0, 0.95, 0.05))
_STEPS = (
    ((0.5, 1, 0), (0.32, 1, -1), (0.1, 0, -1), (0.05, 0, 0)),
    ((0.5, 0, -1), (0.5, 0, -2)),
    ((0.45, 0, 1), (0.15, 1, 0), (0.3, 0, 0)),
)
"""For each message: (probability, step in progress, step in patience); what is missing to 1 leaves."""


def greedy(q: np.ndarray) -> np.ndarray:
    """(S, A) the deterministic policy that takes argmax_a q(s, a), the first of equals."""
    return np.eye(q.shape[1])[q.argmax(axis=1)]


@dataclass(frozen=True, eq=False)
class Chain:
    """Kernels of a conversation MDP over S = progress x patience states; success and failure end it.

    Attributes:
        patience: number of patience levels, 1 to `patience`; state = progress * patience + (level - 1).
        start: (S,) P_0.
        business: (A, 4) P(adoption | a), columns as in ADOPTIONS; the fourth is silence, which ends the conversation.
        customer: (S, M, S + 2) P(s' | s, m); the last two columns are success (o = 1) and failure.
    """

    patience: int
    start: np.ndarray
    business: np.ndarray
    customer: np.ndarray

    def __post_init__(self) -> None:
        for field in fields(self):
            kernel = getattr(self, field.name)
            if isinstance(kernel, np.ndarray):
                _stochastic(kernel, field.name)
                kernel.setflags(write=False)

    @classmethod
    def default(cls) -> Chain:
        """Five steps of progress, three levels of patience: 15 states, conversations of about five turns."""
        progress, patience = len(_CLOSING), 3
        customer = np.zeros((progress * patience, len(_STEPS), progress * patience + 2))
        for state in range(progress * patience):
            for message in range(len(_STEPS)):
                customer[state, message] = _reply(state, message, progress, patience)
        start = np.zeros(progress * patience)
        start[:patience] = (0.2, 0.3, 0.5)
        return cls(patience, start, np.array(_ADOPTED), customer)

    @property
    def states(self) -> int:
        """S."""
        return len(self.start)

    @cached_property
    def message(self) -> np.ndarray:
        """(A, M) P(m | a) of Eq. 2; rows sum to one less the probability of silence."""
        verbatim, edited, rejected, _ = self.business.T
        sent = np.diag(verbatim + edited)
        sent[:, OWN] += rejected
        sent.setflags(write=False)
        return sent

    @cached_property
    def _arrival(self) -> np.ndarray:
        """(S, A, S + 2) P(s' | s, a) = sum_m P(s' | s, m) P(m | a) (Eq. 2), terminal states included."""
        arrival = np.einsum("am,smt->sat", self.message, self.customer)
        arrival[:, :, -1] += self.business[:, -1]
        arrival.setflags(write=False)
        return arrival

    @property
    def transition(self) -> np.ndarray:
        """(S, A, S) P(s' | s, a) between states; what is missing to 1 ends the conversation."""
        return self._arrival[:, :, : self.states]

    @property
    def reward(self) -> np.ndarray:
        """(S, A) E[o_{i+1} | s_i, a_i], the outcome on arrival: the probability of success in this very turn."""
        return self._arrival[:, :, self.states]

    def uniform(self) -> np.ndarray:
        """(S, A) the policy without preferences."""
        return np.full(self.reward.shape, 1 / len(ACTIONS))

    def visits(self, policy: np.ndarray, gamma: float) -> np.ndarray:
        """(S, S) sum_t gamma^t P(s_t = s' | s_0 = s, pi): d_{s_0} of Eq. 3 over 1 - gamma. gamma = 1 is allowed."""
        moves = np.einsum("sa,sat->st", self._policy(policy), self.transition)
        return np.linalg.inv(np.eye(self.states) - gamma * moves)

    def v_pi(self, policy: np.ndarray, gamma: float) -> np.ndarray:
        """(S,) V^pi, the solution of V = r_pi + gamma P_pi V."""
        return self.visits(policy, gamma) @ (policy * self.reward).sum(axis=1)

    def q_pi(self, policy: np.ndarray, gamma: float) -> np.ndarray:
        """(S, A) Q^pi(s, a) = r(s, a) + gamma sum_s' P(s' | s, a) V^pi(s')."""
        return self.reward + gamma * self.transition @ self.v_pi(policy, gamma)

    def value(self, policy: np.ndarray, gamma: float) -> float:
        """E[V^pi(s_1)], s_1 ~ P_0; with gamma = 1 the share of conversations that end in success."""
        return float(self.start @ self.v_pi(policy, gamma))

    def optimal(self, gamma: float) -> tuple[np.ndarray, np.ndarray]:
        """((S,) V*, (S, A) Q*) by exact policy iteration; `greedy` of Q* is an optimal policy."""
        q = self.q_pi(self.uniform(), gamma)
        while True:
            better = self.q_pi(greedy(q), gamma)
            if np.abs(better - q).max() <= 1e-13:
                return better.max(axis=1), better
            q = better

    def text(self, state: int) -> str:
        """The customer's message in a state."""
        return f"progress {state // self.patience} patience {state % self.patience + 1}"

    def state_of(self, message: str) -> int:
        """The state that a customer's message tells of. Raises ValueError for any other text."""
        match = _STATE.fullmatch(message)
        progress, level = map(int, match.groups()) if match else (0, 0)
        state = progress * self.patience + level - 1
        if not (1 <= level <= self.patience and state < self.states):
            raise ValueError(f"{message!r} is no message of this chain, expected such as {self.text(0)!r}")
        return state

    def sample(
        self, policy: np.ndarray, conversations: int, seed: int, policy_version: str = "chain"
    ) -> list[Conversation]:
        """Conversations under `policy` (S, A), log pi(a | s) logged with each action; ids hold version and seed."""
        turns = self._turns(self._policy(policy))
        told: list[list[Turn]] = [[] for _ in range(conversations)]
        for rows, codes in self._rollout(policy, conversations, np.random.default_rng(seed)):
            for row, code in zip(rows.tolist(), codes.tolist(), strict=True):
                told[row].append(turns[code])
        names = [f"{seed}-{n:06d}" for n in range(conversations)]
        return [
            Conversation(f"{policy_version}-{name}", tuple(talk), f"customer-{name}", policy_version=policy_version)
            for name, talk in zip(names, told, strict=True)
        ]

    def _rollout(
        self, policy: np.ndarray, conversations: int, rng: np.random.Generator
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All conversations a turn at a time: (numbers of those that have this turn, numbers of their turns)."""
        shape, talk = (self.states, *self.business.shape), np.arange(conversations)
        state = _draw(np.tile(self.start, (conversations, 1)), rng)
        while len(talk):
            action = _draw(policy[state], rng)
            adoption = _draw(self.business[action], rng)
            yield talk, np.ravel_multi_index((state, action, adoption), shape)
            arrival = _draw(self.customer[state, np.where(adoption < REJECTED, action, OWN)], rng)
            arrival = np.where(adoption == NO_REPLY, self.states + 1, arrival)
            ended = arrival >= self.states
            yield talk[ended], math.prod(shape) + arrival[ended] - self.states
            talk, state = talk[~ended], arrival[~ended]

    def _turns(self, policy: np.ndarray) -> list[Turn]:
        """All turns there are, numbered by (state, action, adoption); the last two are success and failure."""
        turns = [self._turn(s, a, k, float(policy[s, a])) for s, a, k in np.ndindex(self.states, *self.business.shape)]
        return [*turns, Turn("deal", (1.0,)), Turn(None, (0.0,))]

    def _turn(self, state: int, action: int, adoption: int, probability: float) -> Turn:
        status: SuggestionStatus = "abstained" if action == ABSTAIN else "suggested"
        logprob = math.log(probability) if probability > 0 else -math.inf
        sent = (ACTIONS[action], f"{ACTIONS[action]}, please", OWN_MESSAGE, None)[adoption]
        kind = None if action == ABSTAIN and adoption != NO_REPLY else ADOPTIONS[adoption]
        return Turn(self.text(state), (0.0,), Suggestion(ACTIONS[action], status, logprob), sent, cast(Adoption, kind))

    def _policy(self, policy: np.ndarray) -> np.ndarray:
        if policy.shape != (self.states, len(ACTIONS)):
            raise ValueError(f"policy has shape {policy.shape}, expected {(self.states, len(ACTIONS))}")
        return _stochastic(policy, "policy")


def _stochastic(kernel: np.ndarray, name: str) -> np.ndarray:
    """`kernel`, whose last axis is a distribution; raises ValueError where it is not."""
    if kernel.min() < 0 or not np.allclose(kernel.sum(axis=-1), 1.0, rtol=0, atol=1e-9):
        raise ValueError(f"{name}: probabilities must be at least 0 and sum to 1 along the last axis")
    return kernel


def _draw(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) one index from each row of (N, K) probabilities."""
    edges = probabilities.cumsum(axis=1)
    return (edges / edges[:, -1:] <= rng.random((len(edges), 1))).sum(axis=1)


def _reply(state: int, message: int, progress: int, patience: int) -> np.ndarray:
    """(S + 2,) P(s' | s, m) of the default chain."""
    reply = np.zeros(progress * patience + 2)
    step, level = divmod(state, patience)
    reply[-2] = _CLOSING[step] if ACTIONS[message] == "close" else 0.0
    for probability, forward, mood in _STEPS[message]:
        left = level + mood
        arrival = min(step + forward, progress - 1) * patience + min(left, patience - 1)
        reply[arrival if left >= 0 else -1] += probability * (1 - reply[-2])
    reply[-1] += max(0.0, 1 - reply.sum())
    return reply
