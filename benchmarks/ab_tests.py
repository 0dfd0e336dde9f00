"""Error rates of the A/B designs: how often each promotes where it should not, and where it should."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import ceil, sqrt
from typing import Any
from zlib import crc32

import numpy as np

from benchmarks.results_file import figure
from iterative_ppo.config import Config, load_config
from iterative_ppo.evaluation import replications
from iterative_ppo.evaluation.ab_test import assign
from iterative_ppo.evaluation.metrics import proportion_interval
from iterative_ppo.evaluation.plan import plan
from iterative_ppo.evaluation.replications import Promotions, Replications, World, share_promoted
from iterative_ppo.evaluation.sample_ratio import CONTINUOUS_E, ONE_LOOK_P, e_value, one_look_p
from iterative_ppo.evaluation.spending import upper_bounds

Row = dict[str, Any]
SEED = 0
BASES = (0.02, 0.1, 0.3, 0.7)
GAINS = {0.02: 0.01, 0.1: 0.03, 0.3: 0.05, 0.7: 0.05}
"""The least gain worth finding at each base rate."""
NULLS, POWERED, WORSE = 10_000, 4_000, 1_000
SIZE, DAYS, WINDOW = 3_000, 14, 600
"""Conversations of a simulated test, the days it takes, and the window of outcomes in conversations (about 3 days)."""
BUSINESS, ICC = 20, 0.05
GOLDEN = (4.8769, 3.3570, 2.6803, 2.2898, 2.0310)
"""One-sided .025, five equal looks (Jennison & Turnbull 2000)."""
IDS = 1_000_000


def figures() -> Iterator[Row]:
    """All rows, cheapest first."""
    alpha = shipped().gate.alpha
    yield golden_bounds()
    yield from assignment(shipped().abtest.challenger_share)
    yield from sample_ratio()
    for base in BASES:
        yield from false_promotions(base, alpha)
    yield from unequal_arms(0.3, alpha)
    for base in BASES:
        yield from worse_policies(base, alpha)
        yield from power(base, alpha)
    yield from power_in_businesses(0.3, alpha)
    yield from intervals(0.3, 0.05, alpha)


@cache
def shipped() -> Config:
    """The defaults."""
    return load_config()


def equal_looks(count: int) -> list[float]:
    return [look / count for look in range(1, count + 1)]


def designs(alpha: float, mde: float, business: int = 1, futility: bool = False) -> dict[str, Promotions]:
    """Each design as it is shipped, the e-process looked at after every pair."""
    looks = equal_looks(shipped().abtest.looks)
    return {
        "fixed": replications.sequential([1.0], alpha),
        "group sequential": replications.sequential(looks, alpha, mde=mde if futility else None),
        "anytime": replications.anytime(mde, alpha, business, futility=futility),
    }


def naive(alpha: float, looks: int) -> Promotions:
    """A z test at level alpha at each of so many looks."""
    fractions = equal_looks(looks)
    return replications.sequential(fractions, alpha, upper_bounds([1.0], alpha) * looks)


def ignoring_businesses(design: Promotions) -> Promotions:
    def promotions(tests: Replications) -> np.ndarray:
        return design(replace(tests, business=None))

    return promotions


def seed_of(name: str) -> list[int]:
    """Each figure has random numbers of its own."""
    return [SEED, crc32(name.encode())]


def golden_bounds() -> Row:
    began = time.process_time()
    bounds = upper_bounds(equal_looks(5), 0.025)
    worst = float(np.abs(np.array(bounds) - GOLDEN).max())
    seconds = time.process_time() - began
    return figure("golden bounds, greatest deviation", worst, None, "<= 1e-4", worst <= 1e-4, cpu_seconds=seconds)


def false_promotions(base: float, alpha: float) -> Iterator[Row]:
    """Type-I error under four kinds of null, the usual mistakes beside."""
    mde = GAINS[base]
    looks = equal_looks(shipped().abtest.looks)
    ordinary = designs(alpha, mde)
    drift = replications.drifting(base, SIZE, DAYS)
    worlds: list[tuple[str, World, dict[str, Promotions], dict[str, Promotions]]] = [
        ("null", replications.textbook(base, 0.0, SIZE), ordinary, {"naive z, 40 looks": naive(alpha, 40)}),
        ("drifting null", replications.textbook(drift, 0.0, SIZE), ordinary, {}),
        (
            "null in businesses",
            replications.businesses(base, 0.0, SIZE // BUSINESS, BUSINESS, ICC),
            designs(alpha, mde, BUSINESS),
            {"naive z, businesses ignored": ignoring_businesses(ordinary["fixed"])},
        ),
        (
            "null, late outcomes",
            replications.late(base, SIZE, WINDOW),
            ordinary,
            {"group sequential, counted as they close": replications.as_they_close(looks, alpha)},
        ),
    ]
    for name, world, sound, mistaken in worlds:
        yield from promoted(f"{name} at {base:g}", world, sound, NULLS, alpha, mistaken)


def unequal_arms(base: float, alpha: float) -> Iterator[Row]:
    """A drifting null where a fifth meet the challenger: pairs must be near in time."""
    world = replications.textbook(replications.drifting(base, SIZE, DAYS), 0.0, SIZE, share=0.2)
    mistaken = {"anytime, k-th with k-th": replications.anytime(GAINS[base], alpha, pairing=kth_with_kth)}
    yield from promoted(
        f"drifting null at {base:g}, share 0.2", world, designs(alpha, GAINS[base]), NULLS, alpha, mistaken
    )


def kth_with_kth(challenger: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair the k-th conversation of either arm."""
    first, second = np.flatnonzero(~challenger), np.flatnonzero(challenger)
    count = min(len(first), len(second))
    return first[:count], second[:count]


def promoted(
    name: str,
    world: World,
    sound: dict[str, Promotions],
    experiments: int,
    alpha: float,
    mistaken: dict[str, Promotions] | None = None,
) -> Iterator[Row]:
    """Shares of promotions: at most alpha and 3 standard errors of it for sound designs, for others as it comes."""
    began = time.process_time()
    everyone = {**sound, **(mistaken or {})}
    shares = share_promoted(world, list(everyone.values()), experiments, seed_of(name))
    seconds = (time.process_time() - began) / len(everyone)
    bound = alpha + 3 * sqrt(alpha * (1 - alpha) / experiments)
    for design, share in zip(everyone, shares, strict=True):
        interval = proportion_interval(round(share * experiments), experiments)
        judged = (f"<= {bound:.4f}", share <= bound) if design in sound else (None, None)
        yield figure(f"{name}: {design}", share, interval, *judged, [SEED], seconds)


def worse_policies(base: float, alpha: float) -> Iterator[Row]:
    """A challenger two points worse (at base .02: never successful) is promoted in at most alpha of the tests."""
    world = replications.textbook(base, -0.02, SIZE)
    for row in promoted(f"2 points worse at {base:g}", world, designs(alpha, GAINS[base]), WORSE, alpha):
        yield {**row, "target": f"<= {alpha:g}", "holds": row["value"] <= alpha}


def power(base: float, alpha: float) -> Iterator[Row]:
    """Promotions at the planned size where the gain is the MDE, futile tests stopped."""
    mde = GAINS[base]
    config = shipped().abtest.model_copy(update={"mde": mde})
    for planned, (name, design) in zip(
        plan(config, alpha, base), designs(alpha, mde, futility=True).items(), strict=True
    ):
        world = replications.textbook(base, mde, planned.most)
        yield found(f"power at {base:g} {mde:+g}, {planned.most} conversations: {name}", world, design)


def power_in_businesses(base: float, alpha: float) -> Iterator[Row]:
    """The same where businesses are assigned."""
    mde = GAINS[base]
    settings = {"unit": "business", "mde": mde, "business_conversations": BUSINESS, "business_icc": ICC}
    config = shipped().abtest.model_copy(update=settings)
    for planned, (name, design) in zip(
        plan(config, alpha, base), designs(alpha, mde, BUSINESS, futility=True).items(), strict=True
    ):
        count = ceil(planned.most / BUSINESS)
        world = replications.businesses(base, mde, count, BUSINESS, ICC)
        yield found(f"power at {base:g} {mde:+g}, {count} businesses: {name}", world, design)


def found(name: str, world: World, design: Promotions) -> Row:
    began = time.process_time()
    [share] = share_promoted(world, [design], POWERED, seed_of(name))
    interval = proportion_interval(round(share * POWERED), POWERED)
    return figure(name, share, interval, ">= 0.78", share >= 0.78, [SEED], time.process_time() - began)


def intervals(base: float, gain: float, alpha: float) -> Iterator[Row]:
    """How often the lower end is ever above the true gain."""
    looks = equal_looks(shipped().abtest.looks)
    ends = {
        "group sequential": replications.missed(looks, alpha, gain),
        "anytime": replications.anytime(gain, alpha, margin=gain),
    }
    yield from promoted(
        f"interval misses {base:g} {gain:+g}", replications.textbook(base, gain, SIZE), ends, NULLS, alpha
    )


def assignment(share: float) -> Iterator[Row]:
    """A million ids under two salts: the challenger's share, and the correlation of the two."""
    began = time.process_time()
    first, second = (
        np.array([assign(f"conversation-{i}", salt, share) == "challenger" for i in range(IDS)])
        for salt in ("round-0001", "round-0002")
    )
    seconds = (time.process_time() - began) / 2
    error = sqrt(share * (1 - share) / IDS)
    value, correlation = float(first.mean()), float(np.corrcoef(first, second)[0, 1])
    interval = proportion_interval(int(first.sum()), IDS)
    target = f"{share:g} +- {3 * error:.4f}"
    yield figure("assignment: share", value, interval, target, abs(value - share) <= 3 * error, (), seconds)
    bound = 3 / sqrt(IDS)
    target = f"0 +- {bound:g}"
    yield figure(
        "assignment: correlation across salts", correlation, None, target, abs(correlation) <= bound, (), seconds
    )


def sample_ratio() -> Iterator[Row]:
    """False alarms where assignment is right: one look at the end, and the e-process after every unit."""
    began = time.process_time()
    rng = np.random.default_rng(SEED)
    ever, final = 0, 0
    units = np.arange(1, SIZE + 1)
    for _ in range(NULLS // 500):
        challengers = np.cumsum(rng.random((500, SIZE)) < 0.5, axis=1)
        ever += int((e_value(units - challengers, challengers, 0.5) >= CONTINUOUS_E).any(axis=1).sum())
        final += sum(one_look_p(SIZE - int(n), int(n), 0.5) < ONE_LOOK_P for n in challengers[:, -1])
    seconds = (time.process_time() - began) / 2
    bound = ONE_LOOK_P + 3 * sqrt(ONE_LOOK_P / NULLS)
    for name, alarms in (("one look", final), (f"{SIZE} looks", ever)):
        interval = proportion_interval(alarms, NULLS)
        holds = alarms / NULLS <= bound
        label = f"sample-ratio false alarms, {name}"
        yield figure(label, alarms / NULLS, interval, f"<= {bound:.4f}", holds, [SEED], seconds)
