"""Bounds of a group sequential test: Lan-DeMets O'Brien-Fleming spending, solved by recursive integration.

Z_k at information fraction t_k has corr(Z_j, Z_k) = sqrt(t_j / t_k) (Jennison & Turnbull 2000, chapters 7 and 19).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOWEST = -8.0
"""The integration's lower end in standard deviations, and minus the bound that nothing crosses."""


def obrien_fleming_spent(fraction: float, alpha: float) -> float:
    """The level spent up to an information fraction: 2 - 2 Phi(z_{1 - alpha / 2} / sqrt(t)) (Lan & DeMets 1983)."""
    from scipy.stats import norm

    return float(2 * norm.sf(norm.isf(alpha / 2) / np.sqrt(min(fraction, 1.0)))) if fraction > 0 else 0.0


def upper_bounds(fractions: Sequence[float], alpha: float) -> list[float]:
    """One-sided bounds on Z at each look; a look at fraction 1 or beyond spends all that is left.

    Args:
        fractions: rising information fractions of the looks taken; they need not be equally spaced.
        alpha: the one-sided level of the whole test.

    A look whose share of the level is too small to be met has the bound 8. Raises ValueError for other fractions.
    """
    from scipy.optimize import brentq

    _check(fractions)
    walk, bounds, spent = Walk.start(fractions[0]), [], 0.0
    for following in [*fractions[1:], None]:
        total = obrien_fleming_spent(walk.fraction, alpha)
        share, spent = total - spent, total
        found = share > walk.above(-LOWEST)
        bounds.append(brentq(lambda z: walk.above(z) - share, LOWEST, -LOWEST, xtol=1e-10) if found else -LOWEST)  # noqa: B023
        if following is not None:
            walk = walk.step(following, LOWEST, bounds[-1])
    return [float(bound) for bound in bounds]


def crossing(
    fractions: Sequence[float], upper: Sequence[float], lower: Sequence[float] | None = None, drift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (K,) and (K,) of stopping at each look above `upper` and below `lower`.

    Args:
        drift: the mean of Z at fraction 1; at t it is drift * sqrt(t).
        lower: None for a test that stops upward only.
    """
    _check(fractions)
    floors = [-np.inf] * len(fractions) if lower is None else list(lower)
    walk, above, below = Walk.start(fractions[0], drift), [], []
    for k, (low, high) in enumerate(zip(floors, upper, strict=True)):
        above.append(walk.above(high))
        below.append(walk.below(low))
        if k + 1 < len(fractions):
            walk = walk.step(fractions[k + 1], low, high)
    return np.array(above), np.array(below)


@dataclass(frozen=True)
class Walk:
    """The sub-density of Z at one look, over the paths that no earlier look stopped, known at the previous look.

    Z at this look is normal about `scale * nodes + shift` with standard deviation `spread`, `mass` being the weights.
    """

    fraction: float
    drift: float
    nodes: np.ndarray
    mass: np.ndarray
    scale: float
    spread: float

    @classmethod
    def start(cls, fraction: float, drift: float = 0.0) -> Walk:
        mean = np.array([drift * np.sqrt(fraction)])
        return cls(fraction, drift, mean, np.ones(1), 1.0, 1.0)

    def above(self, bound: float) -> float:
        """P(still going, Z > bound)."""
        from scipy.special import ndtr

        return float(self.mass @ ndtr((self.nodes * self.scale - bound) / self.spread))

    def below(self, bound: float) -> float:
        """P(still going, Z < bound)."""
        from scipy.special import ndtr

        return float(self.mass @ ndtr((bound - self.nodes * self.scale) / self.spread))

    def step(self, fraction: float, low: float, high: float) -> Walk:
        """To the next look, going on only from low < Z < high. Exact up to Gauss-Legendre quadrature of a density."""
        centre = self.drift * np.sqrt(self.fraction)
        low, high = max(low, centre + LOWEST), min(high, centre - LOWEST)
        kept, new = np.sqrt(self.fraction / fraction), np.sqrt((fraction - self.fraction) / fraction)
        z, weight = _quadrature(low, high, min(self.spread, new / kept))
        density = np.exp(-0.5 * ((z[:, None] - self.nodes * self.scale) / self.spread) ** 2) @ self.mass
        mass = weight * density / (self.spread * np.sqrt(2 * np.pi))
        gained = self.drift * (fraction - self.fraction) / np.sqrt(fraction)
        return Walk(fraction, self.drift, z + gained / kept, mass, kept, new)


def _quadrature(low: float, high: float, detail: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [low, high]: Gauss-Legendre of 10 points on panels about twice as wide as the detail."""
    place, weight = np.polynomial.legendre.leggauss(10)
    panels = int(np.clip((high - low) / (2 * detail), 8, 200))
    edges, half = np.linspace(low, high, panels + 1), (high - low) / (2 * panels)
    nodes = (edges[:-1, None] + half * (1 + place)).ravel()
    return nodes, np.tile(weight * half, panels)


def _check(fractions: Sequence[float]) -> None:
    if not len(fractions) or fractions[0] <= 0 or np.any(np.diff(fractions) <= 0):
        raise ValueError(f"information fractions must be positive and rise, got {list(fractions)}")
