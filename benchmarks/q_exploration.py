"""Persona exploration on the chain: V^pi from a log that personas led, by each estimator, against its exact value.

A persona here is a temperature or a leaning towards one act, since the chain understands no instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from benchmarks.q_cells import Row, cell
from benchmarks.q_chain import CHAIN, GAMMA, POLICY
from benchmarks.results_file import figure
from iterative_ppo.config import load_config
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
METHODS = ("monte_carlo", "monte_carlo of its own", "one_step", "fqe", "retrace", "lstd_q")


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
    settings = {
        "q.target": target,
        "q.iterations": 60,
        "q.ridge": 1e-3,
        "q.loss": "mse" if target == "lstd_q" else "bce",
    }
    frame = explored_log(seed)
    own = frame["persona"].isna().to_numpy() if own_alone or target == "one_step" else None
    table, data = enumerated(frame, CHAIN.state_of, ACTIONS, POLICY, GAMMA, own)
    estimator_of(load_config(None, settings).q).fit(table, data)
    return float(CHAIN.start @ (POLICY * table.q).sum(axis=1))


def error(method: str, seeds: Sequence[int] = SEEDS) -> float:
    """Root mean square error of V^pi over seeds, against its exact value."""
    truth = CHAIN.value(POLICY, GAMMA)

    def found(seed: int) -> dict[str, float]:
        return cell("exploration", method, seed, [CONVERSATIONS, OWN_SHARE], lambda: {"value": value(method, seed)})

    return float(np.sqrt(np.mean([(found(seed)["value"] - truth) ** 2 for seed in seeds])))


def exploration(seeds: Sequence[int] = SEEDS) -> list[Row]:
    """The error of each method, and the best off-policy one's beside Monte Carlo's."""
    errors = {method: error(method, seeds) for method in METHODS}
    rows = [
        figure(f"chain explored by personas, {method}, RMSE of V^pi", found, seeds=seeds)
        for method, found in errors.items()
    ]
    best = min(("one_step", "fqe", "retrace", "lstd_q"), key=errors.__getitem__)
    ratio = errors[best] / errors["monte_carlo"]
    name = f"chain explored by personas, {best}'s RMSE over Monte Carlo's on the same data"
    return [*rows, figure(name, ratio, None, "<= 1/3", ratio <= 1 / 3, seeds)]
