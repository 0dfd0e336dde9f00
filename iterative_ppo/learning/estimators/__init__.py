"""Estimators of Q^pi from logs, chosen by q.target."""

from __future__ import annotations

from iterative_ppo.config import QConfig
from iterative_ppo.learning.estimators.archer import ArCHer
from iterative_ppo.learning.estimators.fqe import FQE
from iterative_ppo.learning.estimators.lstd_q import LSTDQ
from iterative_ppo.learning.estimators.monte_carlo import MonteCarlo
from iterative_ppo.learning.estimators.one_step import OneStep
from iterative_ppo.learning.estimators.protocol import Estimator, Features, Learner, Transitions
from iterative_ppo.learning.estimators.retrace import Retrace
from iterative_ppo.learning.estimators.td_lambda import TDLambda

__all__ = ["Estimator", "Features", "Learner", "Transitions", "estimator_of"]


def estimator_of(config: QConfig) -> Estimator:
    """The estimator that q.target names."""
    made: dict[str, Estimator] = {
        "monte_carlo": MonteCarlo(),
        "one_step": OneStep(),
        "td_lambda": TDLambda(config.trace_decay, config.iterations),
        "sarsa": TDLambda(0.0, config.iterations),
        "fqe": FQE(config.iterations),
        "retrace": Retrace(config.trace_decay, config.iterations),
        "lstd_q": LSTDQ(config.ridge),
        "archer": ArCHer(config.iterations, config.expectile),
    }
    return made[config.target]
