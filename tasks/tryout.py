"""A few conversations of a simulator of the user's own: what is wrong with it is told before anything trains."""

from __future__ import annotations

from collections.abc import Sequence

from iterative_ppo.config import Config
from iterative_ppo.environments.own import Scripted, own_code, script_of
from iterative_ppo.environments.rollout import Environment, Sampler, collect
from iterative_ppo.errors import SourceError, TurnTableError
from iterative_ppo.mdp.conversation import ABSTAIN, State, Suggestion
from tasks.audit import audit_file
from tasks.traffic import environment, to_rows
from tasks.turn_checks import sifted

CONVERSATIONS = 20
HELLO = Suggestion("Hello.", "suggested")


class Stranger:
    """Abstains, or says what has nothing to do with the matter: what an untrained policy may do."""

    def sample(self, states: Sequence[State], seed: int) -> list[Suggestion]:
        return [HELLO if k % 2 else ABSTAIN for k in range(len(states))]


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
    talks = collect(agent, world, CONVERSATIONS, config.seed, "trial")
    try:
        _, faults = sifted(to_rows(config, talks), config.outcomes)
    except TurnTableError as error:
        raise SourceError(
            f"{config.source.path}: {error}; its outcomes are named by --set 'outcomes={{...}}'"
        ) from None
    for talk, fault in faults.items():
        count = f"{len(faults)} of the first {CONVERSATIONS} conversations break the rules"
        raise SourceError(f"{config.source.path}: {count}, for example {talk}: {fault}")
