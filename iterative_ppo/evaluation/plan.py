"""How many conversations and days each design needs to find a gain, and how many it is expected to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from iterative_ppo.config import ABTestConfig
from iterative_ppo.errors import ConfigError
from iterative_ppo.evaluation.e_process import leverages, mixture
from iterative_ppo.evaluation.experiment import LEAST_BUSINESSES, DesignName
from iterative_ppo.evaluation.spending import crossing, upper_bounds

SIMULATED = 5000
STEPS = 400
HORIZONS = (3, 6, 12)
"""Fixed samples that are simulated: so many, and more where they do not reach the power."""


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

    Where businesses are assigned, sizes are multiplied by 1 + (m - 1) ICC, and let each arm have as many businesses as
    a look asks for. Raises ConfigError for rates that cannot be, and where a design
    has no such size.
    """
    if not 0 < base < base + config.mde < 1:
        raise ConfigError(f"base {base:g} and mde {config.mde:g}: both must be shares above 0 and their sum below 1")
    if conversations_per_day is not None and not 0 < conversations_per_day < math.inf:
        raise ConfigError(f"{conversations_per_day:g} conversations a day: expected more than 0, or none for no days")
    effect, least = 1.0, 0.0
    if config.unit == "business":
        effect = 1 + (config.business_conversations - 1) * config.business_icc
        rarer = min(config.challenger_share, 1 - config.challenger_share)
        least = LEAST_BUSINESSES / 2 * config.business_conversations / rarer
    fixed = effect * fixed_sample(base, config.mde, alpha, config.power, config.challenger_share)
    waiting = (config.ramp_hours * len(config.ramp) + window_hours) / 24

    def days(size: float) -> float | None:
        return None if conversations_per_day is None else round(waiting + size / conversations_per_day, 1)

    designs: list[tuple[DesignName, Stops]] = [
        ("fixed", Stops(1.0, 1.0, 1.0)),
        ("group_sequential", group_sequential_stops(config.looks, alpha, config.power)),
        ("anytime", e_process_stops(base, config.mde, alpha, config.power, config.challenger_share)),
    ]
    planned = []
    for name, stops in designs:
        sizes = [math.ceil(max(least, fixed * size) - 1e-9) for size in (stops.most, stops.if_equal, stops.if_better)]
        planned.append(PlannedDesign(name, *sizes, *map(days, sizes)))
    return planned


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


def e_process_stops(base: float, mde: float, alpha: float, power: float, share: float) -> Stops:
    """Of the e-process by simulation with a fixed seed, 5,000 tests under no gain and under the MDE.

    An arm's surplus over the other is not paired. Raises ConfigError where no simulated horizon reaches the power.
    """
    pairs = fixed_sample(base, mde, alpha, power, 0.5) / 2
    for horizon in (math.ceil(multiple * pairs) for multiple in HORIZONS):
        promoted, futile = _stopping_times(base, mde, mde, horizon, alpha)
        most = float(np.quantile(np.where(promoted <= futile, promoted, np.inf), power, method="higher"))
        if np.isfinite(most):
            break
    else:
        raise ConfigError(f"the anytime design misses power {power:g} even at {HORIZONS[-1]} fixed samples; lower it")
    null = np.minimum(*_stopping_times(base, 0.0, mde, horizon, alpha))
    expected = [np.minimum(times, most).mean() for times in (null, np.minimum(promoted, futile))]
    units = fixed_sample(base, mde, alpha, power, share)
    sizes = [_conversations(count, share) / units for count in (most, *expected)]
    return Stops(*sizes)


def _conversations(pairs: float, share: float) -> float:
    """Conversations that hold so many pairs: the rarer arm's, and with equal arms also the chance surplus."""
    surplus = math.sqrt(4 * pairs / math.pi) if share == 0.5 else 0.0
    return pairs / min(share, 1 - share) + surplus


def _stopping_times(base: float, gain: float, mde: float, horizon: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """(SIMULATED,) pairs until promotion and until the MDE is ruled out; infinite where never.

    In steps, from one pair to half a percent of the horizon, within which the bets stay as they are: so each step
    needs only its counts of successes, and planning takes no longer for a small gain than for a large one.
    """
    rng, successes = np.random.default_rng(0), np.zeros(SIMULATED)
    better, worse = np.zeros((3, SIMULATED)), np.zeros((3, SIMULATED))
    times = np.full((2, SIMULATED), np.inf)
    ends = np.unique(np.ceil(horizon * np.linspace(0, 1, STEPS + 1) ** 2).astype(int))
    for begin, end in pairwise(ends.tolist()):
        centre = (successes + 0.5) / (2 * begin + 1)
        champion, challenger = (rng.binomial(end - begin, rate, SIMULATED) for rate in (base, base + gain))
        better += _step(champion, challenger, end - begin, centre, mde, 0.0)
        worse += _step(challenger, champion, end - begin, centre, mde, -mde)
        successes += champion + challenger
        reached = np.array([mixture(list(better)), mixture(list(worse))]) >= -math.log(alpha)
        times = np.where(reached & np.isinf(times), end, times)
    return times[0], times[1]


def _step(
    champion: np.ndarray, challenger: np.ndarray, pairs: int, centre: np.ndarray, mde: float, margin: float
) -> np.ndarray:
    """(3, R) log factors of the three bets over `pairs` pairs with so many successes."""
    bets = np.array(leverages(centre, centre * (1 - centre), mde, margin))
    lost = champion * np.log(1 - bets * (1 - centre)) + (pairs - champion) * np.log(1 + bets * centre)
    above = centre + margin
    won = challenger * np.log(1 + bets * (1 - above)) + (pairs - challenger) * np.log(1 - bets * above)
    factors: np.ndarray = lost + won
    return factors


def _expected(fractions: Sequence[float], above: np.ndarray, below: np.ndarray) -> float:
    """Expected fraction at the stop; the last look ends what is left."""
    stopped = above[:-1] + below[:-1]
    return float(stopped @ np.array(fractions[:-1]) + (1 - stopped.sum()) * fractions[-1])
