"""An A/B test's bounds and path over its information: a picture that stands alone, or one in the report."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iterative_ppo.errors import ConfigError
from iterative_ppo.evaluation.bounds import Bound
from iterative_ppo.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".html")
PAGE = "<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>A/B test</title><body>\n{}\n</body></html>\n"


def check_suffix(path: Path) -> None:
    """Raises ConfigError for a file of another kind than can be drawn."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")


def draw(path: Path, bounds: Sequence[Bound], design: str, planned: int) -> None:
    """Write the picture, whole or not at all.

    Args:
        bounds: by rising fraction, those of the looks taken first. planned: conversations at fraction 1.

    Raises ConfigError for another suffix than png, svg or html.
    """
    check_suffix(path)
    kind = path.suffix.lower()[1:]
    picture = _picture(_alone(bounds, design, planned), "svg" if kind == "html" else kind)
    if kind == "html":
        text = picture.decode()
        picture = PAGE.format(text[text.index("<svg") :]).encode()
    write_bytes(path, picture)


def inline(bounds: Sequence[Bound], design: str, planned: int) -> str:
    """The same as an SVG element of the report, in its colours."""
    from matplotlib import rc_context

    from iterative_ppo.report import svg

    with rc_context(svg.STYLE):
        return svg.inline(_figure(bounds, design, planned, lambda colour: colour), "abtest")


def _alone(bounds: Sequence[Bound], design: str, planned: int) -> Figure:
    from matplotlib import rc_context

    from iterative_ppo.report import svg

    with rc_context({key: svg.LIGHT.get(value, value) for key, value in svg.STYLE.items()}):
        figure = _figure(bounds, design, planned, svg.LIGHT.__getitem__)
        figure.set_facecolor(svg.LIGHT[svg.PAPER])
    return figure


def _figure(bounds: Sequence[Bound], design: str, planned: int, shade: Callable[[str], str]) -> Figure:
    """On a logarithmic scale for e-values, whose bound is far from 1."""
    from iterative_ppo.report import svg

    figure, (axes,) = svg.panels(9.6, 3.7)
    fractions = [100 * one.fraction for one in bounds]
    ink, path = shade(svg.CHAMPION), shade(svg.CHALLENGER)
    if design == "anytime":
        axes.axhline(bounds[0].bound, color=ink, label="bound")
        axes.set_yscale("log")
    else:
        axes.plot(fractions, [one.bound for one in bounds], "o--", color=ink, label="bound")
    taken = [(100 * one.fraction, one.statistic) for one in bounds if one.statistic is not None]
    if taken:
        start = (0.0, 1.0 if design == "anytime" else 0.0)
        axes.plot(*zip(start, *taken, strict=True), "D-", color=path, markevery=slice(1, None), label="what was found")
    axes.set_xlim(0, 1.03 * max(100.0, *fractions))
    axes.set_xlabel(f"matured conversations (% of {planned:,})")
    axes.set_ylabel("e-value" if design == "anytime" else "z")
    axes.legend(loc="best")
    return figure


def _picture(figure: Any, kind: str) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "ab"}):
        figure.savefig(buffer, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
