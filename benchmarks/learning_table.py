"""The table of `make bench-learning`, from finished cells; comparisons pair the seeds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.methods import (
    EVALUATION,
    LAST,
    METHODS,
    OURS,
    PAPER_SMALL,
    ROUNDS,
    SMALL,
    TWICE,
    configuration,
    round_paths,
)
from benchmarks.results_file import at_least, averaged, beyond_doubt, figure
from iterative_ppo.environments.renovation import Script
from iterative_ppo.environments.rollout import collect
from iterative_ppo.evaluation.ab_test import Arm, ab_test
from iterative_ppo.files import read_json
from iterative_ppo.mdp.conversation import Conversation
from tasks.traffic import environment

VARIANTS = {
    OURS: "",
    TWICE: ", two policy iterations a round",
    LAST: ", three policy iterations in the last",
    SMALL: ", a deployment every 500",
    PAPER_SMALL: ", PPO alone, a deployment every 500",
}
"""Ours, by what the figures that compare or judge them end with."""
Results = dict[tuple[str, int], list[dict[str, Any]]]
"""By method and round, a result for each seed."""


def outcome_of(talks: Sequence[Conversation]) -> Arm:
    """Successes among conversations of one outcome."""
    return Arm(sum(talk.turns[-1].outcomes[0] > 0 for talk in talks), len(talks))


def table(seeds: list[int], rounds: int, methods: Collection[str] = tuple(METHODS)) -> list[dict[str, Any]]:
    """Figures of these methods over seeds; a method and round that some seed has not finished is left out."""
    found = _finished(seeds, rounds)
    asked = {cell: results for cell, results in found.items() if cell[0] in methods}
    rows = [row for (method, number), results in asked.items() for row in _described(method, number, results, seeds)]
    rows += _margins(found, seeds, methods)
    if not {OURS, LAST, SMALL, PAPER_SMALL} & set(methods):
        return rows
    return [*rows, *_targets(found, seeds, rounds), *_steps(found, seeds)]


def _finished(seeds: list[int], rounds: int) -> Results:
    found: Results = {}
    for method in METHODS:
        for number in range(ROUNDS.get(method, rounds) + 1):
            made = [round_paths(method, seed, number) for seed in seeds]
            if all((places[-1] / "result.json").exists() for places in made):
                found[method, number] = [_result(places) for places in made]
    return found


def _result(places: Sequence[Path]) -> dict[str, Any]:
    """What the last of a round's policies reaches, and what all of them cost."""
    told, greedy = [read_json(place / "result.json") for place in places], places[-1] / "greedy.json"
    return {
        **told[-1],
        "cpu_seconds": sum(one["cpu_seconds"] for one in told),
        "greedy": read_json(greedy)["success"] if greedy.exists() else None,
    }


def _rates(results: list[dict[str, Any]]) -> np.ndarray:
    return np.array([result["success"] for result in results])


def _described(method: str, number: int, results: list[dict[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
    cpu = float(np.mean([result["cpu_seconds"] for result in results]))
    rows = [averaged(f"success, {method}, round {number}", _rates(results), seeds, cpu_seconds=cpu)]
    for name, key in (("well-formed messages", "well_formed"), ("success, greedy", "greedy")):
        values = [result[key] for result in results]
        if None not in values:
            rows.append(averaged(f"{name}, {method}, round {number}", values, seeds))
    return rows


def _margins(found: Results, seeds: list[int], methods: Collection[str]) -> list[dict[str, Any]]:
    """Of ours over every other method, then of each variant of it over every baseline."""
    rows = []
    for mine, how in VARIANTS.items():
        others = {OURS} if mine == OURS else VARIANTS
        for (method, number), results in found.items():
            if not {method, mine} & set(methods):
                continue
            if method not in others and number and (mine, number) in found:
                less = _rates(found[mine, number]) - _rates(results)
                aimed = mine != PAPER_SMALL and method not in VARIANTS
                target = ("> 0", beyond_doubt) if aimed else ()
                rows.append(averaged(f"margin over {method}, round {number}{how}", less, seeds, *target))
    return rows


def _targets(found: Results, seeds: list[int], rounds: int) -> list[dict[str, Any]]:
    start, oracle = _rates(next(found[method, 0] for method in METHODS if (method, 0) in found)), _oracle()
    rows = [averaged("pi_0's success", start, seeds, ".15 to .25", lambda mean, low: 0.15 <= mean <= 0.25)]
    aims: list[tuple[str, int, float, str]] = [
        (OURS, 1, 0.58, "0.58"),
        (OURS, 3, 0.82, "0.82"),
        (LAST, 3, 0.82, "0.82"),
        (PAPER_SMALL, 3, 0.75, "0.75"),
        (SMALL, 1, 0.58, "0.58"),
        (SMALL, 3, 0.82, "0.82"),
        (SMALL, 5, 0.97 * oracle, "97 % of the oracle's"),
        (OURS, 5, 0.97 * oracle, "97 % of the oracle's"),
    ]
    for method, number, least, said in aims:
        if (method, number) in found:
            name = f"success after {number} rounds{VARIANTS[method]}"
            rows.append(averaged(name, _rates(found[method, number]), seeds, f">= {said}", at_least(least)))
    for method in (OURS, SMALL):
        if (method, rounds) not in found:
            continue
        name = f"success after {rounds} rounds over pi_0's{VARIANTS[method]}"
        rows.append(averaged(name, _rates(found[method, rounds]) / start, seeds, ">= 3", at_least(3)))
        first, well = (np.array([one["well_formed"] for one in found[method, number]]) for number in (0, rounds))
        name = f"well-formed messages less pi_0's{VARIANTS[method]}"
        rows.append(averaged(name, well - first, seeds, ">= -0.02", at_least(-0.02)))
    return [*rows, figure("the scripted oracle's success", oracle, None, ">= .80", oracle >= 0.8)]


def _steps(found: Results, seeds: list[int]) -> list[dict[str, Any]]:
    """How many rounds of ours are worse than the one before, at .05 over all of them (Bonferroni)."""
    rows = []
    for mine in (OURS, SMALL):
        numbers = [number for method, number in found if method == mine and number]
        pairs = [pair for n in numbers for pair in zip(found[mine, n - 1], found[mine, n], strict=True)]
        worse = [ab_test(_arm(after), _arm(before), 0.05).p_value < 0.05 / len(pairs) for before, after in pairs]
        name = f"rounds significantly worse than the one before, of {len(pairs)}{VARIANTS[mine]}"
        if pairs:
            rows.append(figure(name, sum(worse), None, "0", not any(worse), seeds))
    return rows


def _arm(result: dict[str, Any]) -> Arm:
    return Arm(round(result["success"] * result["conversations"]), result["conversations"])


def _oracle() -> float:
    return outcome_of(collect(Script(1.0), environment(configuration(OURS, 0)), EVALUATION, 99, "oracle")).rate
