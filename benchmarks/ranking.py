"""`make bench-ranking`: how well Q orders the actions of one state, one-step targets beside Monte Carlo, by seed.

Uses the pi_0 that `make bench-learning` made for each seed; resumable by seed and target.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning import first_round
from benchmarks.results_file import figure, mean_interval, write
from iterative_ppo.config import load_config
from iterative_ppo.environments.rollout import collect
from iterative_ppo.files import read_json, write_json
from iterative_ppo.mdp.conversation import State
from tasks.traffic import to_rows

WORK = Path(__file__).parent / "work" / "ranking"
TARGETS: dict[str, dict[str, Any]] = {
    "one-step Q, started from the corpus's": {},
    "Monte Carlo Q from the backbone": {"q.target": "monte_carlo", "q.corpus_epochs": 0.0},
}


def measure(name: str, seed: int, states: int) -> dict[str, Any]:
    """Fit one Q on 1,500 conversations of the seed's pi_0 and rank with it."""
    from iterative_ppo.learning.q_model import QModel
    from iterative_ppo.learning.rounds import evaluate_policy, round_of
    from tasks.ranking import rank

    config = load_config(None, {"seed": seed, **TARGETS[name]})
    policy, environment, talks, start = first_round(config)
    current = round_of(policy, to_rows(config, talks), config)
    first = QModel.load(start) if config.q.corpus_epochs else None
    q = evaluate_policy(policy, current, [], config, first)
    rng = random.Random(seed)
    fresh = collect(policy, environment, states, 9_000_000 + seed, "ranking")
    held: list[State] = [talk.state(rng.randrange(len(talk.turns) - 1)) for talk in fresh]
    return asdict(rank(policy, q, environment, held, gamma=config.gamma, seed=seed))


def main() -> None:
    """Measure what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--states", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in TARGETS:
        found = []
        for seed in range(arguments.seeds):
            place = WORK / f"{name.split()[0]}-{seed}-{arguments.states}.json"
            if not place.exists():
                began = time.process_time()
                result = measure(name, seed, arguments.states)
                write_json(place, {**result, "cpu_seconds": time.process_time() - began})
            found.append(read_json(place))
        seeds, cpu = list(range(arguments.seeds)), sum(f["cpu_seconds"] for f in found)
        for key in ("correlation", "ceiling"):
            mean, low, high = mean_interval([f[key] for f in found])
            rows.append(figure(f"within-state {key}, {name}", mean, (low, high), seeds=seeds, cpu_seconds=cpu))
    write("bench-ranking", rows)


if __name__ == "__main__":
    main()
