"""`make bench-learning`: success by rounds of 1,500 conversations on the renovation simulator, several seeds.

Each seed has its own pi_0. The gate is off: every improved policy is deployed. Resumable by method, seed and round:
what is in benchmarks/work is not done again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results_file import figure, mean_interval, write
from iterative_ppo.config import Config, load_config
from iterative_ppo.environments.renovation import Script
from iterative_ppo.environments.rollout import collect
from iterative_ppo.files import fingerprint, read_json, whole_directory, write_json
from tasks.traffic import copying_lessons, environment, outcome_of, scripted_corpus, to_rows

WORK = Path(__file__).parent / "work" / "learning"
ROUND, EVALUATION = 1500, 5000
OURS, CLONING, MYOPIC = "iterative PPO", "filtered behaviour cloning", "myopic: trained on acceptance"
BEST_OF_N = "best of n by Q, cloned"
METHODS: dict[str, dict[str, Any]] = {
    OURS: {},
    CLONING: {},
    MYOPIC: {"improve.reward": "acceptance", "q.corpus_epochs": 0.0},
    BEST_OF_N: {"improve.ppo.episodes": 0},
    "logged pass, then PPO": {
        "improve.logged.epochs": 5.0,
        "improve.best_of_n.epochs": 0.0,
        "improve.ppo.kl_coefficient": 0.3,
    },
    "paper's shape: PPO alone, KL to pi_i, Monte Carlo Q": {
        "improve.best_of_n.epochs": 0.0,
        "improve.ppo.kl_coefficient": 0.3,
        "improve.ppo.episodes": 3072,
        "improve.ppo.reference": "champion",
        "q.target": "monte_carlo",
    },
}
ROUNDS = {MYOPIC: 1}


def configuration(method: str, seed: int) -> Config:
    return load_config(None, {"seed": seed, "simulator.conversations": ROUND, **METHODS[method]})


def cell_path(method: str, seed: int) -> Path:
    key = fingerprint(configuration(method, seed).model_dump(mode="json"))
    return WORK / f"{fingerprint(method)[:6]}-{seed}-{key}"


def run_cell(method: str, seed: int, rounds: int) -> None:
    """One method and seed, round by round from where it stopped."""
    torch.set_num_threads(1)  # cells run side by side, and threads that outnumber the cores are far slower than one
    config = configuration(method, seed)
    folder = cell_path(method, seed)
    for number in range(rounds + 1):
        place = folder / f"{number}"
        if (place / "result.json").exists():
            continue
        began = time.process_time()
        with whole_directory(place) as draft:
            if number == 0:
                _begin(config, method, draft)
            else:
                _improve(config, method, folder / f"{number - 1}", number - 1, draft)
            trained = time.process_time()
            started = cell_path(OURS, seed) / "0" / "result.json"
            if number == 0 and method != OURS and started.exists():
                result = read_json(started)
            else:
                result = _measure(config, number, draft, final=number in (0, rounds))
            result |= {"cpu_seconds": trained - began, "cpu_seconds_evaluation": time.process_time() - trained}
            write_json(draft / "result.json", result)
        print(f"{method}, seed {seed}, round {number}: {result['success']:.3f}", flush=True)


def _begin(config: Config, method: str, draft: Path) -> None:
    """pi_0 (the same for every method of a seed) and its first Q."""
    from tasks.learning import initial_policy_stage

    shared = config.model_copy(
        update={
            "data": config.data.model_copy(update={"root": WORK / f"pi_0-{config.seed}"}),
            "q": load_config(None, {"seed": config.seed}).q,
        }
    )
    stage = initial_policy_stage(shared, scripted_corpus(config), "scripted", copying_lessons(config))
    (draft / "model").symlink_to((stage.path / "model").resolve())
    if config.q.corpus_epochs:
        (draft / "q").symlink_to((stage.path / "q").resolve())


def _improve(config: Config, method: str, before: Path, number: int, draft: Path) -> None:
    """One round from the policy in `before`, on 1,500 fresh conversations of it."""
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.mdp import turn_table

    policy = LanguagePolicy.load(before / "model")
    talks = collect(policy, environment(config), ROUND, 10_000 * (config.seed + 1) + number, str(number))
    frame = to_rows(config, talks)
    turn_table.write(frame, draft / "turns.parquet", config.outcomes)
    improved = (
        _clone(config, policy, talks) if method == CLONING else _policy_iteration(config, policy, frame, before, draft)
    )
    improved.save(draft / "model")


def _clone(config: Config, policy: Any, talks: list[Any]) -> Any:
    from iterative_ppo.learning.supervised import fine_tune

    won = [talk for talk in talks if talk.turns[-1].outcomes[0] > 0]
    sequences = [s for talk in won for s in policy.renderer.encode(talk)[0]]
    gentle = config.supervised.model_copy(update={"learning_rate": 0.001, "epochs": 4.0})
    return fine_tune(policy, sequences, gentle, config.seed)[0]


def _policy_iteration(config: Config, policy: Any, frame: Any, before: Path, draft: Path) -> Any:
    """Lines 5 to 7 of Algorithm 1, in memory: the same functions as the pipeline's stages."""
    from iterative_ppo.learning.improve.episodes import prompts_of
    from iterative_ppo.learning.q_model import QModel
    from iterative_ppo.learning.rounds import evaluate_policy, improve_policy, round_of
    from iterative_ppo.mdp import turn_table

    current = round_of(policy, frame, config)
    earlier = before / "turns.parquet"
    replay = [round_of(policy, turn_table.read(earlier, config.outcomes), config)] if earlier.exists() else []
    start = QModel.load(before / "q") if config.q.warm_start and (before / "q").exists() else None
    q = evaluate_policy(policy, current, replay[: config.q.replay_rounds], config, start)
    q.save(draft / "q")
    behaviour = frame["behaviour_logprob"].to_numpy(dtype=float, na_value=np.nan)
    prompts = prompts_of(current.encoded.sequences, np.flatnonzero(current.fit))
    return improve_policy(policy, current, behaviour, q, prompts, config, config.seed).policy


def _measure(config: Config, number: int, draft: Path, final: bool) -> dict[str, float]:
    """Success on fresh conversations: 5,000 at the first and the last round, 1,500 between."""
    from iterative_ppo.environments.phrases import parse
    from iterative_ppo.learning.language_model import LanguagePolicy

    policy = LanguagePolicy.load(draft / "model")
    count = EVALUATION if final else ROUND
    talks = collect(policy, environment(config), count, 5_000_000 + 1000 * config.seed + number, "evaluation")
    actions = [turn.suggestion for talk in talks for turn in talk.turns if turn.suggestion]
    said = [a.text or "" for a in actions if a.status == "suggested"]
    adopted = [turn.adoption == "verbatim" for talk in talks for turn in talk.turns if turn.adoption]
    return {
        "success": outcome_of(talks).rate,
        "conversations": count,
        "well_formed": float(np.mean([parse(text).kind != "unclear" for text in said])) if said else 1.0,
        "abstained": 1.0 - len(said) / len(actions),
        "verbatim": float(np.mean(adopted)) if adopted else 0.0,
    }


def table(seeds: list[int], rounds: int) -> list[dict[str, Any]]:
    """Figures over seeds, from finished cells; a method that some seed has not finished is left out."""
    rows: list[dict[str, Any]] = []
    rate: dict[tuple[str, int], np.ndarray] = {}
    for method in METHODS:
        for number in range(ROUNDS.get(method, rounds) + 1):
            paths = [cell_path(method, seed) / f"{number}" / "result.json" for seed in seeds]
            if not all(path.exists() for path in paths):
                continue
            results = [read_json(path) for path in paths]
            rate[method, number] = np.array([r["success"] for r in results])
            mean, low, high = mean_interval(rate[method, number])
            cpu = float(np.mean([r["cpu_seconds"] for r in results]))
            rows.append(figure(f"success, {method}, round {number}", mean, (low, high), seeds=seeds, cpu_seconds=cpu))
            well = mean_interval([r["well_formed"] for r in results])
            if number in (0, rounds):
                rows.append(figure(f"well-formed messages, {method}, round {number}", well[0], well[1:], seeds=seeds))
    return rows + _comparisons(rate, seeds, rounds)


def _comparisons(rate: dict[tuple[str, int], np.ndarray], seeds: list[int], rounds: int) -> list[dict[str, Any]]:
    """What the figures are held against; every comparison pairs the seeds."""
    start, ours = rate[OURS, 0], rate[OURS, rounds]
    ratio, interval = float(ours.mean() / start.mean()), mean_interval(ours / start)[1:]
    inside = bool(0.15 <= start.mean() <= 0.25)
    rows = [
        figure("mean success after the last round over pi_0's", ratio, interval, ">= 3", ratio >= 3, seeds),
        figure("pi_0's success", start.mean(), mean_interval(start)[1:], ".15 to .25", inside, seeds),
    ]
    for method, number in [(m, n) for m in METHODS if m != OURS for n in range(1, rounds + 1)]:
        if (method, number) in rate:
            mean, low, high = mean_interval(rate[OURS, number] - rate[method, number])
            rows.append(figure(f"margin over {method}, round {number}", mean, (low, high), "> 0", low > 0, seeds))
    for number, least in ((1, 0.58), (3, 0.82)):
        if (OURS, number) in rate:
            mean, low, high = mean_interval(rate[OURS, number])
            what = f"success after {number} rounds"
            rows.append(figure(what, mean, (low, high), f">= {least}", mean >= least, seeds))
    oracle = outcome_of(collect(Script(1.0), environment(configuration(OURS, 0)), EVALUATION, 99, "oracle"))
    return [*rows, figure("the scripted oracle's success", oracle.rate, None, ">= .80", oracle.rate >= 0.8)]


def main() -> None:
    """Run all cells in `--jobs` processes, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
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
    write("bench-learning", table(seeds, arguments.rounds))


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
