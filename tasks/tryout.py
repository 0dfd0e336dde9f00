"""A few conversations of a simulator of the user's own: what is wrong with it is told before anything trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from iterative_ppo.config import Config
from iterative_ppo.environments.own import Scripted, own_code, script_of
from iterative_ppo.environments.rollout import Environment, Sampler, collect
from iterative_ppo.errors import SourceError, TurnTableError
from iterative_ppo.mdp.conversation import ABSTAIN, Conversation, State, Suggestion
from iterative_ppo.sources.log import short
from tasks.audit import audit_file
from tasks.traffic import environment, ranges_to_set, to_rows
from tasks.turn_checks import sifted

CONVERSATIONS = 20
HELLO = Suggestion("Hello.", "suggested")


class Stranger:
    """Abstains, or says what has nothing to do with the matter: what an untrained policy may do."""

    def sample(self, states: Sequence[State], seed: int) -> list[Suggestion]:
        return [HELLO if k % 2 else ABSTAIN for k in range(len(states))]


@dataclass(frozen=True)
class Reader:
    """An agent that is asked only about states that a policy can read. Raises SourceError for another."""

    agent: Sampler
    reference: str

    def sample(self, states: Sequence[State], seed: int) -> list[Suggestion]:
        for state in states:
            if not isinstance(state, State):
                raise SourceError(f"{self.reference}: state of an open session: expected a State, found {short(state)}")
            for field, kind, name in (("customer_message", str, "text"), ("context", str | None, "text or None")):
                if not isinstance(found := getattr(state, field), kind):
                    place = f"{self.reference}: {field} in the state of an open session"
                    raise SourceError(f"{place}: expected {name}, found {short(found)}")
        return self.agent.sample(states, seed)


def try_out(config: Config) -> None:
    """Play some conversations of the simulator, and check them as a night's are.

    Raises ConfigError where it is not there, and SourceError where its conversations are none, or, with the line of its
    own code, where that fails.
    """
    world = environment(config)
    if config.source.kind != "environment":
        return
    agents: list[Sampler] = [Stranger()]
    with own_code(str(config.source.path)):
        if isinstance(world, Scripted) or needs_a_corpus(config):
            agents.append(script_of(world, config.seed))
        for agent in agents:
            _play(config, world, agent)


def needs_a_corpus(config: Config) -> bool:
    """Whether pi_0 is still to be fine-tuned: no champion has been named yet."""
    return config.policy.fine_tuned and not audit_file(config.data.root).exists()


def _play(config: Config, world: Environment, agent: Sampler) -> None:
    talks = collect(Reader(agent, str(config.source.path)), world, CONVERSATIONS, config.seed, "trial")
    for talk in talks:
        _check_outcomes(config, talk)
    try:
        _, faults = sifted(to_rows(config, talks), config.outcomes)
    except TurnTableError as error:
        raise SourceError(f"{config.source.path}: {error}") from None
    for name, fault in faults.items():
        count = f"{len(faults)} of the first {CONVERSATIONS} conversations break the rules"
        raise SourceError(f"{config.source.path}: {count}, for example {name}: {fault}")


def _check_outcomes(config: Config, talk: Conversation) -> None:
    for number, turn in enumerate(talk.turns, start=1):
        place = f"{config.source.path}: conversation {talk.conversation_id}, turn {number}"
        if len(turn.outcomes) != len(config.outcomes):
            expected = f"{len(turn.outcomes)} outcomes, expected {len(config.outcomes)} ({', '.join(config.outcomes)})"
            raise SourceError(f"{place}: {expected}; its outcomes are named by --set 'outcomes={{...}}'")
        for name, value in zip(config.outcomes, turn.outcomes, strict=True):
            low, high = config.data.range_of(name)
            if not isinstance(value, Real) or math.isnan(value):
                raise SourceError(f"{place}, outcome {name!r}: expected a number, found {short(value)}")
            if not low <= value <= high:
                expected = f"expected {low:g} to {high:g}, found {short(value)}"
                raise SourceError(f"{place}, outcome {name!r}: {expected}; {ranges_to_set(name)}")
