"""`make bench-q`: the estimators of Q on the chain, in the simulator and on STAR; several outcomes; credit; speed.

Resumable by part, method and seed: what is in benchmarks/work is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.q_cells import Row
from benchmarks.q_chain import chain
from benchmarks.q_credit import credit
from benchmarks.q_credit_learning import credit_learning
from benchmarks.q_exploration import exploration
from benchmarks.q_outcomes import outcomes
from benchmarks.q_personas import personas
from benchmarks.q_simulator import RANKED, ranking
from benchmarks.q_speed import speed
from benchmarks.results_file import write

PARTS = ("speed", "chain", "exploration", "personas", "outcomes", "credit", "credit_learning", "ranking", "star")


def star(data: Path, seeds: Sequence[int]) -> list[Row]:
    """The default Q's held-out AUC on STAR beside TF-IDF regression: the rows of `make bench-star`."""
    from benchmarks.star import configuration, learnability
    from iterative_ppo.sources import import_log

    if not data.exists():
        print(f"{data}: the public logs are not here; name their folder with --data")
        return []
    path = data / "star"
    return learnability(list(import_log(configuration("star", path)).conversations), path, seeds)


def main() -> None:
    """Measure what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--states", type=int, default=200)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--ranking-seeds", type=int, help="of the part ranking, which takes longest; else --seeds")
    parser.add_argument("--estimators", nargs="+", choices=RANKED, default=list(RANKED), help="of the part ranking")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(arguments.seeds))
    made: dict[str, Callable[[], list[Row]]] = {
        "speed": lambda: speed(seeds),
        "chain": lambda: chain(seeds),
        "exploration": exploration,
        "personas": lambda: personas(seeds),
        "outcomes": lambda: outcomes(seeds),
        "credit": credit,
        "credit_learning": lambda: credit_learning(seeds),
        "ranking": lambda: ranking(seeds[: arguments.ranking_seeds], arguments.states, arguments.estimators),
        "star": lambda: star(arguments.data, seeds),
    }
    found = {part: made[part]() for part in PARTS if part in arguments.parts}
    whole = all(found.get(part) for part in PARTS) and set(arguments.estimators) == set(RANKED)
    write("bench-q", [one for rows in found.values() for one in rows], whole)


if __name__ == "__main__":
    main()
