"""Success by round of each method that `make bench-learning` has measured, as docs/learning.png."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

from benchmarks.results_file import RESULTS
from iterative_ppo.files import read_json

matplotlib.use("Agg")
PLACE = Path(__file__).parents[1] / "docs" / "learning.png"
_SUCCESS = re.compile(r"success, (?!greedy)(?P<method>.+), round (?P<round>\d+)")


def curves(figures: list[dict[str, Any]]) -> dict[str, list[tuple[int, float, float, float]]]:
    """By method, (round, mean, low, high) in order; methods of one round alone are left out."""
    found: dict[str, list[tuple[int, float, float, float]]] = {}
    for row in figures:
        if named := _SUCCESS.fullmatch(row["figure"]):
            found.setdefault(named["method"], []).append((int(named["round"]), row["value"], *row["interval"]))
    return {method: sorted(points) for method, points in found.items() if len(points) > 1}


def draw(figures: list[dict[str, Any]], place: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    axes.set_prop_cycle(color=plt.get_cmap("tab20")(range(20)))
    for method, points in sorted(curves(figures).items(), key=lambda one: -one[1][-1][1]):
        rounds, means, lows, highs = zip(*points, strict=True)
        (line,) = axes.plot(rounds, means, marker="o", markersize=3, label=fill(method, 36))
        axes.fill_between(rounds, lows, highs, alpha=0.15, color=line.get_color())
    (oracle,) = (row["value"] for row in figures if row["figure"] == "the scripted oracle's success")
    axes.axhline(oracle, color="grey", linestyle=":", label="scripted oracle")
    axes.set(xlabel="rounds of 1,500 conversations", ylabel="conversations that sell", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(place, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    draw(read_json(RESULTS / "bench-learning.json"), PLACE)
