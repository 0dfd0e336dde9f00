"""`make bench-learning`: success by rounds of 1,500 conversations on the renovation simulator, several seeds.

Each seed has its own pi_0. The gate is off: every improved policy is deployed. Resumable by method, seed and round:
what is in benchmarks/work is not done again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learning_table import outcome_of, table
from benchmarks.methods import (
    ASKED,
    COLLECTORS,
    DEPLOYMENTS,
    EVALUATION,
    FORKS,
    LEARNERS,
    METHODS,
    OURS,
    ROUND,
    ROUNDS,
    WORK,
    cell_path,
    configuration,
)
from benchmarks.results_file import write
from iterative_ppo.config import Config, load_config
from iterative_ppo.environments.rollout import collect
from iterative_ppo.files import read_json, whole_directory, write_json
from tasks.traffic import environment, scripted_corpus, to_rows

GREEDY = 1e-3
"""A temperature at which sampling takes the likeliest token."""


def run_cell(method: str, seed: int, rounds: int) -> None:
    """One method and seed, round by round from where it stopped."""
    torch.set_num_threads(1)  # cells run side by side, and threads that outnumber the cores are far slower than one
    config, deployments = configuration(method, seed), DEPLOYMENTS.get(method, 1)
    folder, forks = cell_path(method, seed), method in FORKS
    if forks:
        run_cell(OURS, seed, rounds - 1)
    for deployment in range(int(forks), deployments * rounds + 1):
        place, (number, within) = folder / f"{deployment}", divmod(deployment, deployments)
        if not place.exists():
            with whole_directory(place) as draft:
                began = time.process_time()
                if deployment == 0:
                    _begin(config, method, draft)
                else:
                    begun = cell_path(OURS, seed) if forks else folder
                    _improve(config, method, begun / f"{deployment - 1}", deployment - 1, draft)
                took = time.process_time() - began
                result = {} if within else _measured(config, number, draft)
                write_json(draft / "result.json", {**result, "cpu_seconds": took})
            if not within:
                print(f"{method}, seed {seed}, round {number}: {result['success']:.3f}", flush=True)
        if not within:
            _greedily(config, number, place)


def first_round(config: Config) -> tuple[Any, Any, list[Any], Path]:
    """A seed's pi_0, its world, the first 1,500 conversations that it has there, and where the corpus's Q is."""
    from iterative_ppo.learning.language_model import LanguagePolicy

    if not (start := cell_path(OURS, config.seed) / "0").exists():
        run_cell(OURS, config.seed, 0)
    policy, world = LanguagePolicy.load(start / "model"), environment(config)
    return policy, world, collect(policy, world, ROUND, 10_000 * (config.seed + 1), "0"), start / "q"


def _begin(config: Config, method: str, draft: Path) -> None:
    """pi_0 (the same for every method of a seed) and its first Q."""
    from tasks.learning import initial_policy_stage

    shared = config.model_copy(
        update={
            "data": config.data.model_copy(update={"root": WORK / f"pi_0-{config.seed}"}),
            "q": load_config(None, {"seed": config.seed}).q,
        }
    )
    stage = initial_policy_stage(shared, scripted_corpus(config), "scripted")
    (draft / "model").symlink_to((stage.path / "model").resolve())
    if config.q.corpus_epochs:
        (draft / "q").symlink_to((stage.path / "q").resolve())


def _improve(config: Config, method: str, before: Path, number: int, draft: Path) -> None:
    """The policy that comes after the one in `before`, its cell's `number`-th, from fresh conversations of that."""
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.mdp import turn_table

    policy, config = LanguagePolicy.load(before / "model"), config.in_round(number)
    seed, size = 10_000 * (config.seed + 1) + number, config.simulator.conversations
    if method in COLLECTORS:
        COLLECTORS[method](policy, size, config, seed).save(draft / "model")
        return
    talks = collect(policy, environment(config), size, seed, str(number))
    if method in LEARNERS:
        LEARNERS[method](policy, talks, config).save(draft / "model")
        return
    frame = to_rows(config, talks)
    turn_table.write(frame, draft / "turns.parquet", config.outcomes)
    earlier = [before.parent / f"{k}" / "turns.parquet" for k in range(number, 0, -1)]
    initial = LanguagePolicy.load(before.parent / "0" / "model") if config.improve.best_of_n.initial_share else None
    _policy_iteration(config, policy, initial, frame, before / "q", earlier, draft).save(draft / "model")


def _policy_iteration(
    config: Config, policy: Any, initial: Any, frame: Any, first: Path, earlier: Sequence[Path], draft: Path
) -> Any:
    """Lines 5 to 7 of Algorithm 1, in memory: the same functions as the pipeline's stages."""
    from iterative_ppo.learning.improve.episodes import prompts_of
    from iterative_ppo.learning.q_model import QModel
    from iterative_ppo.learning.rounds import evaluate_policy, improve_policy, round_of
    from iterative_ppo.mdp import turn_table

    current = round_of(policy, frame, config)
    seen = [turn_table.read(path, config.outcomes) for path in earlier[: config.q.replay_rounds]]
    replay = [round_of(policy, rows, config) for rows in seen]
    start = QModel.load(first) if config.q.warm_start and first.exists() else None
    q = evaluate_policy(policy, current, replay, config, start)
    q.save(draft / "q")
    behaviour = frame["behaviour_logprob"].to_numpy(dtype=float, na_value=np.nan)
    prompts = prompts_of(current.encoded.sequences, np.flatnonzero(current.fit))
    return improve_policy(policy, current, behaviour, q, prompts, config, config.seed, initial=initial).policy


def _told_before(config: Config, number: int, name: str) -> Any:
    """What is known already of pi_0, which all methods of a seed share; None of any other policy."""
    started = cell_path(OURS, config.seed) / "0" / name
    return read_json(started) if number == 0 and started.exists() else None


def _measured(config: Config, number: int, draft: Path) -> dict[str, float]:
    """Success and manners on fresh conversations."""
    if told := _told_before(config, number, "result.json"):
        return dict(told)
    from iterative_ppo.environments.phrases import parse
    from iterative_ppo.learning.language_model import LanguagePolicy

    policy = LanguagePolicy.load(draft / "model")
    talks = collect(policy, environment(config), EVALUATION, 5_000_000 + 1000 * config.seed + number, "evaluation")
    actions = [turn.suggestion for talk in talks for turn in talk.turns if turn.suggestion]
    said = [a.text or "" for a in actions if a.status == "suggested"]
    adopted = [turn.adoption == "verbatim" for talk in talks for turn in talk.turns if turn.adoption]
    return {
        "success": outcome_of(talks).rate,
        "conversations": EVALUATION,
        "well_formed": float(np.mean([parse(text).kind != "unclear" for text in said])) if said else 1.0,
        "abstained": 1.0 - len(said) / len(actions),
        "verbatim": float(np.mean(adopted)) if adopted else 0.0,
    }


def _greedily(config: Config, number: int, place: Path) -> None:
    """Success where every message is the likeliest one."""
    from iterative_ppo.learning.language_model import LanguagePolicy

    if (place / "greedy.json").exists():
        return
    if told := _told_before(config, number, "greedy.json"):
        write_json(place / "greedy.json", told)
        return
    policy = LanguagePolicy.load(place / "model").at(GREEDY)
    talks = collect(policy, environment(config), EVALUATION, 7_000_000 + 1000 * config.seed + number, "greedy")
    write_json(place / "greedy.json", {"success": outcome_of(talks).rate, "conversations": EVALUATION})


def main() -> None:
    """Run all cells in `--jobs` processes, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=ASKED)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="run these alone")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "SEED"), help="one method and seed, in this process")
    arguments = parser.parse_args()
    if arguments.cell:
        method, seed = arguments.cell
        run_cell(method, int(seed), ROUNDS.get(method, arguments.rounds))
        return
    seeds = list(range(arguments.seeds))
    for method in arguments.methods:  # the first makes each seed's pi_0, which the others share
        _in_processes([(method, seed) for seed in seeds], arguments)
    whole = arguments.methods == list(METHODS) and arguments.rounds >= ASKED
    write("bench-learning", table(seeds, arguments.rounds, arguments.methods), whole)


def _in_processes(cells: list[tuple[str, int]], arguments: argparse.Namespace) -> None:
    running: list[subprocess.Popen[bytes]] = []
    for method, seed in cells:
        while len(running) >= arguments.jobs:
            running = _still(running)
            time.sleep(0.5)
        command = [sys.executable, "-m", "benchmarks.learning", "--rounds", str(arguments.rounds)]
        running.append(subprocess.Popen([*command, "--cell", method, str(seed)]))
    while running:
        running = _still(running)
        time.sleep(0.5)


def _still(running: list[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    for process in running:
        if process.poll():
            sys.exit(f"a cell failed with exit code {process.returncode}; run again to resume")
    return [process for process in running if process.poll() is None]


if __name__ == "__main__":
    main()
