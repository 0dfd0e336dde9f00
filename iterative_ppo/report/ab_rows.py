"""The A/B test's section of the report, as the template shows it: everything is text by now."""

from __future__ import annotations

from typing import Any

from iterative_ppo.evaluation.ab_test import level_of
from iterative_ppo.evaluation.bounds import Bound
from iterative_ppo.evaluation.experiment import Look
from iterative_ppo.evaluation.guardrails import LIMIT
from iterative_ppo.report import ab_plot, words
from iterative_ppo.report.ab_record import ABRecord, Checked
from iterative_ppo.report.record import RunRecord

VERDICTS = {
    "promote": ("good", "promoted"),
    "reject": ("bad", "rejected"),
    "stop_futile": ("bad", "no gain to be found"),
    "halt": ("bad", "halted"),
    "void": ("plain", "void"),
    "awaits approval": ("open", "awaits approval"),
    "continue": ("open", "goes on"),
}
DESIGNS = {
    "fixed": "is looked at once, at its planned size",
    "group_sequential": "is looked at a few times on the way, each look paid for",
    "anytime": "may be looked at at any time",
}
CAPTION = (
    "Where what was found reaches the bound, the challenger is better; the bounds are those of all looks together, so "
    "that looking often promotes nobody by chance."
)


def ab_section(run: RunRecord) -> dict[str, Any] | None:
    """The test that runs, or the last that ended."""
    test = run.ab
    if test is None:
        return None
    tone, text = VERDICTS.get(test.verdict, ("open", test.verdict))
    return {
        "heading": f"The {'running' if test.running else 'last'} A/B test",
        "lead": _lead(test),
        "pill": {"tone": tone, "text": text},
        "reasons": [words.reason(reason) for reason in test.reasons],
        "level": level_of(test.alpha),
        "statistic": "e-value" if test.design == "anytime" else "z",
        "looks": [_look(bound, look) for bound, look in zip(test.bounds, _padded(test), strict=True)],
        "guardrails": [_guardrail(one) for one in test.guardrails],
    }


def path(run: RunRecord) -> str | None:
    """Bounds and path of that test; None where it was looked at once."""
    if run.ab is None or _looked_at_once(run.ab):
        return None
    return ab_plot.inline(run.ab.bounds, run.ab.design, run.ab.planned)


def _looked_at_once(test: ABRecord) -> bool:
    """Whether it ended with its first look, which leaves no path to draw."""
    return not test.running and len(test.looks) == 1


def _lead(test: ABRecord) -> str:
    pair = f"{words.policy(test.challenger)} against {words.policy(test.champion)}, round {test.number}"
    size = words.count(test.planned, "matured conversations")
    how = f"was looked at once, at {test.looks[0].fraction:.0%} of them" if _looked_at_once(test) else ""
    return f"{pair[0].upper()}{pair[1:]}: {size} are planned; the test {how or DESIGNS[test.design]}."


def _padded(test: ABRecord) -> list[Look | None]:
    return [*test.looks, *([None] * (len(test.bounds) - len(test.looks)))]


def _look(bound: Bound, look: Look | None) -> dict[str, str]:
    """A look, taken or planned."""
    row = {"fraction": f"{bound.fraction:.0%}", "bound": words.brief(bound.bound)}
    if look is None or look.estimate is None or look.low is None or look.high is None:
        return {**row, **dict.fromkeys(("champion", "challenger", "gain", "interval", "found"), "")}
    arms = zip(("champion", "challenger"), look.rates, look.conversations, strict=True)
    return {
        **row,
        **{name: f"{words.percent(rate)} of {words.count(count)}" for name, rate, count in arms},
        "gain": words.points(look.estimate),
        "interval": words.points_span(look.low, look.high),
        "found": words.brief(look.statistic),
    }


def _guardrail(found: Checked) -> dict[str, Any]:
    values = {
        name: words.brief(found.values.get(key))
        for name, key in (
            ("champion", "champion"),
            ("challenger", "challenger"),
            ("most", "loss_bound"),
            ("margin", "margin"),
        )
    }
    measure, limit, _ = found.measure.partition(LIMIT)
    if limit:
        values |= {"champion": "", "margin": f"limit {values['champion']}"}
    return {"name": f"{words.GUARDRAILS.get(measure, measure)}{limit}", "found": found.found, **values}
