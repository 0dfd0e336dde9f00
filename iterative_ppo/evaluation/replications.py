"""Many simulated experiments at once, and how often each design promotes in them: the proof of its error rates.

The statistics are those of the designs themselves; only the loop over looks is vectorised over R experiments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from iterative_ppo.evaluation.clusters import business_means, cluster_comparison
from iterative_ppo.evaluation.comparison import Comparison, Tally
from iterative_ppo.evaluation.e_process import log_e_process, nearest_pairs
from iterative_ppo.evaluation.spending import upper_bounds

Promotions = Callable[["Replications"], np.ndarray]
Pairing = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
World = Callable[[np.random.Generator, int], "Replications"]


@dataclass(frozen=True)
class Replications:
    """R experiments of N conversations in order of assignment: (R, N) arms, outcomes, maybe business codes.

    `arrives` (R, N) is when an outcome becomes known, on a clock that counts assigned conversations; None: at once. All
    mature `window` assigned conversations after their own.
    """

    challenger: np.ndarray
    outcome: np.ndarray
    business: np.ndarray | None = None
    arrives: np.ndarray | None = None
    window: int = 0

    def known(self, moment: int) -> np.ndarray:
        """(R, N) outcomes as they stand at a moment, 0 where none has arrived."""
        return self.outcome if self.arrives is None else self.outcome * (self.arrives <= moment)


def share_promoted(world: World, designs: Sequence[Promotions], experiments: int, seed: Sequence[int]) -> list[float]:
    """For each design the share of simulated experiments in which it promotes; all see the same experiments."""
    rng, promoted, chunk = np.random.default_rng(seed), np.zeros(len(designs)), 500
    for begun in range(0, experiments, chunk):
        replications = world(rng, min(chunk, experiments - begun))
        promoted += [design(replications).sum() for design in designs]
    return [float(share) for share in promoted / experiments]


def textbook(rate: np.ndarray | float, gain: float, size: int, share: float = 0.5) -> World:
    """Independent 0/1 outcomes; `rate` is the champion's, one for all or one (N,) for each place in time."""

    def world(rng: np.random.Generator, experiments: int) -> Replications:
        challenger = rng.random((experiments, size)) < share
        return Replications(challenger, (rng.random(challenger.shape) < rate + gain * challenger).astype(float))

    return world


def drifting(base: float, size: int, days: int) -> np.ndarray:
    """(N,) rates about `base`: on the scale of log odds they rise by 1 and swing by 1/2 each way within a week."""
    day = np.arange(size) * days / size
    log_odds = np.log(base / (1 - base)) + day / days - 0.5 + 0.5 * np.sin(2 * np.pi * np.floor(day) / 7)
    rates: np.ndarray = 1 / (1 + np.exp(-log_odds))
    return rates


def businesses(base: float, gain: float, count: int, size: int, icc: float) -> World:
    """Businesses of `size` conversations each, assigned whole; their own rates are Beta with correlation `icc`.

    Each has its conversations within a quarter of the test, beginning at a moment of its own.
    """
    weight = (1 - icc) / icc

    def world(rng: np.random.Generator, experiments: int) -> Replications:
        arm = rng.random((experiments, count)) < 0.5
        mean = base + gain * arm
        rate = rng.beta(mean * weight, (1 - mean) * weight)
        moment = 0.75 * rng.random((experiments, count, 1)) + 0.25 * rng.random((experiments, count, size))
        order = np.argsort(moment.reshape(experiments, -1), axis=1)
        business = order // size
        owned = np.take_along_axis(rate, business, axis=1)
        outcome = (rng.random(business.shape) < owned).astype(float)
        return Replications(np.take_along_axis(arm, business, axis=1), outcome, business)

    return world


def late(rate: float, size: int, window: int) -> World:
    """No gain, but the challenger's outcomes come early in the window and the champion's late."""

    def world(rng: np.random.Generator, experiments: int) -> Replications:
        challenger = rng.random((experiments, size)) < 0.5
        outcome = (rng.random(challenger.shape) < rate).astype(float)
        early = rng.beta(1, 4, challenger.shape)
        arrives = np.arange(size) + window * np.where(challenger, early, 1 - early)
        return Replications(challenger, outcome, None, arrives, window)

    return world


def sequential(
    fractions: Sequence[float], alpha: float, bounds: Sequence[float] | None = None, mde: float | None = None
) -> Promotions:
    """Looks at fractions of the N conversations; without `bounds` those of the group sequential design.

    With `mde` a test also ends before its last look where that gain is ruled out.
    """
    limits = upper_bounds(fractions, alpha) if bounds is None else bounds

    def promotions(replications: Replications) -> np.ndarray:
        size = replications.outcome.shape[1]
        promoted, ended = np.zeros((2, len(replications.outcome)), dtype=bool)
        for fraction, limit in zip(fractions, limits, strict=True):
            arms = compared(replications, round(fraction * size))
            promoted |= ~ended & (_z(arms) >= limit)
            if mde is not None:
                ended |= arms.gain + arms.half_width(limit) < mde
        return promoted

    return promotions


def anytime(
    mde: float,
    alpha: float,
    business_conversations: int = 1,
    margin: float = 0.0,
    futility: bool = False,
    pairing: Pairing = nearest_pairs,
) -> Promotions:
    """The e-process, looked at after every pair; with the true gain as margin, where its interval is above that.

    With `futility` a test also ends once a gain of the MDE is ruled out.
    """

    def promotions(replications: Replications) -> np.ndarray:
        rows = range(len(replications.outcome))
        pairs = [_pairs(replications, row, business_conversations, pairing) for row in rows]
        count = np.array([len(champion) for champion, _ in pairs])
        champion, challenger = np.zeros((2, len(pairs), count.max()))
        for row, pair in enumerate(pairs):
            champion[row, : count[row]], challenger[row, : count[row]] = pair
        open_until = count
        if futility:
            ruled_out = log_e_process(challenger, champion, mde, -mde) >= -np.log(alpha)
            open_until = np.minimum(count, np.where(ruled_out.any(axis=1), ruled_out.argmax(axis=1), count))
        log_e = log_e_process(champion, challenger, mde, margin)
        return np.any((log_e >= -np.log(alpha)) & (np.arange(count.max()) < open_until[:, None]), axis=1)

    return promotions


def as_they_close(fractions: Sequence[float], alpha: float) -> Promotions:
    """The mistake of counting conversations as they close, successes at once and failures when their window ends."""
    limits = upper_bounds(fractions, alpha)

    def promotions(replications: Replications) -> np.ndarray:
        size, promoted = replications.outcome.shape[1], np.zeros(len(replications.outcome), dtype=bool)
        for fraction, limit in zip(fractions, limits, strict=True):
            moment = round(fraction * size)
            outcome = replications.known(moment)
            closed = (outcome > 0) | (np.arange(size) + replications.window <= moment)
            champion = _tally(outcome, closed & ~replications.challenger)
            promoted |= _z(Comparison(champion, _tally(outcome, closed & replications.challenger))) >= limit
        return promoted

    return promotions


def missed(fractions: Sequence[float], alpha: float, gain: float) -> Promotions:
    """Where the lower end of the group sequential interval is above the true gain at any look."""
    limits = np.array(upper_bounds(fractions, alpha))

    def misses(replications: Replications) -> np.ndarray:
        size = replications.outcome.shape[1]
        looks = [compared(replications, round(fraction * size)) for fraction in fractions]
        low = np.stack([look.gain for look in looks], 1) - limits * np.stack([look.error for look in looks], 1)
        return np.any(low > gain, axis=1)

    return misses


def compared(replications: Replications, seen: int) -> Comparison:
    """The arms (R,) when the first `seen` conversations have matured, by business where there are any."""
    challenger = replications.challenger[:, :seen]
    outcome = replications.known(seen + replications.window)[:, :seen]
    if replications.business is None:
        return Comparison(_tally(outcome, ~challenger), _tally(outcome, challenger))
    business = replications.business[:, :seen]
    with np.errstate(divide="ignore", invalid="ignore"):
        return cluster_comparison(_tally_by(business, outcome, ~challenger), _tally_by(business, outcome, challenger))


def _z(arms: Comparison) -> np.ndarray:
    """(R,) z; not a number while an arm is empty, which promotes nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return arms.z


def _tally(outcome: np.ndarray, arm: np.ndarray) -> Tally:
    return Tally(arm.sum(axis=1), (outcome * arm).sum(axis=1), (outcome**2 * arm).sum(axis=1))


def _tally_by(business: np.ndarray, outcome: np.ndarray, arm: np.ndarray) -> Tally:
    """Tallies (R, G)."""
    rows, count = len(business), int(business.max()) + 1
    place = (business + count * np.arange(rows)[:, None]).ravel()

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, values.ravel(), rows * count).reshape(rows, count)

    return Tally(summed(arm.astype(float)), summed(outcome * arm), summed(outcome**2 * arm))


def _pairs(
    replications: Replications, row: int, business_conversations: int, pairing: Pairing
) -> tuple[np.ndarray, np.ndarray]:
    arm, outcome = replications.challenger[row], replications.outcome[row]
    if replications.business is not None:
        rows, outcome = business_means(replications.business[row], outcome, business_conversations)
        arm = arm[rows]
    first, second = pairing(arm)
    return outcome[first], outcome[second]
