"""Who answers a customer while an A/B test runs: sticky by its salt, at the share of the ramp's present stage."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from iterative_ppo.config import Config, ExplorationConfig
from iterative_ppo.evaluation.ab_test import assign, position
from iterative_ppo.evaluation.ramp import Ramp
from tasks import experiments
from tasks.state import Experiment, NightState

EXPLORES, PERSONA = "explores", "persona"
"""Salts: whether a conversation explores, and led by whom."""


@dataclass(frozen=True)
class Assigned:
    """The version that answers, its arm where a test runs, and the persona that leads it where it explores."""

    version: int
    arm: str | None = None
    persona: str | None = None


def assigned(config: Config, state: NightState, champion: int, unit: str, began: datetime | None = None) -> Assigned:
    """Who answers the conversation, or the business (`abtest.unit`), of this id.

    Args:
        began: when the conversation began. Its share is that of the ramp's stage of then, so that it keeps its arm
            while the ramp rises; the champion goes on with what began before the test. None: the ramp is over, as for
            simulated customers, who have no clock.
    """
    tested = state.experiment
    if tested is None or champion != tested.champion:
        return Assigned(champion, persona=persona_of(config.exploration, unit))
    arm = assign(unit, tested.salt, share_in_force(config, tested, began))
    return Assigned(tested.challenger if arm == "challenger" else champion, arm)


def persona_of(exploration: ExplorationConfig, unit: str) -> str | None:
    """The persona that leads a conversation, by the hash of its id, or None: the policy as it is."""
    if assign(unit, EXPLORES, exploration.share) == "champion":
        return None
    names = list(exploration.personas)
    return names[int(position(unit, PERSONA) * len(names))]


def share_in_force(config: Config, tested: Experiment, began: datetime | None = None) -> float:
    """The challenger's share of what began then; 0 once the test has ended or is halted: the champion takes over."""
    halted = any(look["verdict"] == "halt" for look in tested.looks)
    if halted or experiments.verdicts(config.data.root, tested):
        return 0.0
    if began is None or tested.started is None:
        return config.abtest.challenger_share
    hours = (began - tested.started).total_seconds() / 3600
    return Ramp.of(config.abtest).share(hours) if hours >= 0 else 0.0
