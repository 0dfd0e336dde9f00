"""matplotlib figures as inline SVG whose colours are the page's CSS variables, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#010203", "#020304", "#030405", "#040506"
CHAMPION, CHALLENGER = "#050607", "#060708"
VERBATIM, EDITED, REJECTED, NONE = "#070809", "#08090a", "#090a0b", "#0a0b0c"
ON_DARK, ON_LIGHT = "#0b0c0d", "#0c0d0e"

# matplotlib draws with these stand-ins; in the SVG each becomes a variable of the style sheet.
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    PAPER: "card",
    CHAMPION: "champion",
    CHALLENGER: "challenger",
    VERBATIM: "verbatim",
    EDITED: "edited",
    REJECTED: "rejected",
    NONE: "none",
    ON_DARK: "on-dark",
    ON_LIGHT: "on-light",
}
LIGHT = {
    INK: "#1c2330",
    MUTED: "#5d6675",
    LINE: "#dfdcd5",
    PAPER: "#ffffff",
    CHAMPION: "#2f6690",
    CHALLENGER: "#c1591b",
}
"""The light colours of the style sheet, for a picture that stands alone."""
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.facecolor": PAPER,
    "legend.edgecolor": PAPER,
    "legend.framealpha": 0.85,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}

styled = rc_context(STYLE)
"""Decorator of functions that draw."""


def panels(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `columns` panels side by side; a unit is 72 pixels at full width."""
    figure = Figure(figsize=(width, height), facecolor="none", layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, **options).flat)


def inline(figure: Figure, name: str) -> str:
    """The figure as an SVG element without anything that a page has once only, or that names an address."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version|width="[\d.]+pt" height)="[^"]*"', "", text, count=4)
    text = text.replace("xlink:href", "href")
    width = 72 * figure.get_figwidth()
    text = text.replace("<svg", f'<svg style="max-width: {1.5 * width:.0f}px; min-width: {0.85 * width:.0f}px"', 1)
    text = re.sub(r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend)_\d+"', "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)).strip()
