"""A few conversations of a simulator of the user's own: what is wrong with it is told before anything trains."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from iterative_ppo.config import Config
from iterative_ppo.environments.own import Scripted
from iterative_ppo.environments.rollout import Environment, Sampler, collect
from iterative_ppo.errors import IterativePPOError, SourceError, TurnTableError
from iterative_ppo.mdp.conversation import ABSTAIN, State, Suggestion
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
    try:
        if isinstance(world, Scripted):
            agents.append(world.script(config.seed))
        for agent in agents:
            _play(config, world, agent)
    except TurnTableError as error:
        raise SourceError(f"{config.source.path}: {error}") from None
    except IterativePPOError:
        raise
    except Exception as error:  # the user's own code raises what it likes
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise SourceError(
            f"{config.source.path}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno}), in a first "
            "conversation"
        ) from error


def _play(config: Config, world: Environment, agent: Sampler) -> None:
    talks = collect(agent, world, CONVERSATIONS, config.seed, "trial")
    if len(talks) != CONVERSATIONS:
        raise SourceError(f"{config.source.path}: start({CONVERSATIONS}, seed) returned {len(talks)} sessions")
    _, faults = sifted(to_rows(config, talks), config.outcomes)
    for talk, fault in faults.items():
        said = f"{len(faults)} of {CONVERSATIONS} first conversations are none, for example {talk}"
        raise SourceError(f"{config.source.path}: {said}, {fault}")
