"""Rounds that did nothing: their challenger is the champion, so every bound on a gain is small. Do they "converge"?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from benchmarks.chain_logs import Log, behaviours, fitted_q
from benchmarks.results_file import figure
from iterative_ppo.config import load_config
from iterative_ppo.evaluation.ab_test import Arm, ab_test
from iterative_ppo.evaluation.certificate import certify
from iterative_ppo.evaluation.convergence import ROUNDS_RUNNING, RoundFigures, convergence
from iterative_ppo.evaluation.metrics import proportion_interval

CONFIG = load_config()
RUNS, CONVERSATIONS, BASE, SEED = 1000, 750, 0.3, 0


def rows(runs: int = RUNS) -> Iterator[dict[str, object]]:
    """How often such rounds are called converged, by the KL that they spent; beside, as if they had spent all of it."""
    began, budget = time.process_time(), CONFIG.rounds.kl_budget
    figures = [idle(run) for run in range(runs)]
    cpu = time.process_time() - began
    for name, kl, aim in (
        ("none", 0.0, "0"),
        ("a third", budget / 3, "0"),
        ("all (what the rule guards)", budget, None),
    ):
        called = sum(convergence([replace(one, kl=kl) for one in rounds], CONFIG).converged for rounds in figures)
        share = called / runs
        what = f"idle rounds called converged, KL budget spent: {name}"
        interval = proportion_interval(called, runs)
        yield figure(what, share, interval, aim, None if aim is None else called == 0, [SEED], cpu)


def idle(run: int) -> list[RoundFigures]:
    """What two rounds of a run measure where the challenger is the champion of round 1, with customers too."""
    champion, rng = behaviours()["round 1"], np.random.default_rng([SEED, run])
    found = []
    for seed in rng.integers(2**31, size=ROUNDS_RUNNING):
        log = Log.sample(champion, CONVERSATIONS, int(seed))
        q, v = fitted_q(log, champion)
        certificate = certify(log.turns(champion, q, v, np.zeros(len(log.state))), CONFIG.gate)
        half = CONFIG.abtest.conversations // 2
        before, after = (Arm(int(rng.binomial(half, BASE)), half) for _ in range(2))
        high = ab_test(before, after, CONFIG.gate.alpha).gain_high
        found.append(RoundFigures(None, True, None if certificate.refusal else certificate.high, high))
    return found
