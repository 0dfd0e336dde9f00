"""The methods of `make bench-learning`, their settings, and where a method's cell of a seed is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.baselines import Learner, actor_critic, advantage_weighted, cloned, online_rloo, refuel, sharpened
from iterative_ppo.config import Config, load_config
from iterative_ppo.files import fingerprint

WORK = Path(__file__).parent / "work" / "learning"
ROUND, EVALUATION = 1500, 5000
ASKED = 3
"""Rounds of each method, where nobody asks for another number."""
OURS, TWICE = "iterative PPO", "iterative PPO, two policy iterations a round"
LAST = "iterative PPO, three policy iterations in the last round"
SMALL = "iterative PPO, a deployment every 500 conversations"
PAPER_SMALL = "the paper's shape with one-step Q, a deployment every 500 conversations: PPO alone, KL to pi_i"
MONTE_CARLO = "the same with Monte Carlo Q"
CLONING, MYOPIC = "filtered behaviour cloning", "myopic: trained on acceptance"
ONLINE, REFUEL = "trajectory RLOO, updated every 250 conversations", "REFUEL"
LEARNERS: dict[str, Learner] = {
    "pi_0 sharpened": sharpened,
    CLONING: cloned,
    "advantage-weighted regression": advantage_weighted,
    "trajectory actor-critic": actor_critic,
}
COLLECTORS: dict[str, Callable[[Any, int, Config, int], Any]] = {ONLINE: online_rloo, REFUEL: refuel}
"""Those that have their conversations in a way of their own."""
ALONE: dict[str, Any] = {
    "improve.best_of_n.epochs": 0.0,
    "improve.ppo.kl_coefficient": 0.3,
    "improve.ppo.reference": "champion",
}
METHODS: dict[str, dict[str, Any]] = {
    OURS: {},
    TWICE: {"improve.policy_iterations": 2},
    LAST: {"improve.policy_iterations": 3},
    MONTE_CARLO: {"q.target": "monte_carlo", "q.corpus_epochs": 0.0},
    SMALL: {
        "q.replay_rounds": 5,
        "improve.best_of_n.initial_share": 0.5,
        "improve.best_of_n.initial_rounds": 6,
    },
    "best of n by Q, cloned": {"improve.ppo.episodes": 0},
    **{name: {} for name in LEARNERS},
    **{name: {} for name in COLLECTORS},
    MYOPIC: {"improve.reward": "acceptance", "q.corpus_epochs": 0.0},
    "paper's shape: PPO alone, KL to pi_i, Monte Carlo Q": {
        **ALONE,
        "improve.ppo.episodes": 3072,
        "q.target": "monte_carlo",
    },
    "the paper's shape with one-step Q: PPO alone, KL to pi_i": {
        **ALONE,
        "improve.ppo.episodes": 6144,
        "improve.ppo.learning_rate": 0.001,
    },
    PAPER_SMALL: {
        **ALONE,
        "improve.ppo.kl_coefficient": 1.0,
        "improve.ppo.episodes": 6144,
        "improve.ppo.learning_rate": 0.001,
        "q.replay_rounds": 5,
    },
}
ROUNDS = {OURS: 5, MONTE_CARLO: 1, MYOPIC: 1}
"""Rounds of those that do not make as many as asked for."""
DEPLOYMENTS = {SMALL: 3, PAPER_SMALL: 3}
"""Policies that a method deploys, one after the other, within a round's conversations; elsewhere one."""
FORKS = {LAST}
"""Those of which each round goes on from ours of the round before, as where it is the last one."""


def configuration(method: str, seed: int) -> Config:
    size = ROUND // DEPLOYMENTS.get(method, 1)
    return load_config(None, {"seed": seed, "simulator.conversations": size, **METHODS[method]})


def cell_path(method: str, seed: int) -> Path:
    key = fingerprint(configuration(method, seed).model_dump(mode="json"))
    return WORK / f"{fingerprint(method)[:6]}-{seed}-{key}"


def round_paths(method: str, seed: int, number: int) -> list[Path]:
    """Where a cell keeps the policies that it makes of a round's conversations, the one it ends with last."""
    deployments = DEPLOYMENTS.get(method, 1)
    made = range(deployments * (number - 1) + 1, deployments * number + 1) if number else [0]
    return [cell_path(method, seed) / f"{k}" for k in made]
