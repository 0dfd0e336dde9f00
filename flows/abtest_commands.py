"""The commands about A/B tests: `ippo plan` before one, `ippo abtest` while it runs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.options import AsJson, Params, Sets, configured, person, show

if TYPE_CHECKING:
    from iterative_ppo.config import Config


def add_to(app: typer.Typer) -> None:
    """Add these commands to `ippo`."""
    for command in (plan, abtest):
        app.command()(command)


FEW_SUCCESSES = 20


def plan(
    base: Annotated[float, typer.Option(help="The champion's success rate, a share: .3.")],
    mde: Annotated[float | None, typer.Option(help="The least gain worth finding, a share: .03 is 3 points.")] = None,
    power: Annotated[float | None, typer.Option(help="Probability of finding it where it is there.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Probability of promoting one that is no better.")] = None,
    per_day: Annotated[float | None, typer.Option(help="Conversations a day, both arms together; adds days.")] = None,
    as_json: AsJson = False,
    params: Params = None,
    sets: Sets = None,
) -> None:
    """How many conversations, and days, an A/B test needs in each design.

    "at most" is the size to plan (`abtest.conversations`). A design that looks on the way expects to end earlier: "if
    equal" where the challenger is no better, "if better" where it is better by the MDE. Days count from the start: the
    ramp's safety stages and the wait until outcomes have matured are in them. What is not given comes from `abtest`
    and `gate.alpha`. For example: `ippo plan --base .3 --mde .03 --per-day 500`.
    """
    config, _, _ = configured(params, sets, abtest__mde=mde, abtest__power=power, gate__alpha=alpha)
    from flows.abtest_views import plan_table
    from iterative_ppo.evaluation.plan import misgivings
    from iterative_ppo.evaluation.plan import plan as planned_designs
    from tasks.looks import maturity_hours

    test = config.abtest
    planned = planned_designs(test, config.gate.alpha, base, per_day, maturity_hours(config))
    if as_json:
        typer.echo(json.dumps([one.as_dict() for one in planned], indent=2))
        return
    typer.echo(
        f"conversations of both arms to tell {base:.1%} from {base + test.mde:.1%}: one-sided alpha "
        f"{config.gate.alpha:g}, power {test.power:g}, challenger's share {test.challenger_share:g}, unit {test.unit}"
    )
    show(plan_table(planned))
    (mine,) = (one for one in planned if one.design == test.design)
    enough = (
        "enough for the outcome"
        if test.conversations >= mine.most
        else f"too few; set abtest.conversations={mine.most}"
    )
    typer.echo(f"configured: {test.design}, {test.conversations:,} conversations: {enough}")
    for told in misgivings(config, base):
        typer.echo(told)
    expected = min(base, 1 - base) * test.smaller_share * test.conversations
    if test.design != "anytime" and expected < FEW_SUCCESSES:
        typer.echo(
            f"the smaller arm expects {expected:.1f} conversations of the rarer end; below {FEW_SUCCESSES} the normal "
            f"distribution promotes more often than alpha says (.076 for .05 where 1.5 are expected): give that arm a "
            "larger share, or set abtest.design to anytime"
        )


def abtest(
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw bounds and path: FILE.png, .svg or .html.")] = None,
    stop: Annotated[str | None, typer.Option(help="End the running test without a verdict, and why.")] = None,
    params: Params = None,
    sets: Sets = None,
) -> None:
    """The running A/B test, or the last one: arms, looks and bounds, guardrails, the verdict so far, the next look.

    Only nights look (`ippo deploy`), so that no look is wasted: success rates are those of the looks taken. A test that
    is halted, because its arms do not hold the shares that they should, is ended with --stop; its conversations
    become data, and the next challenger begins a new test under a new salt.
    """
    config, _, _ = configured(params, sets)
    if plot is not None:
        from iterative_ppo.report.ab_plot import check_suffix

        check_suffix(plot)
    if stop is not None:
        typer.echo(_stopped(config, stop))
        return
    told = _standing(config)
    if plot is not None:
        from flows.abtest_views import bounds_of
        from iterative_ppo.report.ab_plot import draw

        draw(plot, bounds_of(told), told["design"], told["planned"])
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    from flows import abtest_views

    for line in abtest_views.lines(told):
        typer.echo(line)
    show(abtest_views.look_table(told))
    if told["guardrails"]:
        show(abtest_views.guardrail_table(told))
    if plot is not None:
        typer.echo(f"plot: {plot}")


def _standing(config: Config) -> dict[str, Any]:
    from flows.abtest_views import standing
    from flows.champions import end_void_test, settle
    from tasks import tracking
    from tasks.state import load_state

    store = tracking.open_tracking(config)
    settle(config, store, "ippo abtest")
    end_void_test(config, store, load_state(config.data.root))
    return standing(config, load_state(config.data.root), datetime.now(UTC))


def _stopped(config: Config, reason: str) -> str:
    """End the running test as void; the next night goes on from there."""
    from flows.champions import settle
    from iterative_ppo.errors import StoreError
    from tasks import experiments, registry, tracking
    from tasks.state import load_state, only_one

    with only_one(config.data.root):
        store = tracking.open_tracking(config)
        settle(config, store, "ippo abtest")
        tested = load_state(config.data.root).experiment
        if tested is None or experiments.verdicts(config.data.root, tested):
            raise StoreError("no A/B test is running, so none can be stopped; see `ippo status`")
        said = f"stopped by {person()}: {reason}"
        experiments.end(config.data.root, tested, {"verdict": "void", "reasons": [said]}, {})
        registry.withdraw(store, tested.challenger, said)
    return f"{tested.salt}: {said}; the next night goes on from there"
