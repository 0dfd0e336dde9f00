"""One results file a target: a list of {figure, value, interval, target, holds, seeds, cpu_seconds}."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from iterative_ppo.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds with its 95 % t interval."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def jackknifed(statistic: Callable[[np.ndarray], float], values: np.ndarray) -> tuple[float, float, float]:
    """A statistic of what seeds gave (first axis) with its 95 % t interval over the jackknife's pseudo-values."""
    whole, n = statistic(values), len(values)
    if n < 2:
        return whole, float("nan"), float("nan")
    without = [statistic(np.delete(values, k, axis=0)) for k in range(n)]
    _, low, high = mean_interval([n * whole - (n - 1) * one for one in without])
    return whole, low, high


def figure(
    name: str,
    value: float,
    interval: tuple[float, float] | None = None,
    target: str | None = None,
    holds: bool | None = None,
    seeds: Sequence[int] = (),
    cpu_seconds: float | None = None,
) -> dict[str, Any]:
    """One row of a results file. Numbers that are not finite become null."""

    def number(x: float | None) -> float | None:
        return None if x is None or not np.isfinite(x) else round(float(x), 5)

    return {
        "figure": name,
        "value": number(value),
        "interval": [number(x) for x in interval] if interval else None,
        "target": target,
        "holds": None if holds is None else bool(holds),
        "seeds": list(seeds),
        "cpu_seconds": number(cpu_seconds),
    }


def averaged(
    name: str,
    values: Sequence[float] | np.ndarray,
    seeds: Sequence[int],
    target: str | None = None,
    met: Callable[[float, float], bool] | None = None,
    cpu_seconds: float | None = None,
) -> dict[str, Any]:
    """A row of what seeds gave: the mean and its 95 % t interval. `met` judges the mean and the low end."""
    mean, low, high = mean_interval(list(values))
    return figure(name, mean, (low, high), target, met and met(mean, low), seeds, cpu_seconds)


def at_least(least: float) -> Callable[[float, float], bool]:
    """Whether the mean is at least so much."""
    return lambda mean, low: mean >= least


def beyond_doubt(mean: float, low: float) -> bool:
    """Whether the interval lies above 0."""
    return low > 0


def merged(before: Sequence[dict[str, Any]], made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier rows, with those made now in their place; a new figure follows the one that it was made after."""
    rows, new = ({row["figure"]: row for row in some} for some in (before, made))
    order, at = list(rows), len(rows)
    for name in new:
        if name not in rows:
            order.insert(at, name)
        at = order.index(name) + 1
    return [new.get(name) or rows[name] for name in order]


def write(target: str, figures: Sequence[dict[str, Any]], whole: bool = True) -> None:
    """Print the table and write it; unless it is the whole one, other rows of the file stay as they are."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "95 % interval", "target", "holds", title=target)
    for row in figures:
        low_high = row["interval"] or [None, None]
        interval = f"{low_high[0]:.3f} to {low_high[1]:.3f}" if None not in low_high else ""
        value = "" if row["value"] is None else f"{row['value']:.3f}"
        holds = {True: "yes", False: "no", None: ""}[row["holds"]]
        table.add_row(row["figure"], value, interval, row["target"] or "", holds)
    Console().print(table)
    path = RESULTS / f"{target}.json"
    write_json(path, list(figures) if whole or not path.exists() else merged(read_json(path), figures))
