"""Plots of what Q is about: turn-wise credit, and Q as a forecast of how conversations end."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import MaxNLocator

from iterative_ppo.report import svg
from iterative_ppo.report.record import RunRecord
from iterative_ppo.report.round_record import RoundRecord

FORECASTS = {"as_it_is": "Q as it is", "isotonic": "isotonic", "temperature": "by temperature"}
STYLES: dict[str, dict[str, Any]] = {
    "as_it_is": {"marker": "o", "color": svg.CHAMPION},
    "isotonic": {"marker": "s", "color": svg.CHALLENGER, "markerfacecolor": "none"},
    "temperature": {"marker": "^", "color": svg.INK, "markerfacecolor": "none"},
}
STABILITIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("credit_turn_rank_stability", "rank stability, turns", {"marker": "o", "color": svg.CHALLENGER}),
    ("credit_token_rank_stability", "rank stability, tokens", {"marker": "s", "color": svg.CHAMPION}),
    ("credit_kendall_tau", "Kendall's tau", {"marker": "^", "color": svg.MUTED}),
)


@svg.styled
def credit(run: RunRecord) -> str | None:
    """Rank stability of turn and token scores, and tau with the outcome, by round."""
    rounds = [(one.number, one.credit.figures) for one in run.rounds if one.credit]
    if not any(key in figures for _, figures in rounds for key, *_ in STABILITIES):
        return None
    figure, (axes,) = svg.panels(6.4, 2.7)
    for key, name, style in STABILITIES:
        found = [(x, figures[key]) for x, (_, figures) in enumerate(rounds) if key in figures]
        if found:
            axes.plot(*zip(*found, strict=True), markersize=6, label=name, **style)
    axes.set_xticks(range(len(rounds)), [f"round {number}" for number, _ in rounds])
    axes.set_xlim(-0.5, len(rounds) - 0.5)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.0)
    axes.set_ylabel("correlation of ranks")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0, handlelength=1.4)
    return svg.inline(figure, "credit")


def forecast_round(run: RunRecord) -> RoundRecord | None:
    """The last round of which it is known."""
    return next((one for one in reversed(run.rounds) if one.forecast), None)


@svg.styled
def forecast(run: RunRecord) -> str | None:
    """Promised beside what came true, of the last round's Q: as it is, and calibrated."""
    one = forecast_round(run)
    if one is None:
        return None
    figure, (axes,) = svg.panels(4.4, 3.6)
    top = min(1.0, 1.12 * max(max(bins.predicted + bins.observed) for bins in one.forecast.values()))
    axes.plot([0, top], [0, top], color=svg.MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for name, bins in one.forecast.items():
        axes.plot(
            bins.predicted, bins.observed, linestyle="none", label=FORECASTS.get(name, name), **STYLES.get(name, {})
        )
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="forecast outcome", ylabel="outcome that came true")
    axes.set_title(f"Round {one.number}")
    axes.set_box_aspect(1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.legend(loc="upper left", fontsize=8.5)
    return svg.inline(figure, "forecast")
