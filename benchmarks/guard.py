"""`make bench-guard`: what the guards against over-optimising Q save where unguarded PPO falls, on the simulator.

PPO alone, with a penalty too weak to hold it (beta .1), against the Q of 1,500 conversations of pi_0, several seeds.
After each rollout: success on fresh customers, which no guard sees; KL to pi_0; and on logged states that nobody was
fitted to, what the judges, whom PPO does not see, say of its responses beside those of pi_0. Every guard is a rule of
when to stop, read off the same runs; pessimism is a run of its own. Resumable by seed and run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.q_cells import cell
from benchmarks.results_file import averaged, figure, write
from iterative_ppo.config import load_config
from iterative_ppo.environments.rollout import collect
from iterative_ppo.evaluation.ab_test import Arm, ab_test
from iterative_ppo.mdp.rendering import single

ROLLOUTS, CONVERSATIONS, STATES, SAMPLES = 12, 1500, 400, 4
EARLY = 3
"""Rollouts after which success was highest in most of the runs that were made before this was asked."""
WEAK: dict[str, Any] = {
    "q.members": 3,
    "q.judges": 2,
    "q.corpus_epochs": 0.0,
    "improve.ppo.kl_coefficient": 0.1,
    "improve.ppo.episodes": 512 * ROLLOUTS,
}
RUNS: dict[str, dict[str, Any]] = {"mean of the members": {}, "mean - 1 sd": {"q.pessimism": 1.0}}
Curve = list[dict[str, float]]


def run(overrides: dict[str, Any], seed: int) -> dict[str, Any]:
    """A seed's curve, pi_0 first: one entry a rollout."""
    from benchmarks.learning import first_round
    from iterative_ppo.learning.improve import ppo
    from iterative_ppo.learning.improve.episodes import prompts_of
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.rounds import evaluate_policy, round_of
    from tasks.traffic import to_rows

    config = load_config(None, {"seed": seed, **WEAK, **overrides})
    policy, environment, talks, _ = first_round(config)
    current = round_of(policy, to_rows(config, talks), config)
    q = evaluate_policy(policy, current, [], config)
    values = q.evaluate(current.encoded)
    scale = float(np.nanstd((values.q - values.v)[current.fit]))
    prompts, held = (prompts_of(current.encoded.sequences, np.flatnonzero(p)) for p in (current.fit, ~current.fit))
    held = held[:STATES]
    before, _, _ = judged(policy, policy, q, held)

    def described(student: LanguagePolicy) -> dict[str, float]:
        fresh = collect(student, environment, CONVERSATIONS, 6_000_000 + seed, "guard")
        judges, members, kl = judged(student, policy, q, held)
        gain = judges - before
        return {
            "kl": kl,
            "success": float(np.mean([talk.turns[-1].outcomes[0] > 0 for talk in fresh])),
            "q": float(members.mean()),
            "gain": float(gain.mean()),
            "worse": float(np.mean(gain < -0.02)),
            "loss": float(np.minimum(gain, 0.0).mean()),
        }

    sizes = [config.improve.ppo.rollout] * ROLLOUTS
    going = ppo.begin(policy.trainable_copy(), q, config.improve.ppo, sizes, scale, seed)
    curve = [described(policy)]
    for size in sizes:
        ppo.advance(going, q, prompts, config.improve.ppo, size, scale, seed, policy)
        curve.append(described(going.student))
    return {"curve": curve}


def judged(
    student: Any, policy: Any, q: Any, prompts: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray, float]:
    """(states,) mean Q of the student's responses, by the judges and by what PPO sees, and its KL to the policy."""
    from iterative_ppo.learning.batching import EncodedTable
    from iterative_ppo.learning.improve.episodes import token_log_probs

    said = student.respond(prompts, 1, samples=SAMPLES)
    sequences = [single(k, prompts[k // SAMPLES], tokens, True) for k, tokens in enumerate(said.tokens)]
    theirs = [p.sum() for p in token_log_probs(policy, EncodedTable(sequences, len(sequences)))]
    by_judges, by_members = (
        np.array([value[-1] for value in values]).reshape(-1, SAMPLES).mean(axis=1)
        for values in (q.judge_values(sequences), q.running_values(sequences))
    )
    return by_judges, by_members, float(np.mean(said.logprobs - theirs))


def last(curve: Curve) -> int:
    return len(curve) - 1


def top(key: str) -> Callable[[Curve], int]:
    """Where a figure was highest."""
    return lambda curve: int(np.argmax([entry[key] for entry in curve]))


def bounded(key: str, limit: float) -> Callable[[Curve], int]:
    """Stops before the first rollout at which a figure was above its limit."""
    return lambda curve: next((k for k, entry in enumerate(curve) if entry[key] > limit), len(curve)) - 1


RULES: dict[str, Callable[[Curve], int]] = {
    "no guard": last,
    "KL budget of .5 nats": bounded("kl", 0.5),
    "KL budget of 1 nat": bounded("kl", 1.0),
    "KL budget of 2 nats": bounded("kl", 2.0),
    "judges' gain highest": top("gain"),
    "a tenth of states worse": bounded("worse", 0.1),
    "hindsight": top("success"),
}


def falls(curve: Curve) -> bool:
    """Whether success ends significantly below what it was after EARLY rollouts, at .05."""
    early, end = (Arm(round(entry["success"] * CONVERSATIONS), CONVERSATIONS) for entry in (curve[EARLY], curve[-1]))
    return ab_test(end, early, 0.05).p_value < 0.05


def rows_of(name: str, curves: dict[int, Curve]) -> list[dict[str, Any]]:
    """What each rule reaches and saves over all seeds; the latter also over those where the unguarded run falls."""
    falling = [seed for seed, curve in curves.items() if falls(curve)]
    rows = [figure(f"{name}: seeds that fall without a guard, of {len(curves)}", len(falling), None, seeds=falling)]
    for rule, stop in RULES.items():
        reached = {seed: curve[stop(curve)]["success"] for seed, curve in curves.items()}
        saved = {seed: reached[seed] - curve[-1]["success"] for seed, curve in curves.items()}
        rows += [_row(f"{name}, {rule}: success", reached), _row(f"{name}, {rule}: saved", saved)]
        if len(falling) > 1:
            rows.append(_row(f"{name}, {rule}: saved where it falls", {seed: saved[seed] for seed in falling}))
    return rows


def _row(name: str, values: dict[int, float]) -> dict[str, Any]:
    return averaged(name, list(values.values()), list(values))


def main() -> None:
    """Measure what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = list(range(parser.parse_args().seeds))
    torch.set_num_threads(1)
    rows = []
    for name, overrides in RUNS.items():
        settings = [WEAK, overrides, ROLLOUTS, CONVERSATIONS, STATES, SAMPLES]
        curves = {s: cell("guard", name, s, settings, lambda o=overrides, s=s: run(o, s))["curve"] for s in seeds}
        rows += rows_of(name, curves)
    write("bench-guard", rows)


if __name__ == "__main__":
    main()
