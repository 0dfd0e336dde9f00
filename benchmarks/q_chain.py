"""Every estimator as a table on the enumerable chain: its error to the exact Q, and how that falls with n."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd

from benchmarks.q_cells import TARGETS, Row, cell, row, sections
from benchmarks.results_file import figure, jackknifed
from iterative_ppo.config import Config, load_config
from iterative_ppo.environments.chain import ACTIONS, Chain, greedy
from iterative_ppo.mdp.turn_table import to_frame

ON_POLICY = ("monte_carlo", "td_lambda", "sarsa")
GAMMA, SIZES = 0.95, (500, 2000, 8000)
CHAIN = Chain.default()
BEHAVIOUR = np.random.default_rng(7).dirichlet(np.full(len(ACTIONS), 3.0), CHAIN.states)
POLICY = 0.7 * greedy(CHAIN.optimal(GAMMA)[1]) + 0.3 * CHAIN.uniform()
WORLD = [GAMMA, *(known.tolist() for known in (BEHAVIOUR, POLICY, CHAIN.q_pi(BEHAVIOUR, GAMMA)))]
"""By which a cell knows the chain and both policies."""


@cache
def chain_log(conversations: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Conversations of the behaviour, and of the policy whose Q is sought."""
    pairs = ((BEHAVIOUR, "behaviour"), (POLICY, "policy"))
    behaviour, policy = (
        to_frame(CHAIN.sample(said, conversations, 1000 * k + seed, name), {"purchase": 1.0}, 0.2)
        for k, (said, name) in enumerate(pairs)
    )
    return behaviour, policy


def settings_of(target: str) -> Config:
    steps, loss = {"archer": 400}.get(target, 60), "mse" if target == "lstd_q" else "bce"
    return load_config(None, {"q.target": target, "q.iterations": steps, "q.ridge": 1e-3, "q.loss": loss})


def chain_errors(target: str, seed: int) -> dict[str, float]:
    """Root mean square error of a tabular Q over the behaviour's visits, by the number of conversations."""
    from iterative_ppo.learning.estimators import estimator_of
    from iterative_ppo.learning.estimators.table import enumerated

    sought = BEHAVIOUR if target in ON_POLICY else POLICY
    exact, visits = CHAIN.q_pi(sought, GAMMA), (CHAIN.start @ CHAIN.visits(BEHAVIOUR, 1.0))[:, None] * BEHAVIOUR
    errors = {}
    for size in SIZES:
        frame, own = chain_log(size, seed)
        mine = None
        if target == "one_step":
            mine = np.arange(len(own) + len(frame)) < len(own)
            frame = pd.concat([own, frame], ignore_index=True)
        table, data = enumerated(frame, CHAIN.state_of, ACTIONS, sought, GAMMA, mine)
        estimator_of(settings_of(target).q).fit(table, data)
        errors[str(size)] = float(np.sqrt((visits * (table.q - exact) ** 2).sum() / visits.sum()))
    return errors


def chain(seeds: Sequence[int]) -> list[Row]:
    """The error at each size, and how it falls with it."""
    rows = []
    for target in TARGETS:
        known = [SIZES, WORLD, sections(settings_of(target), "q")]
        found = [cell("chain", target, seed, known, lambda t=target, s=seed: chain_errors(t, s)) for seed in seeds]
        whose = "the behaviour's Q" if target in ON_POLICY else "the policy's Q from the behaviour's log"
        rows += [row(f"chain, {target}, error to {whose}, {n} conversations", found, str(n)) for n in SIZES]
        slope, low, high = jackknifed(_slope, np.array([[f[str(n)] for n in SIZES] for f in found]))
        near = -0.65 < slope < -0.35
        rows.append(figure(f"chain, {target}, slope of log error", slope, (low, high), "-.65 to -.35", near, seeds))
    return rows


def _slope(errors: np.ndarray) -> float:
    """Of the root mean square error over seeds, (N, sizes), against the size, both as logs."""
    return float(np.polyfit(np.log(SIZES), np.log((errors**2).mean(axis=0)) / 2, 1)[0])
