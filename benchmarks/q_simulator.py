"""How well each estimator orders the actions of a state of the renovation simulator, at 1,500 conversations."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.methods import ROUND
from benchmarks.q_cells import FITTED, TARGETS, Row, cell, row, sections
from benchmarks.results_file import at_least, averaged
from iterative_ppo.config import load_config
from iterative_ppo.evaluation.metrics import within_state_ranking
from iterative_ppo.mdp.conversation import State, Suggestion
from iterative_ppo.mdp.rendering import Encoded, single

if TYPE_CHECKING:
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.q_model import QModel

ACTIONS, ROLLOUTS = 8, 64
PLAIN = "Monte Carlo from the policy's backbone"
RANKED: dict[str, dict[str, Any]] = {
    PLAIN: {"q.target": "monte_carlo", "q.corpus_epochs": 0.0},
    "one_step from the policy's backbone": {"q.corpus_epochs": 0.0},
    **{target: {"q.target": target} for target in TARGETS if target != "lstd_q"},
    "archer by implicit Q-learning": {"q.target": "archer", "q.expectile": 0.9},
    "lstd_q": {"q.target": "lstd_q", "q.loss": "mse"},
    "one_step, mse": {"q.loss": "mse", "q.corpus_epochs": 0.0},
    "one_step, hl_gauss": {"q.loss": "hl_gauss", "q.corpus_epochs": 0.0},
    "one_step, 5 members": {"q.members": 5, "q.corpus_epochs": 0.0},
}
"""Those without corpus_epochs 0 start from the Q of the corpus, as far as their heads are the same."""


def spoken(policy: LanguagePolicy, pairs: Sequence[tuple[State, Suggestion]]) -> list[Encoded]:
    """Sequences of responses in states, which a Q-model values at their end."""
    render = policy.renderer
    return [single(k, render.prompt(s).tokens, render.response(a), True) for k, (s, a) in enumerate(pairs)]


def worth(q: QModel, sequences: Sequence[Encoded]) -> np.ndarray:
    """(N,) Q of each response."""
    return np.array([values[-1] for values in q.running_values(sequences)])


@lru_cache(maxsize=1)
def simulated(seed: int, states: int) -> dict[str, Any]:
    """A seed's pi_0 with 1,500 conversations of it, and the truth that its Qs are ranked by."""
    from benchmarks.learning import first_round
    from iterative_ppo.environments.rollout import collect
    from tasks.ranking import distinct_actions, true_values

    config = load_config(None, {"seed": seed})
    policy, environment, talks, start = first_round(config)
    rng = random.Random(seed)
    fresh = collect(policy, environment, states, 9_000_000 + seed, "ranking")
    held = [talk.state(rng.randrange(len(talk.turns) - 1)) for talk in fresh]
    chosen = distinct_actions(policy, held, ACTIONS, seed)
    truth = true_values(policy, environment, chosen, ROLLOUTS, config.gamma, seed)
    halves = [truth[:, :, part].mean(axis=2) for part in (slice(0, ROLLOUTS // 2), slice(ROLLOUTS // 2, None))]
    sequences = spoken(policy, [(state, action) for state, said in chosen for action in said])
    ceiling = within_state_ranking(*halves)
    return {
        "policy": policy,
        "talks": talks,
        "start": start,
        "sequences": sequences,
        "truth": truth.mean(axis=2),
        "ceiling": ceiling,
    }


def simulator_ranking(overrides: dict[str, Any], seed: int, states: int) -> dict[str, float]:
    """The within-state ranking of one Q, the ceiling, and what the fit took."""
    from iterative_ppo.learning.q_model import QModel
    from iterative_ppo.learning.rounds import evaluate_policy, round_of
    from tasks.traffic import to_rows

    given, config = simulated(seed, states), load_config(None, {"seed": seed, **overrides})
    current = round_of(given["policy"], to_rows(config, given["talks"]), config)
    start = QModel.load(given["start"]) if config.q.corpus_epochs else None
    began = time.process_time()
    q = evaluate_policy(given["policy"], current, [], config, start)
    took = time.process_time() - began
    truth, ranked = given["truth"], ranking_of(q, given)
    return {"ranking": ranked, "ceiling": given["ceiling"], "states": float(len(truth)), "fit_cpu_seconds": took}


def ranking_of(q: QModel, given: dict[str, Any]) -> float:
    """A Q's within-state ranking by what `simulated` gave."""
    truth = given["truth"]
    return within_state_ranking(truth, worth(q, given["sequences"]).reshape(truth.shape))


def _known(overrides: dict[str, Any], seed: int, states: int) -> list[Any]:
    """What a cell's figures depend on: pi_0 and the Q of its corpus, the simulator, the fit, the states ranked in."""
    shared = sections(load_config(None, {"seed": seed}), *FITTED, "supervised", "simulator")
    return [states, ACTIONS, ROLLOUTS, ROUND, shared, sections(load_config(None, overrides), "q")]


def ranking(seeds: Sequence[int], states: int, names: Sequence[str]) -> list[Row]:
    """How well estimators (names of RANKED) order the actions of a state after 1,500 conversations of pi_0.

    A row also has how many states of each seed had enough distinct actions, and how many actions those are.
    """
    found: dict[str, list[Any]] = {name: [] for name in RANKED if name in names}
    for s in seeds:  # outside, because what a seed's Qs are ranked by takes longest
        for name, cells in found.items():
            o = RANKED[name]
            known = _known(o, s, states)
            cells.append(cell("ranking", name, s, known, lambda o=o, s=s: simulator_ranking(o, s, states)))
    rows = []
    for name, cells in found.items():
        judged: dict[str, Any] = {"target": ">= .65", "met": at_least(0.65)} if name == "one_step" else {}
        left = {"states": [round(c["states"]) for c in cells], "actions": ACTIONS}
        rows.append(row(f"simulator, within-state correlation, {name}", cells, "ranking", **judged) | left)
        rows.append(row(f"simulator, CPU seconds of the fit, {name}", cells, "fit_cpu_seconds"))
    if not {"one_step", PLAIN} <= found.keys():
        return rows
    ours, plain = found["one_step"], found[PLAIN]
    ratio = [a["ranking"] / b["ranking"] for a, b in zip(ours, plain, strict=True)]
    rows.append(averaged("simulator, one_step over plain Monte Carlo", ratio, seeds, ">= 2", at_least(2)))
    return [*rows, row("simulator, ceiling", ours, "ceiling")]
