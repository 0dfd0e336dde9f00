"""Persona exploration in the renovation simulator: estimators side by side on one log that the shipped personas led."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.baselines import discounted
from benchmarks.methods import ROUND
from benchmarks.q_cells import FITTED, Row, cell, row, sections
from benchmarks.q_exploration import OWN_SHARE, rmse
from benchmarks.q_simulator import ranking_of, simulated, spoken, worth
from benchmarks.results_file import figure, jackknifed
from iterative_ppo.config import load_config
from iterative_ppo.mdp.conversation import Conversation
from iterative_ppo.mdp.rendering import Encoded

STATES, FRESH, SAMPLES = 60, 5000, 4
"""States ranked in; customers whom V^pi is the mean return of; responses in each of their first states."""
ALL, OWN = "monte_carlo of all", "monte_carlo of its own"
METHODS = (ALL, OWN, "one_step", "fqe", "retrace")


@lru_cache(maxsize=1)
def explored(seed: int) -> list[Conversation]:
    """The log: a share of it pi_0's own, the others led by the shipped personas, as many by each."""
    from iterative_ppo.environments.rollout import collect
    from tasks.traffic import environment

    config, given = load_config(None, {"seed": seed}), simulated(seed, STATES)
    kept = round(OWN_SHARE * ROUND)
    talks, each = given["talks"][:kept], (ROUND - kept) // len(config.exploration.personas)
    for k, (name, persona) in enumerate(config.exploration.personas.items()):
        behaviour = given["policy"].led_by(persona)
        led = collect(behaviour, environment(config), each, 20_000 * (seed + 1) + k, "0", name)
        talks += [replace(talk, persona=name) for talk in led]
    return talks


@lru_cache(maxsize=1)
def first_states(seed: int) -> tuple[float, list[Encoded]]:
    """V^pi of first states, by the returns of fresh customers; and pi_0's own responses in some of their first states.

    The responses are sequences that a Q-model values.
    """
    from iterative_ppo.environments.rollout import collect
    from tasks.traffic import environment

    config, policy = load_config(None, {"seed": seed}), simulated(seed, STATES)["policy"]
    talks = collect(policy, environment(config), FRESH, 8_000_000 + seed, "fresh")
    states = [talk.state(0) for talk in talks[:ROUND] for _ in range(SAMPLES)]
    said = policy.sample(states, seed)
    truth = float(np.mean([discounted(talk.turns, 0, config.gamma) for talk in talks]))
    return truth, spoken(policy, list(zip(states, said, strict=True)))


def judged(method: str, seed: int) -> dict[str, float]:
    """A method's V^pi of first states less its true value, and how well it ranks the actions of a state."""
    from iterative_ppo.learning.policy_evaluation import fit_q
    from iterative_ppo.learning.rounds import round_of
    from tasks.traffic import to_rows

    target = method.partition(" of ")[0]
    config = load_config(None, {"seed": seed, "q.target": target, "q.corpus_epochs": 0.0})
    given, (truth, firsts) = simulated(seed, STATES), first_states(seed)
    talks = explored(seed)
    own = [talk for talk in talks if talk.persona is None]
    led = [talk for talk in talks if talk.persona is not None]
    first, *others = [talks] if method == ALL else [own] if method == OWN else [own, led]
    policy = given["policy"]
    current, *replay = [round_of(policy, to_rows(config, part), config) for part in (first, *others)]
    q = fit_q(policy, current, replay, config)
    missed = float(worth(q, firsts).mean()) - truth
    return {"value": truth, "missed": missed, "ranking": ranking_of(q, given), **q.report}


def personas(seeds: Sequence[int]) -> list[Row]:
    """Each method's error of V^pi and its ranking of actions, by the same 1,500 conversations of each seed."""
    shared = sections(load_config(None), *FITTED, "supervised", "simulator", "exploration")
    known = [ROUND, OWN_SHARE, STATES, FRESH, shared]
    found: dict[str, list[Any]] = {method: [] for method in METHODS}
    for seed in seeds:  # outside, because what the methods are judged by takes longest
        for method, cells in found.items():
            cells.append(cell("personas", method, seed, known, lambda m=method, s=seed: judged(m, s)))
    rows, name = [], "simulator explored by personas"
    for method, cells in found.items():
        error, low, high = jackknifed(rmse, np.array([c["missed"] for c in cells]))
        rows.append(figure(f"{name}, {method}, RMSE of V^pi of first states", error, (low, high), seeds=seeds))
        rows.append(row(f"{name}, {method}, within-state correlation", cells, "ranking"))
    return [*rows, row(f"{name}, V^pi of first states", found[OWN], "value")]
