"""Who answers a customer while an A/B test runs: sticky by its salt, at the share of the ramp's present stage."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from iterative_ppo.config import Config
from iterative_ppo.evaluation.ab_test import assign
from iterative_ppo.evaluation.ramp import Ramp
from tasks import experiments
from tasks.state import Experiment, NightState


@dataclass(frozen=True)
class Assigned:
    """The version that answers, and its arm; no arm where no test runs."""

    version: int
    arm: str | None = None


def assigned(config: Config, state: NightState, champion: int, unit: str, now: datetime) -> Assigned:
    """Who answers the conversation, or the business (`abtest.unit`), of this id."""
    tested = state.experiment
    if tested is None or champion != tested.champion:
        return Assigned(champion)
    arm = assign(unit, tested.salt, share_in_force(config, tested, now))
    return Assigned(tested.challenger if arm == "challenger" else champion, arm)


def share_in_force(config: Config, tested: Experiment, now: datetime) -> float:
    """The challenger's share now: of the ramp's stage; 0 once the test has ended or is halted."""
    halted = any(look["verdict"] == "halt" for look in tested.looks)
    if halted or experiments.verdicts(config.data.root, tested):
        return 0.0
    if tested.started is None:
        return config.abtest.challenger_share
    return Ramp.of(config.abtest).share(max(0.0, (now - tested.started).total_seconds() / 3600))
