"""How many conversations and days each design needs to find a gain, and how many it is expected to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from iterative_ppo.config import ABTestConfig, Config, GateConfig
from iterative_ppo.errors import ConfigError
from iterative_ppo.evaluation.e_process import leverages, mixture
from iterative_ppo.evaluation.experiment import LEAST_BUSINESSES, DesignName
from iterative_ppo.evaluation.guardrails import least_conversations
from iterative_ppo.evaluation.spending import crossing, upper_bounds

SIMULATED, OF_BUSINESSES = 5000, 2000
"""Tests that are simulated; fewer of businesses, whose units have more values than two."""
STEPS = 400
HORIZONS = (3, 6, 12)
"""Fixed samples that are simulated: so many, and more where they do not reach the power."""
ENOUGH = 0.95
"""Probability that chance gives each arm the businesses that a look asks for; else the test waits for more."""


@dataclass(frozen=True)
class PlannedDesign:
    """Conversations, both arms together, in the ramp's last stage; days from the start of the ramp to the verdict.

    `most` is the size at which the test ends at the latest, with at least the wished power; then what it is expected
    to take where the challenger is no better, and where it is better by the MDE, stopping early as the design does.
    """

    design: DesignName
    most: int
    expected_if_equal: int
    expected_if_better: int
    most_days: float | None
    expected_days_if_equal: float | None
    expected_days_if_better: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Stops:
    """A design's size, and its expected sizes under no gain and under the MDE, in units of the fixed sample."""

    most: float
    if_equal: float
    if_better: float


def plan(
    config: ABTestConfig,
    alpha: float,
    base: float,
    conversations_per_day: float | None = None,
    window_hours: float = 0.0,
) -> list[PlannedDesign]:
    """Sizes of the three designs for a champion's success rate `base` and the MDE, power and shares of `config`.

    Args:
        conversations_per_day: traffic of both arms together; None leaves the days out.
        window_hours: from assignment to maturity.

    Where businesses are assigned, the fixed sample is multiplied by 1 + (m - 1) ICC, and every size is of whole
    businesses and lets each arm have as many as a look asks for. Raises ConfigError for rates that cannot be, and where
    a design has no such size.
    """
    if not 0 < base < base + config.mde < 1:
        raise ConfigError(f"base {base:g} and mde {config.mde:g}: both must be shares above 0 and their sum below 1")
    if conversations_per_day is not None and not 0 < conversations_per_day < math.inf:
        raise ConfigError(f"{conversations_per_day:g} conversations a day: expected more than 0, or none for no days")
    size, icc, least = 1, 0.0, 0
    if config.unit == "business":
        size, icc = config.business_conversations, config.business_icc
        least = size * least_businesses(config.challenger_share)
    fixed = design_effect(size, icc) * fixed_sample(base, config.mde, alpha, config.power, config.challenger_share)
    waiting = (config.ramp_hours * len(config.ramp) + window_hours) / 24

    def days(size: float) -> float | None:
        return None if conversations_per_day is None else round(waiting + size / conversations_per_day, 1)

    designs: list[tuple[DesignName, Stops]] = [
        ("fixed", Stops(1.0, 1.0, 1.0)),
        ("group_sequential", group_sequential_stops(config.looks, alpha, config.power)),
        ("anytime", e_process_stops(base, config.mde, alpha, config.power, config.challenger_share, size, icc)),
    ]
    planned = []
    for name, stops in designs:
        parts = (stops.most, stops.if_equal, stops.if_better)
        sizes = [size * math.ceil(max(least, fixed * part) / size - 1e-9) for part in parts]
        planned.append(PlannedDesign(name, *sizes, *map(days, sizes)))
    return planned


def design_effect(size: int, icc: float) -> float:
    """Of businesses of so many conversations with that intraclass correlation."""
    return 1 + (size - 1) * icc


def least_businesses(share: float) -> int:
    """The fewest that give both arms what a look asks for with probability `ENOUGH`; `share` is the challenger's."""
    from scipy.stats import binom

    each = LEAST_BUSINESSES // 2
    count = 2 * each
    while binom.cdf(count - each, count, share) - binom.cdf(each - 1, count, share) < ENOUGH:
        count += 1
    return count


def coarse(mde: float, base: float | None) -> str | None:
    """Why this MDE is too large for a champion of success rate `base`, and what to set; None where it is not."""
    if base is None or base <= 0 or mde < base / 2:
        return None
    finer = float(f"{base / 4:.1g}")
    return (
        f"abtest.mde {mde:.1%} beside a champion's success rate of {base:.1%}: tests and rounds end where less is "
        f"to be gained, so that {(base + mde) / base:.2g} times as many successes may be missed; set abtest.mde to "
        f"about {finer:g}, and abtest.conversations to what `ippo plan --base {base:.2g} --mde {finer:g}` says"
    )


def too_few(gate: GateConfig, test: ABTestConfig) -> str | None:
    """Which guardrail this size of test cannot tell where nothing of it is seen, and what to set; None where it can.

    A design that looks on the way may ask the guardrails twice, at half the level each time.
    """
    asked = 1 if test.design == "fixed" else 2
    size = test.business_conversations if test.unit == "business" else 1
    needed = least_conversations(gate.guardrails, gate.alpha / asked, size)
    if not needed:
        return None
    name = max(needed, key=needed.__getitem__)
    most = math.ceil(needed[name] / test.smaller_share)
    if test.conversations >= most:
        return None
    return (
        f"guardrail {name} needs {most:,} conversations to be told where neither arm shows any, and one that is not "
        f"told rejects every challenger: set abtest.conversations to {most} or more, or "
        f"gate.guardrails.{name}.margin above {gate.guardrails[name].margin:g}"
    )


def misgivings(config: Config, base: float | None) -> list[str]:
    """What speaks against the configured A/B test of a champion of success rate `base`, each with what to set."""
    return [told for told in (coarse(config.abtest.mde, base), too_few(config.gate, config.abtest)) if told]


def fixed_sample(base: float, mde: float, alpha: float, power: float, share: float) -> float:
    """Conversations of both arms for the one-sided score test of two proportions; `share` is the challenger's."""
    from statsmodels.stats.proportion import samplesize_proportions_2indep_onetail

    ratio = (1 - share) / share
    challengers = samplesize_proportions_2indep_onetail(mde, base, power, ratio, alpha, alternative="larger")
    return float(challengers) * (1 + ratio)


def group_sequential_stops(looks: int, alpha: float, power: float) -> Stops:
    """Of Lan-DeMets O'Brien-Fleming bounds at equal looks that also stop where the MDE is ruled out.

    Raises ConfigError where no size has this power, as for one that is no more than alpha.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    fractions = [look / looks for look in range(1, looks + 1)]
    upper = upper_bounds(fractions, alpha)
    needed = norm.isf(alpha) - norm.isf(power)

    def futile(drift: float) -> list[float]:
        """The repeated interval's upper end is below the MDE: z + bound < drift * sqrt(t)."""
        return [drift * math.sqrt(t) - bound for t, bound in zip(fractions, upper, strict=True)]

    def lacking(drift: float) -> float:
        return float(crossing(fractions, upper, futile(drift), drift)[0].sum() - power)

    if not lacking(needed / 2) < 0 < lacking(3 * needed):
        raise ConfigError(
            f"the group sequential design has no size for alpha {alpha:g} and power {power:g}; expected an alpha such "
            "as 0.05 and a power well above it, such as 0.8"
        )
    drift = float(brentq(lacking, needed / 2, 3 * needed))
    sizes = [_expected(fractions, *crossing(fractions, upper, futile(drift), truth)) for truth in (0.0, drift)]
    inflation = (drift / needed) ** 2
    return Stops(inflation, inflation * sizes[0], inflation * sizes[1])


def e_process_stops(
    base: float, mde: float, alpha: float, power: float, share: float, size: int = 1, icc: float = 0.0
) -> Stops:
    """Of the e-process by simulation with a fixed seed, tests under no gain and under the MDE.

    Its units are means of `size` conversations of a business with that correlation; an arm's surplus of them over the
    other is not paired. Raises ConfigError where no simulated horizon reaches the power.
    """
    effect = design_effect(size, icc)
    pairs = fixed_sample(base, mde, alpha, power, 0.5) * effect / size / 2
    pairs = max(pairs, -math.log(alpha) / mde)  # no bet gains more than about the MDE a pair, however alike means are
    champions, challengers = (_units(rate, size, icc) for rate in (base, base + mde))
    for horizon in (math.ceil(multiple * pairs) for multiple in HORIZONS):
        promoted, futile = _stopping_times(champions, challengers, mde, horizon, alpha)
        most = float(np.quantile(np.where(promoted <= futile, promoted, np.inf), power, method="higher"))
        if np.isfinite(most):
            break
    else:
        raise ConfigError(f"the anytime design misses power {power:g} even at {HORIZONS[-1]} fixed samples; lower it")
    null = np.minimum(*_stopping_times(champions, champions, mde, horizon, alpha))
    expected = [np.minimum(times, most).mean() for times in (null, np.minimum(promoted, futile))]
    fixed = effect * fixed_sample(base, mde, alpha, power, share)
    sizes = [size * _assigned(count, share) / fixed for count in (most, *expected)]
    return Stops(*sizes)


def _assigned(pairs: float, share: float) -> float:
    """Units that hold so many pairs: the rarer arm's, and with equal arms also the chance surplus."""
    surplus = math.sqrt(4 * pairs / math.pi) if share == 0.5 else 0.0
    return pairs / min(share, 1 - share) + surplus


def _units(rate: float, size: int, icc: float) -> np.ndarray:
    """(size + 1,) probabilities that a unit's mean is 1, 1 - 1 / size, ..., 0; a business's own rate is Beta."""
    from scipy.stats import betabinom, binom

    successes = np.arange(size, -1, -1)
    if icc == 0 or size == 1:
        return np.asarray(binom.pmf(successes, size, rate))
    weight = (1 - icc) / icc
    return np.asarray(betabinom.pmf(successes, size, rate * weight, (1 - rate) * weight))


@dataclass(frozen=True)
class _Drawn:
    """Means of units in each of R simulated tests: `values` (K, 1 or R), each `counts` (K, R) times.

    Drawn one by one, or, where they are more than half as many as the values that there are, counted by value.
    """

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, rng: np.random.Generator, chances: np.ndarray, units: int, tests: int) -> _Drawn:
        size = len(chances) - 1
        if units > size / 2:
            values = np.arange(size, -1, -1)[:, None] / size
            return cls(values, rng.multinomial(units, chances, tests).T)
        places = np.searchsorted(np.cumsum(chances[:-1]), rng.random((units, tests)), side="right")
        return cls(1 - places / size, np.ones((units, tests)))

    def summed(self, of_each: np.ndarray) -> np.ndarray:
        """(..., R) sums over the units of a (..., K, R) function of their values."""
        total: np.ndarray = (self.counts * of_each).sum(axis=-2)
        return total


def _stopping_times(
    champions: np.ndarray, challengers: np.ndarray, mde: float, horizon: int, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """(R,) pairs until promotion and until the MDE is ruled out; infinite where never.

    Args:
        champions, challengers: probabilities of their units' means, as `_units` has them.

    In steps, from one pair to half a percent of the horizon, within which the bets stay as they are: so each step
    needs only how often each mean came, and planning takes little longer for a small gain than for a large one.
    """
    rng, tests = np.random.default_rng(0), SIMULATED if len(champions) == 2 else OF_BUSINESSES
    total, squares, times = np.zeros(tests), np.zeros(tests), np.full((2, tests), np.inf)
    better, worse = np.zeros((2, 3, tests))
    ends = np.unique(np.ceil(horizon * np.linspace(0, 1, STEPS + 1) ** 2).astype(int))
    for begin, end in pairwise(ends.tolist()):
        centre = (total + 0.5) / (2 * begin + 1)
        variance = (squares + 0.5) / (2 * begin + 1) - centre**2
        champion, challenger = (_Drawn.of(rng, chances, end - begin, tests) for chances in (champions, challengers))
        better += _step(champion, challenger, centre, variance, mde, 0.0)
        worse += _step(challenger, champion, centre, variance, mde, -mde)
        for drawn in (champion, challenger):
            total, squares = total + drawn.summed(drawn.values), squares + drawn.summed(drawn.values**2)
        reached = np.array([mixture(list(better)), mixture(list(worse))]) >= -math.log(alpha)
        times = np.where(reached & np.isinf(times), end, times)
    return times[0], times[1]


def _step(
    champion: _Drawn, challenger: _Drawn, centre: np.ndarray, variance: np.ndarray, mde: float, margin: float
) -> np.ndarray:
    """(3, R) log factors of the three bets over pairs of these units."""
    bets = np.array(leverages(centre, variance, mde, margin))[:, None]
    lost = champion.summed(np.log(1 - bets * (champion.values - centre)))
    return lost + challenger.summed(np.log(1 + bets * (challenger.values - centre - margin)))


def _expected(fractions: Sequence[float], above: np.ndarray, below: np.ndarray) -> float:
    """Expected fraction at the stop; the last look ends what is left."""
    stopped = above[:-1] + below[:-1]
    return float(stopped @ np.array(fractions[:-1]) + (1 - stopped.sum()) * fractions[-1])
