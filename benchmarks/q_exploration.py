"""Persona exploration on the chain: V^pi from a log that personas led, by each estimator, against its exact value.

A persona here is a temperature or a leaning towards one act, since the chain understands no instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from benchmarks.q_cells import Row, cell, sections
from benchmarks.q_chain import CHAIN, GAMMA, POLICY, WORLD, settings_of
from benchmarks.results_file import figure, jackknifed
from iterative_ppo.environments.chain import ACTIONS
from iterative_ppo.mdp.turn_table import to_frame

CONVERSATIONS, OWN_SHARE, SEEDS = 1500, 0.2, range(20)
PERSONAS = {
    "free": (3.0, (0.0, 0.0, 0.0)),
    "asking": (1.0, (1.5, 0.0, 0.0)),
    "closing": (1.0, (0.0, 1.5, 0.0)),
    "quiet": (1.0, (0.0, 0.0, 1.5)),
}
"""Temperature, and what is added to the acts' log-probs."""
OFF_POLICY = ("one_step", "fqe", "retrace", "lstd_q")
METHODS = ("monte_carlo", "monte_carlo of its own", *OFF_POLICY)


def led_by(persona: str) -> np.ndarray:
    """(S, A) the policy, led."""
    temperature, leaning = PERSONAS[persona]
    weights = np.exp(np.log(POLICY) / temperature + np.array(leaning))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@lru_cache(maxsize=1)
def explored_log(seed: int) -> pd.DataFrame:
    """A turn table of `CONVERSATIONS`, a share of them the policy's own, a persona drawn for each of the others."""
    rng = np.random.default_rng(seed)
    who = np.where(rng.random(CONVERSATIONS) < OWN_SHARE, 0, 1 + rng.integers(len(PERSONAS), size=CONVERSATIONS))
    frames = []
    for k, name in enumerate((None, *PERSONAS)):
        said = POLICY if name is None else led_by(name)
        talks = CHAIN.sample(said, int((who == k).sum()), 1000 * k + seed, name or "own")
        frames.append(to_frame(talks, {"purchase": 1.0}, 0.2).assign(persona=name))
    return pd.concat(frames, ignore_index=True)


def value(method: str, seed: int) -> float:
    """E[V^pi(s_1)] as the method's Q has it; plain Monte Carlo takes all conversations for the policy's own."""
    from iterative_ppo.learning.estimators import estimator_of
    from iterative_ppo.learning.estimators.table import enumerated

    target, _, own_alone = method.partition(" of ")
    frame = explored_log(seed)
    own = frame["persona"].isna().to_numpy() if own_alone or target == "one_step" else None
    table, data = enumerated(frame, CHAIN.state_of, ACTIONS, POLICY, GAMMA, own)
    estimator_of(settings_of(target).q).fit(table, data)
    return float(CHAIN.start @ (POLICY * table.q).sum(axis=1))


def errors(method: str, seeds: Sequence[int] = SEEDS) -> np.ndarray:
    """(N,) of V^pi by seed, against its exact value."""
    settings = sections(settings_of(method.partition(" of ")[0]), "q")
    known = [CONVERSATIONS, OWN_SHARE, PERSONAS, WORLD, settings]

    def found(seed: int) -> dict[str, float]:
        return cell("exploration", method, seed, known, lambda: {"value": value(method, seed)})

    return np.array([found(seed)["value"] for seed in seeds]) - CHAIN.value(POLICY, GAMMA)


def exploration(seeds: Sequence[int] = SEEDS) -> list[Row]:
    """The error of each method, and the best off-policy one's beside Monte Carlo's."""
    found = {method: errors(method, seeds) for method in METHODS}
    rows = []
    for method, missed in found.items():
        error, low, high = jackknifed(rmse, missed)
        rows.append(figure(f"chain explored by personas, {method}, RMSE of V^pi", error, (low, high), seeds=seeds))
    best = min(OFF_POLICY, key=lambda method: rmse(found[method]))
    both = np.stack([found[best], found["monte_carlo"]], axis=1)
    ratio, low, high = jackknifed(lambda of: rmse(of[:, 0]) / rmse(of[:, 1]), both)
    name = "chain explored by personas, the best off-policy RMSE over Monte Carlo's on the same data"
    return [*rows, figure(name, ratio, (low, high), "<= 1/3", ratio <= 1 / 3, seeds)]


def rmse(missed: np.ndarray) -> float:
    """Root mean square of (N,) errors."""
    return float(np.sqrt((missed**2).mean()))
