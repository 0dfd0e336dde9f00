"""Plots of what customers and staff did, each as an inline SVG, or None where the run has nothing to draw yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.report import svg, words
from iterative_ppo.report.customers import ADOPTIONS, CHALLENGER, CHAMPION, Group, wilson
from iterative_ppo.report.record import RunRecord
from iterative_ppo.report.round_record import RoundRecord

ROLE = {CHAMPION: (svg.CHAMPION, "o", -0.09), CHALLENGER: (svg.CHALLENGER, "D", 0.09)}
FATE = {
    "verbatim": (svg.VERBATIM, svg.ON_DARK),
    "edited": (svg.EDITED, svg.ON_LIGHT),
    "rejected": (svg.REJECTED, svg.ON_LIGHT),
    "none": (svg.NONE, svg.ON_LIGHT),
}
MOST_BARS, MOST_LABELS, MOST_NAMES, MOST_POINTS, MOST_WRITERS = 14, 12, 7, 3, 6


@dataclass(frozen=True)
class Point:
    """A success rate to draw; `kept` is False for a challenger that was not promoted."""

    role: str
    policy: str | None
    arm: Arm
    kept: bool = True


@dataclass(frozen=True)
class Step:
    """What was measured at one time, in the order of the run."""

    name: str
    points: tuple[Point, ...]


def steps(run: RunRecord) -> list[Step]:
    """Success rates in time: the first data, then each A/B test or later data, then the closing comparison."""
    found, before = [], None
    for one in run.rounds:
        if before and before.test:
            found.append(_tested(before))
        elif one.groups:
            found += _collected(before, one)
        before = one
    if before and before.test:
        found.append(_tested(before))
    if run.closing:
        test, first, last = run.closing.test, run.closing.first, run.closing.last
        if run.changed:
            points = (Point(CHAMPION, first, test.champion), Point(CHALLENGER, last, test.challenger))
            found.append(Step("Closing:\nfirst and last", points))
        else:
            found.append(Step("Closing", (Point(CHAMPION, last, test.challenger),)))
    return found


def _collected(before: RoundRecord | None, one: RoundRecord) -> list[Step]:
    """The largest groups, those of a log side by side, and how many more the table of conversations shows."""
    most = MOST_WRITERS if one.from_logs else MOST_POINTS
    shown = sorted(one.groups, key=lambda group: -group.success.conversations)[:most]
    points = [Point(group.role, group.policy, group.success) for group in shown]
    more = f"\nand {words.count(len(one.groups) - most, 'others')}" if len(one.groups) > most else ""
    name = origin(before, one)
    if one.from_logs:
        return [Step(f"{name}{more if point is points[-1] else ''}", (point,)) for point in points]
    return [Step(f"{name}{more}", tuple(points))]


def _tested(one: RoundRecord) -> Step:
    assert one.test is not None
    champion = Point(CHAMPION, one.champion, one.test.champion)
    challenger = Point(CHALLENGER, one.challenger, one.test.challenger, one.promoted)
    return Step(origin(one, None), (champion, challenger))


@svg.styled
def success(run: RunRecord) -> str | None:
    """Success rate by round with 95 % intervals, once there are two rates to compare."""
    found = steps(run)
    return svg.inline(drawn(found, run.closing is not None), "success") if rates(found) > 1 else None


def rates(found: Sequence[Step]) -> int:
    return sum(len(step.points) for step in found)


def drawn(found: Sequence[Step], closing: bool) -> Figure:
    """The picture; the last step is shaded where that is the closing comparison. Many steps have fewer labels."""
    figure, (axes,) = svg.panels(9.6, 3.7)
    top = 125 * max(wilson(point.arm)[1] for step in found for point in step.points)
    for x, step in enumerate(found):
        lowest = min(step.points, key=lambda point: point.arm.rate)
        for point in step.points:
            _point(axes, x, point)
            if len(found) <= MOST_LABELS:
                below = point is lowest and len(step.points) > 1
                _label(axes, x, point, len(found) <= MOST_NAMES, below, top)
    if closing:
        axes.axvspan(len(found) - 1.5, len(found) - 0.5, color=svg.LINE, alpha=0.35, linewidth=0)
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.set_ylim(0, top)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= min(100, top)])
    axes.set_xticks(range(len(found)), ticks([step.name for step in found]))
    axes.set_ylabel("successful conversations (%)")
    _legend(axes, found)
    return figure


def ticks(names: Sequence[str]) -> list[str]:
    """Labels in two lines, some left empty where there are too many."""
    spread = 1 + len(names) // (MOST_LABELS + 1)
    return [name.replace(" of ", " of\n") if k % spread == 0 else "" for k, name in enumerate(names)]


def _point(axes: Axes, x: int, point: Point) -> None:
    colour, marker, shift = ROLE[point.role]
    low, high = wilson(point.arm)
    axes.plot([x + shift] * 2, [100 * low, 100 * high], color=colour, linewidth=2.2)
    fill = colour if point.kept else svg.PAPER
    style: dict[str, Any] = {
        "color": colour,
        "linestyle": "none",
        "markersize": 8,
        "markerfacecolor": fill,
        "markeredgecolor": colour,
        "markeredgewidth": 1.6,
    }
    axes.plot(x + shift, 100 * point.arm.rate, marker=marker, **style)


def _label(axes: Axes, x: int, point: Point, named: bool, below: bool, top: float) -> None:
    """Above the interval, or below it; beside it where there is no room above the axis."""
    low, high = (100 * end for end in wilson(point.arm))
    y, offset, align = (low, (0, -6), ("center", "top")) if below else (high, (0, 6), ("center", "bottom"))
    if below and low < 0.2 * top:
        y, offset, align = 100 * point.arm.rate, (-9, 0), ("right", "center")
    name = f"{words.policy(point.policy)}\n" if point.policy and named else ""
    place: dict[str, Any] = {"xytext": offset, "textcoords": "offset points", "ha": align[0], "va": align[1]}
    axes.annotate(f"{name}{words.percent(point.arm.rate)}", (x + ROLE[point.role][2], y), fontsize=9.5, **place)


def _legend(axes: Axes, found: Sequence[Step]) -> None:
    points = [point for step in found for point in step.points]
    kinds = [("champion", CHAMPION, True), ("challenger, promoted", CHALLENGER, True)]
    kinds.append(("challenger, not promoted", CHALLENGER, False))
    for name, role, kept in kinds:
        if any(point.role == role and point.kept == kept for point in points):
            colour, marker, _ = ROLE[role]
            fill = colour if kept else svg.PAPER
            axes.plot([], [], marker, color=colour, markerfacecolor=fill, markeredgewidth=1.6, label=name)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, handletextpad=0.2, borderpad=0)


@svg.styled
def acceptance(run: RunRecord) -> str | None:
    """What staff did with suggestions, a bar for each policy of each round."""
    bars = [bar for bar in labelled_groups(run) if bar[2].adoption][-MOST_BARS:]
    if not bars:
        return None
    figure, (axes,) = svg.panels(9.6, 0.8 + 0.36 * len(bars))
    for y, (_, _, group) in enumerate(bars):
        _bar(axes, y, group)
    axes.set_yticks(range(len(bars)), [f"{origin}, {owner}" for origin, owner, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of suggestions (%)")
    axes.grid(visible=False)
    names = {"none": "no reply or not recorded"}
    handles = [axes.barh(0, 0, color=FATE[name][0], label=names.get(name, name)) for name in ADOPTIONS]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0, handlelength=1)
    return svg.inline(figure, "acceptance")


def _bar(axes: Axes, y: int, group: Group) -> None:
    left = 0.0
    for name in ADOPTIONS:
        width = 100 * group.adoption[name]
        colour, ink = FATE[name]
        axes.barh(y, width, left=left, height=0.72, color=colour, edgecolor=svg.PAPER, linewidth=1)
        if width >= 6:
            axes.text(left + width / 2, y, f"{width:.1f}", color=ink, ha="center", va="center_baseline", fontsize=9)
        left += width


def labelled_groups(run: RunRecord) -> list[tuple[str, str, Group]]:
    """All groups in time: where their conversations come from, whose they are, and the group."""
    found: list[tuple[str, str, Group]] = []
    before = None
    for one in run.rounds:
        found += [(gathered(before, one), _owner(group), group) for group in one.groups]
        before = one
    if before:
        found += [(gathered(before, None), _owner(group), group) for group in run.tested]
    return found


def _owner(group: Group) -> str:
    return f"{words.policy(group.policy)}{f' ({group.arm})' if group.arm else ''}"


def origin(before: RoundRecord | None, one: RoundRecord | None) -> str:
    """Where conversations come from: the test of the round before, or a collection of their own."""
    if before and before.test:
        return f"A/B test of round {before.number}"
    return "First data" if before is None or one is None else f"Data of round {one.number}"


def gathered(before: RoundRecord | None, one: RoundRecord | None) -> str:
    """The same of all that came, where a test of an earlier version does not say which of it it counted."""
    told = before is None or before.test is None or before.counted
    return origin(before, one) if told else f"{origin(before, one)}, all that came"
