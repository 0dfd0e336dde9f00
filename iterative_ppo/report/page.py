"""The report as one self-contained HTML page: no script, no network, plots inline."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from iterative_ppo.evaluation.metrics import Calibration
from iterative_ppo.files import write_bytes
from iterative_ppo.report import ab_rows, plots, q_plots, q_rows, rows, technical_plots, words
from iterative_ppo.report.cards import cards
from iterative_ppo.report.record import RunRecord
from iterative_ppo.report.verdict import verdict

TITLE = "Iterative PPO: report of the run"
PACKAGES = ("iterative-ppo", "torch", "transformers")


@dataclass(frozen=True)
class Drawn:
    """A plot with its title and caption."""

    title: str
    svg: Markup
    caption: str


def write_report(root: Path, path: Path, title: str = TITLE, now: datetime | None = None) -> Path:
    """Read the run below the data root `root` and write its report to `path`, whole or not at all.

    Raises StoreError, naming the file, where something of the run is damaged; what is not there yet is left out.
    """
    write_bytes(path, render(RunRecord.read(root), title, now).encode())
    return path


def render(run: RunRecord, title: str = TITLE, now: datetime | None = None) -> str:
    """The page of a run as HTML."""
    loader = PackageLoader("iterative_ppo.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("template.html").render(
        title=title,
        verdict=verdict(run),
        cards=cards(run),
        figures=figures(run),
        rounds=[rows.round_row(run, one) for one in run.rounds],
        examples=rows.examples(run),
        groups=[rows.group_row(*group) for group in plots.labelled_groups(run)],
        guardrails=rows.guardrails(run),
        abtest=ab_rows.ab_section(run),
        credit=q_rows.credit_section(run),
        outcomes=q_rows.outcomes_section(run),
        guesses=rows.guesses(run),
        glossary=words.glossary(run.outcomes, run.success_above),
        footer=footer(run, now or datetime.now(UTC)),
    )


def figures(run: RunRecord) -> dict[str, Drawn | None]:
    """Every plot by name; None where there is nothing to draw yet."""
    drawn = {
        "success": (plots.success, "Successful conversations, with 95% intervals", _success(run)),
        "abtest": (ab_rows.path, "Bounds and path", ab_rows.CAPTION),
        "acceptance": (plots.acceptance, "What became of the suggestions", ACCEPTANCE),
        "calibration": (technical_plots.calibration, "Does Q keep its promises?", _calibration(run)),
        "forecast": (q_plots.forecast, "Does Q know how a conversation ends?", _forecast(run)),
        "credit": (q_plots.credit, "Turn scores beside token scores", CREDIT),
        "losses": (technical_plots.losses, "Passes over given answers, update by update", LOSSES),
        "curves": (technical_plots.curves, f"{_algorithms(run)}, rollout by rollout", CURVES),
        "judges": (technical_plots.judges, "Is Q's praise deserved?", JUDGES),
        "divergence": (technical_plots.divergence, "How far the challenger moved", _divergence(run)),
        "returns": (technical_plots.returns, "Mean return at the start", RETURNS),
    }
    found = {name: (draw(run), title, caption) for name, (draw, title, caption) in drawn.items()}
    return {name: Drawn(title, Markup(svg), caption) if svg else None for name, (svg, title, caption) in found.items()}


ACCEPTANCE = (
    "Shares of the turns at which the policy suggested something, in percent; abstentions are not counted. "
    f"At most the last {plots.MOST_BARS} bars are drawn."
)
LOSSES = (
    "What a pass makes small, as means over neighbouring updates: of the best of n, how surprising the best answers "
    "are to the policy. The newest round is drawn strongest."
)
JUDGES = (
    "Mean Q of each rollout's answers over how far the policy had moved from the champion, and what members of Q that "
    "the improvement never saw say of the same answers. Where they stop rising while Q rises on, the policy learns Q's "
    "errors; a ring marks their highest."
)
CURVES = (
    "Means over each rollout. The KL penalty keeps the policy near its reference; entropy that falls to 0 would mean "
    "that the policy always says the same. A line breaks where a policy iteration begins, with a Q and a reference of "
    "its own. At most the last "
    f"{technical_plots.MOST_ROUNDS} rounds are drawn, the newest strongest."
)
CREDIT = (
    "Rank stability: how well the ranks within a held-out conversation agree, while the reward model learns, with "
    "those that it ends with; 1 is steady. Kendall's tau: how well a conversation's whole score goes with its outcome."
)
RETURNS = "Discounted outcome from the first turn on, with 95% intervals, of data that a round has trained on."


def _algorithms(run: RunRecord) -> str:
    shown = technical_plots.sampled_rounds(run)
    return " and ".join(dict.fromkeys(words.ALGORITHMS[one.algorithm] for one in shown if one.algorithm))


def _success(run: RunRecord) -> str:
    closing = (
        ", or the first and the last policy in the shaded closing comparison" if run.closing and run.changed else ""
    )
    return (
        "Wilson intervals. A promoted challenger is the champion of the next test. Compare only what was measured side "
        f"by side: the two arms of an A/B test{closing}."
    )


def _calibration(run: RunRecord) -> str:
    shown = [(one.number, one.calibration) for one in run.rounds if one.calibration][-technical_plots.MOST_ROUNDS :]
    errors = "; ".join(f"round {number}: {_error(bins)}" for number, bins in shown)
    return (
        "Held-out turns in bins of equal mass, with larger dots for fuller ones; on the dashed line Q would be right. "
        f"Mean error, and in brackets the 95th percentile of what chance gives a perfect Q: {errors}."
    )


def _forecast(run: RunRecord) -> str:
    one = q_plots.forecast_round(run)
    if one is None:
        return ""
    named = "; ".join(f"{q_plots.FORECASTS.get(name, name)}: {_error(bins)}" for name, bins in one.forecast.items())
    return (
        "Q is about discounted returns; here it is held against the whole outcome of its conversation, as it is and "
        f"mapped by what other held-out conversations teach. Mean error and what chance gives, as above: {named}."
    )


def _error(bins: Calibration) -> str:
    beyond = ", so more than chance" if bins.error > bins.chance_95 else ""
    return f"{words.number(bins.error)} ({words.number(bins.chance_95)}{beyond})"


def _divergence(run: RunRecord) -> str:
    bounds = [one.kl_margin for one in run.rounds if one.kl_margin is not None]
    bound = f" The gate's bound on KL(challenger ‖ champion) is {bounds[-1]:g}." if bounds else ""
    return f"On held-out states, by sampling.{bound}"


def footer(run: RunRecord, now: datetime) -> list[str]:
    """Versions, seed, time and settings."""
    temperatures = [one.temperature for one in run.rounds if one.temperature is not None]
    facts = [f"Generated {now.astimezone(UTC):%Y-%m-%d %H:%M} UTC", *_versions()]
    facts += [f"seed {run.seed}"] if run.seed is not None else []
    facts += [f"settings {run.settings_hash}"] if run.settings_hash else []
    facts += [f"sampling temperature {temperatures[-1]:g} (part of the policy)"] if temperatures else []
    return facts


def _versions() -> list[str]:
    found: list[Any] = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
