"""Plots for the technically minded: Q, the improvement, divergence and returns, each as an inline SVG or None."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from iterative_ppo.report import svg, words
from iterative_ppo.report.customers import CHALLENGER, CHAMPION, Group
from iterative_ppo.report.plots import ROLE, origin, ticks
from iterative_ppo.report.record import RunRecord
from iterative_ppo.report.round_record import RoundRecord

MOST_ROUNDS, MOST_MEANS = 4, 60
CURVES = (
    ("q", "Q of the answers", "return to expect"),
    ("kl_to_reference", "KL to the reference", "nats a response"),
    ("entropy", "Entropy", "nats a token"),
)
PASSES = (("logged", "Logged pass", "loss"), ("best_of_n", "Best of n", "loss, nats a token"))


@svg.styled
def calibration(run: RunRecord) -> str | None:
    """What Q promised beside what came true, for the last rounds."""
    rounds = [one for one in run.rounds if one.calibration and one.calibration.count][-MOST_ROUNDS:]
    if not rounds:
        return None
    figure, panels = svg.panels(3.2 * min(3, len(rounds)), 3.1 if len(rounds) <= 3 else 2.5, len(rounds), sharey=True)
    top = max(max(one.calibration.predicted + one.calibration.observed) for one in rounds if one.calibration)
    for axes, one in zip(panels, rounds, strict=True):
        _reliability(axes, one, min(1.0, 1.12 * top))
    panels[0].set_ylabel("return that came true")
    return svg.inline(figure, "calibration")


def _reliability(axes: Axes, one: RoundRecord, top: float) -> None:
    bins = one.calibration
    assert bins is not None
    size = [12 + 70 * count / max(bins.count) for count in bins.count]
    axes.plot([0, top], [0, top], color=svg.MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.scatter(bins.predicted, bins.observed, s=size, color=svg.CHAMPION, edgecolor=svg.PAPER, linewidth=1, zorder=3)
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="return that Q expected", title=f"Round {one.number}")
    axes.set_box_aspect(1)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    low, high = min(bins.count), max(bins.count)
    turns = words.count(low) if low == high else f"{words.count(low)} to {words.count(high)}"
    place: dict[str, Any] = {
        "transform": axes.transAxes,
        "ha": "right",
        "va": "bottom",
        "color": svg.MUTED,
        "fontsize": 8.5,
    }
    axes.text(0.98, 0.03, f"{len(bins.count)} bins of\n{turns} turns", **place)


def sampled_rounds(run: RunRecord) -> list[RoundRecord]:
    """The last rounds in which an algorithm learnt from sampled answers."""
    return [one for one in run.rounds if one.sampled][-MOST_ROUNDS:]


@svg.styled
def curves(run: RunRecord) -> str | None:
    """An algorithm's rollouts: Q, KL to the reference and entropy; the last round is drawn strongest.

    Each policy iteration has a line of its own, for Q and the reference are others there.
    """
    rounds = sampled_rounds(run)
    if not rounds:
        return None
    mixed = len({one.algorithm for one in rounds}) > 1
    figure, panels = svg.panels(9.6, 2.9, len(CURVES))
    for axes, (key, title, unit) in zip(panels, CURVES, strict=True):
        for one, strength in zip(rounds, _strengths(len(rounds)), strict=True):
            found = [(x, entry) for x, entry in enumerate(one.sampled, start=1) if key in entry]
            name = _named(one) if mixed else f"round {one.number}"
            for k, (_, part) in enumerate(groupby(found, lambda pair: pair[1].get("iteration"))):
                _curve(axes, [(x, entry[key]) for x, entry in part], f"_{name}" if k else name, strength)
        axes.set(title=title, xlabel="rollout", ylabel=unit)
        axes.margins(x=0.06, y=0.14)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    panels[0].legend(loc="best", fontsize=8.5, handlelength=1.4)
    return svg.inline(figure, "curves")


@svg.styled
def losses(run: RunRecord) -> str | None:
    """The loss of the passes over answers that are given, logged ones or the best of n, for the last rounds."""
    shown = [(key, *named) for key, *named in PASSES if any(key in one.curves for one in run.rounds)]
    if not shown:
        return None
    figure, panels = svg.panels(9.6, 2.5, len(shown))
    for axes, (key, title, unit) in zip(panels, shown, strict=True):
        rounds = [one for one in run.rounds if key in one.curves][-MOST_ROUNDS:]
        for one, strength in zip(rounds, _strengths(len(rounds)), strict=True):
            if found := _means([entry["loss"] for entry in one.curves[key] if "loss" in entry]):
                axes.plot(*zip(*found, strict=True), color=svg.CHALLENGER, alpha=strength, label=f"round {one.number}")
        axes.set(title=title, xlabel="update", ylabel=unit)
        axes.legend(loc="best", fontsize=8.5, handlelength=1.4)
    return svg.inline(figure, "losses")


def _means(values: Sequence[float]) -> list[tuple[float, float]]:
    """Neighbours' means, with the middle of the updates that each stands for."""
    parts = np.array_split(np.arange(len(values)), min(MOST_MEANS, len(values))) if values else []
    return [(float(part.mean()) + 1.0, float(np.mean([values[k] for k in part]))) for part in parts]


@svg.styled
def judges(run: RunRecord) -> str | None:
    """What Q and its unseen members say of each rollout's answers, over KL to the champion, for the last rounds.

    Of several policy iterations the last, for each has a Q of its own.
    """
    keys = ("kl_to_champion", "q", "judge")
    rounds = [one for one in run.rounds if any("judge" in entry for entry in one.sampled)][-MOST_ROUNDS:]
    if not rounds:
        return None
    figure, panels = svg.panels(9.6 if len(rounds) > 1 else 5.6, 2.9, len(rounds), sharey=True)
    for axes, one in zip(panels, rounds, strict=True):
        last = one.sampled[-1].get("iteration")
        rollouts = [entry for entry in one.sampled if set(keys) <= entry.keys() and entry.get("iteration") == last]
        found = [tuple(entry[key] for key in keys) for entry in rollouts]
        kl, q, judge = np.array(found).reshape(-1, len(keys)).T
        axes.plot(kl, q, marker="o", markersize=4, color=svg.CHALLENGER, label="Q, as improved on")
        axes.plot(kl, judge, marker="s", markersize=4, color=svg.CHAMPION, label="judges")
        if len(judge):
            top = int(judge.argmax())
            axes.plot(kl[top], judge[top], "o", markersize=11, markerfacecolor="none", color=svg.CHAMPION)
        axes.set(title=_named(one).replace("round", "Round"), xlabel="KL to the champion, nats a response")
        axes.margins(x=0.08, y=0.16)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    panels[0].set_ylabel("return to expect")
    panels[0].legend(loc="best", fontsize=8.5, handlelength=1.4)
    return svg.inline(figure, "judges")


def _named(one: RoundRecord) -> str:
    return f"round {one.number}, {words.ALGORITHMS[one.algorithm]}" if one.algorithm else f"round {one.number}"


def _curve(axes: Axes, found: Sequence[tuple[int, float]], name: str, strength: float) -> None:
    x, y = zip(*found, strict=True)
    axes.plot(x, y, marker="o", markersize=4, color=svg.CHALLENGER, alpha=strength, label=name)


def _strengths(rounds: int) -> list[float]:
    return [1.0 - 0.6 * (rounds - 1 - k) / max(1, rounds - 1) for k in range(rounds)]


@svg.styled
def divergence(run: RunRecord) -> str | None:
    """KL between challenger and champion, both directions, by round."""
    keys = (("kl_challenger_champion", CHALLENGER), ("kl_champion_challenger", CHAMPION))
    rounds = [one for one in run.rounds if any(key in one.evidence for key, _ in keys)]
    if not rounds:
        return None
    figure, (axes,) = svg.panels(4.7, 3.3)
    for key, role in keys:
        colour, marker, shift = ROLE[role]
        found = [(x + shift, one.evidence[key]) for x, one in enumerate(rounds) if key in one.evidence]
        other = CHAMPION if role == CHALLENGER else CHALLENGER
        axes.plot(*zip(*found, strict=True), marker, color=colour, markersize=8, label=f"KL({role} ‖ {other})")
    bound, top = rounds[-1].kl_margin, axes.get_ylim()[1]
    if bound is not None and bound < 3 * top:
        axes.axhline(bound, color=svg.MUTED, linewidth=1, linestyle=(0, (4, 3)), label="the gate's bound")
    _by_round(axes, [f"round {one.number}" for one in rounds], "nats a response", columns=1)
    return svg.inline(figure, "divergence")


@svg.styled
def returns(run: RunRecord) -> str | None:
    """Mean return at the start of a conversation, by round and arm, with 95 % intervals."""
    origins = [origin(before, one) for before, one in zip((None, *run.rounds), run.rounds, strict=False)]
    measured = [pair for pair in zip(origins, run.rounds, strict=True) if pair[1].mean_return is not None]
    if not measured:
        return None
    figure, (axes,) = svg.panels(4.7, 3.3)
    named: set[str] = set()
    for x, (_, one) in enumerate(measured):
        shown = [group for group in one.groups if group.returned][:3]
        for group in shown:
            _return(axes, x, group, named)
        if not shown and one.mean_return is not None:
            axes.plot(x, one.mean_return, "s", color=svg.MUTED, label=None if "all" in named else "all conversations")
            named.add("all")
    _by_round(axes, [name for name, _ in measured], "discounted return")
    return svg.inline(figure, "returns")


def _return(axes: Axes, x: int, group: Group, named: set[str]) -> None:
    assert group.returned is not None
    colour, marker, shift = ROLE[group.role]
    axes.plot([x + shift] * 2, [group.returned.low, group.returned.high], color=colour)
    name = None if group.role in named else f"{group.role} arm"
    axes.plot(x + shift, group.returned.value, marker, color=colour, markersize=7, label=name)
    named.add(group.role)


def _by_round(axes: Axes, names: Sequence[str], unit: str, columns: int = 3) -> None:
    axes.set_xticks(range(len(names)), ticks(names))
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]), top=1.1 * axes.get_ylim()[1])
    axes.set_ylabel(unit)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderpad=0, handletextpad=0.3)
