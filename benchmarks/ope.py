"""Offline evidence on the enumerable chain, where the truth is known: do its bounds cover, and is it unbiased?

`rows()` gives the figures for `make bench-gate`. A cell is a champion, a challenger at some KL from it, and many
replications of the evidence conversations; its coverage is the lesser of both one-sided 95 % bounds', where they are
not refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.chain_logs import CHAIN, GAMMA, Log, behaviours, divergence, fitted_q, improved, sampled_q
from benchmarks.results_file import figure
from iterative_ppo.config import load_config
from iterative_ppo.evaluation.certificate import Certificate, certify
from iterative_ppo.evaluation.metrics import proportion_interval
from iterative_ppo.evaluation.ope import Estimate, doubly_robust, estimates

Row = dict[str, object]
LIMITS = load_config().gate
REPLICATIONS = 1000
CERTIFICATE_CONVERSATIONS = 750
CERTIFICATE_KLS = (0.05, 0.2, 0.5, 1.0, 1.5, 2.5)
OPE_CONVERSATIONS = 1000
OPE_KLS = (0.02, 0.1, 0.5)
BIAS_CONVERSATIONS = 200_000
SAMPLES = 2
LEAST_TOLD = 50
"""Replications that are not refused, below which a coverage says nothing."""
TARGET = 0.93
WAYS = {"better": 1.0, "worse": -1.0}


@dataclass(frozen=True)
class Cell:
    """Bounds over R replications: (R,) lower, upper, and whether they were refused; and the truth."""

    low: np.ndarray
    high: np.ndarray
    refused: np.ndarray
    truth: float

    @property
    def told(self) -> int:
        return int((~self.refused).sum())

    @property
    def covered(self) -> int:
        """Replications in which the bound that covers less often does."""
        low, high = self.low[~self.refused], self.high[~self.refused]
        return int(min((low <= self.truth).sum(), (high >= self.truth).sum()))

    @property
    def wrong(self) -> float:
        """Share of all replications that support what is worse or block what is better."""
        spoken = self.low > 0 if self.truth <= 0 else self.high < 0
        return float((spoken & ~self.refused).mean())

    @property
    def coverage(self) -> float:
        """NaN where too few replications are told to say."""
        return self.covered / self.told if self.told >= LEAST_TOLD else float("nan")


def certificate_cell(
    champion: np.ndarray, challenger: np.ndarray, conversations: int, replications: int, seed: int
) -> Cell:
    """The certificate beside the exact sum_s d(s) sum_a (pi' - pi)(a) Q^pi, V from other conversations."""
    q, v = fitted_q(Log.sample(champion, conversations, seed + 1), champion)
    log = Log.sample(champion, conversations * replications, seed)
    turns = log.turns(challenger, q, v, np.zeros(len(log.state)))
    found = [certify(turns.rows(part), LIMITS) for part in log.parts(conversations)]
    visits = CHAIN.start @ CHAIN.visits(champion, GAMMA)
    truth = float(visits @ ((challenger - champion) * CHAIN.q_pi(champion, GAMMA)).sum(axis=1))
    return _cell(found, truth)


def ope_cells(
    champion: np.ndarray,
    challenger: np.ndarray,
    q: np.ndarray,
    conversations: int,
    replications: int,
    seed: int,
) -> dict[str, Cell]:
    """Every estimator beside the exact value of the challenger, with Q given as a table."""
    log = Log.sample(champion, conversations * replications, seed)
    sampled = sampled_q(log, challenger, q, SAMPLES, seed)
    turns = log.turns(challenger, q, (champion * q).sum(axis=1), sampled)
    found = [estimates(turns.rows(part), LIMITS) for part in log.parts(conversations)]
    value, before = CHAIN.value(challenger, GAMMA), CHAIN.value(champion, GAMMA)
    truths = dict.fromkeys(found[0], value) | {"logged": before, "doubly_robust_gain": value - before}
    cells = {}
    for name, truth in truths.items():
        cells[name] = _cell([one[name] for one in found], truth)
    return cells


def _cell(found: Sequence[Certificate | Estimate], truth: float) -> Cell:
    low, high = np.array([one.low for one in found]), np.array([one.high for one in found])
    return Cell(low, high, np.array([one.refusal is not None for one in found]), truth)


def challengers(kls: tuple[float, ...]) -> Iterator[tuple[str, np.ndarray, np.ndarray, float]]:
    """(what it is, champion, challenger, KL) for every KL that can be reached from the champion."""
    for name, champion in behaviours().items():
        for way, sign in WAYS.items():
            for kl in kls:
                challenger = improved(champion, kl, sign)
                if divergence(challenger, champion) >= 0.95 * kl:
                    yield f"KL {kl:g}, {way} than the champion of {name}", champion, challenger, kl


def coverage_row(what: str, cell: Cell, began: float) -> Row:
    """A cell's coverage, with how often it was refused in its name."""
    name = f"coverage of {what} ({1 - cell.told / len(cell.refused):.0%} refused)"
    cpu = time.process_time() - began
    if cell.told < LEAST_TOLD:
        return figure(name, float("nan"), cpu_seconds=cpu)
    interval = proportion_interval(cell.covered, cell.told)
    return figure(name, cell.coverage, interval, f">= {TARGET}", cell.coverage >= TARGET, cpu_seconds=cpu)


def rows(replications: int = REPLICATIONS) -> list[Row]:
    """Coverage of the certificate and of every off-policy estimator by KL, and the bias of the doubly robust."""
    return [*certificate_rows(replications), *ope_rows(replications)]


def certificate_rows(replications: int) -> Iterator[Row]:
    wrong = []
    for number, (what, champion, challenger, _) in enumerate(challengers(CERTIFICATE_KLS)):
        began = time.process_time()
        cell = certificate_cell(champion, challenger, CERTIFICATE_CONVERSATIONS, replications, 100 * number)
        yield coverage_row(f"the certificate, {what}", cell, began)
        wrong.append(cell.wrong)
    most = max(wrong)
    yield figure("wrong findings of the certificate, most in any of these", most, None, "<= 0.05", most <= 0.05)


def ope_rows(replications: int) -> Iterator[Row]:
    for number, (what, champion, challenger, _) in enumerate(challengers(OPE_KLS)):
        began = time.process_time()
        seed = 100_000 + 100 * number
        q, _ = fitted_q(Log.sample(champion, OPE_CONVERSATIONS, seed + 1), challenger)
        for name, cell in ope_cells(champion, challenger, q, OPE_CONVERSATIONS, replications, seed).items():
            if name not in ("logged", "q_model"):
                yield coverage_row(f"{name}, {what}", cell, began)
        yield unbiased(what, champion, challenger, seed + 2)


def unbiased(what: str, champion: np.ndarray, challenger: np.ndarray, seed: int) -> Row:
    """The doubly robust estimate with a Q that is noise: its error in standard errors, over many conversations."""
    began = time.process_time()
    wrong = np.random.default_rng(seed).random(CHAIN.reward.shape)
    log = Log.sample(champion, BIAS_CONVERSATIONS, seed)
    sampled = sampled_q(log, challenger, wrong, SAMPLES, seed)
    found = doubly_robust(log.turns(challenger, wrong, np.zeros(CHAIN.states), sampled))
    z = float((found.mean() - CHAIN.value(challenger, GAMMA)) / (found.std(ddof=1) / np.sqrt(len(found))))
    name = f"bias of doubly_robust with a wrong Q in standard errors, {what}"
    return figure(name, z, None, "within 3", abs(z) <= 3, cpu_seconds=time.process_time() - began)
