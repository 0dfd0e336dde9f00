"""Conversations of one business are alike: the variance that this leaves, and one observation a business."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from iterative_ppo.evaluation.comparison import Comparison, Tally


def cluster_comparison(champion: Tally, challenger: Tally) -> Comparison:
    """Compare arms given by business, (..., G) each: the last axis is summed, its spread is the design effect.

    The design effect is the variance of the score by business (the robust score test of Guo et al. 2005, Statistics in
    Medicine 24, 3479, with G / (G - 1)) over the same by conversation. About 1 + (m - 1) ICC where businesses of m
    conversations are assigned whole; where conversations are assigned it can be below 1. The test takes it about the
    common mean, the interval about each arm's own: about the common one a large gain is itself spread. The
    interval has the degrees of freedom of the smaller arm's businesses. Those without an outcome yet are left out;
    where outcomes do not vary the effect is 1.
    """
    arms = Comparison(_summed(champion), _summed(challenger))
    mean = (arms.champion.total + arms.challenger.total) / (arms.champion.count + arms.challenger.count)
    return replace(
        arms,
        design_effect=_effect(champion, challenger, arms, (mean, mean)),
        own_design_effect=_effect(champion, challenger, arms, (arms.champion.mean, arms.challenger.mean)),
        freedom=np.minimum(*(np.maximum(equal_businesses(arm.count) - 1, 1) for arm in (champion, challenger))),
    )


def _effect(champion: Tally, challenger: Tally, arms: Comparison, about: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Variance of the score by business, about these means, over the same by conversation.

    Both by one formula, for the variances that it multiplies are not raw: one is pooled over arms whose own may differ,
    the other has pseudo-counts, which a ratio to it would take out again.
    """
    count = arms.champion.count + arms.challenger.count
    share = arms.challenger.count / count
    theirs, mine = (
        tally.total - mean[..., None] * tally.count for tally, mean in zip((champion, challenger), about, strict=True)
    )
    score = (1 - share[..., None]) * mine - share[..., None] * theirs
    seen = (champion.count + challenger.count > 0).sum(-1)
    robust = (score**2).sum(-1) * seen / np.maximum(seen - 1, 1)
    spread, its = (
        arm.squares - 2 * mean * arm.total + mean**2 * arm.count
        for arm, mean in zip((arms.champion, arms.challenger), about, strict=True)
    )
    alone = ((1 - share) ** 2 * its + share**2 * spread) * count / np.maximum(count - 1, 1)
    varies = (alone > 1e-9) & (robust > 0)
    return np.where(varies, robust / np.where(varies, alone, 1.0), 1.0)


def _summed(arm: Tally) -> Tally:
    return Tally(arm.count.sum(-1), arm.total.sum(-1), arm.squares.sum(-1))


def equal_businesses(sizes: np.ndarray) -> np.ndarray:
    """(...) how many businesses of equal size (..., G) sizes are worth, (sum n)^2 / sum n^2 (Kish); 0 of none."""
    worth: np.ndarray = sizes.sum(-1) ** 2 / np.maximum((sizes**2).sum(-1), 1)
    return worth


def by_business(business: np.ndarray, values: np.ndarray, chosen: np.ndarray) -> Tally:
    """(G,) tallies of (N,) values by (N,) codes 0..G-1, over the (N,) bool `chosen` rows."""
    codes, values, businesses = business[chosen], values[chosen], int(business.max(initial=-1)) + 1
    sums = [np.bincount(codes, weights, businesses) for weights in (np.ones(len(codes)), values, values**2)]
    return Tally(*sums)


def business_means(business: np.ndarray, values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each business's first `size` values, businesses in the order in which they got that many.

    Args:
        business: (N,) codes 0..G-1, values: (N,), both in order of assignment.

    Returns the rows (B,) that completed a business, and the means (B,). The rest of a business is not used: an
    observation that goes on changing cannot be bet on.
    """
    order = np.argsort(business, kind="stable")
    codes = business[order]
    starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]]) if len(codes) else np.zeros(0, dtype=int)
    ends = np.r_[starts[1:], len(codes)]
    starts = starts[ends - starts >= size]
    running = np.r_[0.0, np.cumsum(values[order])]
    rows, means = order[starts + size - 1], (running[starts + size] - running[starts]) / size
    by_time = np.argsort(rows)
    return rows[by_time], means[by_time]
