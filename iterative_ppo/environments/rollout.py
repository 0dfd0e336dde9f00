"""Batched conversations: every open conversation of a round takes its next turn together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from iterative_ppo.errors import SourceError
from iterative_ppo.mdp.conversation import Conversation, State, Suggestion, Turn

MOST_TURNS = 1000
"""No conversation is that long: an environment that has one open still would never come to an end."""


class Session(Protocol):
    """A conversation under way."""

    turns: list[Turn]
    closed: bool

    @property
    def state(self) -> State: ...

    def step(self, suggestion: Suggestion) -> None: ...


class Environment(Protocol):
    """Where conversations happen: a simulator here, live traffic elsewhere."""

    def start(self, conversations: int, seed: int) -> Sequence[Session]: ...

    def business_of(self, k: int) -> str: ...


class Sampler(Protocol):
    """The part of a policy that a conversation needs."""

    def sample(self, states: Sequence[State], seed: int) -> list[Suggestion]: ...


def play(
    policy: Sampler, sessions: Sequence[Session], seed: int, progress: Callable[[int], None] | None = None
) -> None:
    """Advance all sessions to their end; `progress` is told how many have closed so far.

    Raises SourceError where some are still open after MOST_TURNS.
    """
    turn = 0
    while open_ := [session for session in sessions if not session.closed]:
        if turn == MOST_TURNS:
            raise SourceError(
                f"{len(open_)} of {len(sessions)} conversations are still open after {turn} turns; the environment "
                "must close each one"
            )
        if progress:
            progress(len(sessions) - len(open_))
        suggestions = policy.sample([session.state for session in open_], seed=seed * 1000 + turn)
        for session, suggestion in zip(open_, suggestions, strict=True):
            session.step(suggestion)
        turn += 1
    if progress:
        progress(len(sessions))


@dataclass(frozen=True)
class Customer:
    """A customer whose conversation is about to begin, whoever is going to answer."""

    conversation_id: str
    business_id: str
    session: Session


def customers(environment: Environment, conversations: int, seed: int, prefix: str) -> list[Customer]:
    """New customers in the order in which they come; `prefix` begins the ids of their conversations.

    Raises SourceError where the environment starts another number of conversations.
    """
    sessions = environment.start(conversations, seed)
    if len(sessions) != conversations:
        raise SourceError(f"the environment's start({conversations}, seed) returned {len(sessions)} sessions")
    return [Customer(f"{prefix}-{k:06d}", environment.business_of(k), one) for k, one in enumerate(sessions)]


def serve(
    policy: Sampler,
    served: Sequence[Customer],
    seed: int,
    policy_version: str,
    arm: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Conversation]:
    """Let `policy` answer some customers, and log what happened.

    Raises SourceError where a conversation never ends, or ends before it begins.
    """
    play(policy, [one.session for one in served], seed, progress)
    if empty := [one.conversation_id for one in served if not one.session.turns]:
        raise SourceError(f"{len(empty)} of {len(served)} conversations are closed without a turn, such as {empty[0]}")
    return [
        Conversation(
            conversation_id=one.conversation_id,
            turns=tuple(one.session.turns),
            customer_id=f"customer-{one.conversation_id}",
            business_id=one.business_id,
            policy_version=policy_version,
            arm=arm,
        )
        for one in served
    ]


def collect(
    policy: Sampler,
    environment: Environment,
    conversations: int,
    seed: int,
    policy_version: str,
    arm: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Conversation]:
    """Line 4 of Algorithm 1: deploy `policy` on new customers and log what happened."""
    prefix = f"{policy_version}-{arm or 'collect'}-{seed}"
    return serve(policy, customers(environment, conversations, seed, prefix), seed, policy_version, arm, progress)
