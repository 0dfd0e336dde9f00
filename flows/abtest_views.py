"""The A/B test that runs, or the last that ended, as JSON-able values and as tables for a person at a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.table import Table

from iterative_ppo.config import Config
from iterative_ppo.errors import StoreError, TurnTableError
from iterative_ppo.evaluation.ab_test import level_of
from iterative_ppo.evaluation.bounds import Bound, bounds
from iterative_ppo.evaluation.experiment import History, Look, too_few_businesses
from iterative_ppo.evaluation.non_inferiority import NonInferiority
from iterative_ppo.evaluation.plan import PlannedDesign
from tasks import approvals, experiments, looks
from tasks.assignment import share_in_force
from tasks.audit import history
from tasks.state import Experiment, NightState

PLAN = ("design", "at most", "if equal", "if better")
DAYS = ("days: at most", "if equal", "if better")


def standing(config: Config, state: NightState, now: datetime) -> dict[str, Any]:
    """What `ippo abtest --json` prints. Success rates are those of the looks taken: between looks nobody peeks.

    Raises StoreError where there has been no test, and what `looks.evidence` raises.
    """
    if state.experiment is not None:
        return _running(config, state, state.experiment, now)
    tested = [record for record in state.rounds if record.get("experiment")]
    if not tested:
        raise StoreError(f"no A/B test has begun yet (phase {state.phase}); see `ippo status`")
    last = tested[-1]
    test = Experiment.model_validate(last["experiment"])
    decision = {"verdict": "void", "reasons": [last["void"]]} if "void" in last else last["decision"]
    return {**_told(config, last["round"], test), "running": False, **decision, "test": last.get("ab_test")}


def _running(config: Config, state: NightState, tested: Experiment, now: datetime) -> dict[str, Any]:
    seen = looks.evidence(config, state, now)
    told = _told(config, state.round, tested)
    few = _uncompared(seen.history) if seen and config.abtest.unit == "business" else None
    verdict = _verdict(config, state, tested, seen, few)
    arms = seen.arms if seen else (0, 0)
    waiting = {name: getattr(seen, name, 0) for name in ("ramp", "maturing", "faulty", "strangers")}
    return {
        **told,
        "running": True,
        **verdict,
        "matured": dict(zip(("champion", "challenger"), arms, strict=True)),
        "waiting": waiting,
        "share": share_in_force(config, tested, now),
        "next_look": None if few or verdict["verdict"] != "continue" else _next_look(config, told["bounds"], seen, now),
    }


def _uncompared(history: History) -> str | None:
    """Why businesses cannot be compared; None where they can. One in both arms fails a look, and is told here."""
    try:
        return too_few_businesses(history)
    except TurnTableError as error:
        return str(error)


def _told(config: Config, number: int, tested: Experiment) -> dict[str, Any]:
    settings = {**looks.settings_of(config), **tested.settings}
    taken, design, alpha = (
        [Look.from_dict(one) for one in tested.looks],
        settings["abtest.design"],
        settings["gate.alpha"],
    )
    return {
        "round": number,
        **tested.model_dump(mode="json", include={"salt", "champion", "challenger", "started", "looks", "guardrails"}),
        "design": design,
        "planned": settings["abtest.conversations"],
        "alpha": alpha,
        "bounds": [asdict(bound) for bound in bounds(design, settings["abtest.looks"], alpha, taken)],
    }


def _verdict(
    config: Config, state: NightState, tested: Experiment, seen: looks.Evidence | None, few: str | None
) -> dict[str, Any]:
    """The verdict so far, and why; `few` is why the next look compares nothing."""
    ended = experiments.ended(config.data.root, tested)
    if ended is not None:
        return {"verdict": ended["verdict"], "reasons": [*ended["reasons"], "the next night goes on from there"]}
    if state.approval is not None and state.approval.kind == "promote":
        records = history(config.data.root)
        if answered := approvals.answer(records, state.approval):
            verdict = "promote" if approvals.approved(records, state.approval) else "reject"
            return {"verdict": verdict, "reasons": [answered, *state.approval.reasons]}
        return {"verdict": "awaits approval", "reasons": list(state.approval.reasons)}
    nothing = ["no conversation of it has arrived yet"] if seen is None else [seen.missing] if seen.missing else []
    waiting = [few] if few else []
    if tested.looks:
        return {"verdict": tested.looks[-1]["verdict"], "reasons": [*waiting, *tested.looks[-1]["reasons"]]}
    return {"verdict": "continue", "reasons": nothing or waiting or ["no look has been taken yet"]}


def _next_look(
    config: Config, ahead: Sequence[Mapping[str, Any]], seen: looks.Evidence | None, now: datetime
) -> dict[str, Any] | None:
    """The next look of the plan, in matured conversations of both arms, and about when, at the pace so far."""
    planned = [one for one in ahead if one["statistic"] is None]
    if not planned:
        return None
    matured = sum(seen.arms) if seen else 0
    anytime = config.abtest.design == "anytime"
    due = matured if anytime else math.ceil(planned[0]["fraction"] * config.abtest.conversations - 1e-9)
    is_due, pace = matured >= due and matured > 0, seen.pace if seen else None
    expected = max(pace.matured(due), now).isoformat(timespec="minutes") if pace and not is_due else None
    found = {"conversations": due, "due": is_due, "bound": planned[0]["bound"], "expected": expected}
    return found | {"conversations_per_day": round(24 * pace.hourly, 1) if pace else None}


def lines(told: Mapping[str, Any]) -> Iterator[str]:
    """What a person reads above the tables."""
    pair = f"policy version {told['challenger']} against {told['champion']}"
    yield f"A/B test of round {told['round']}: {pair}, {told['design']}, salt {told['salt']}"
    if told["running"]:
        matured, waiting = told["matured"], told["waiting"]
        yield (
            f"matured: {sum(matured.values()):,} of {told['planned']:,} ({matured['champion']:,} champion, "
            f"{matured['challenger']:,} challenger); still maturing: {waiting['maturing']:,}; of the ramp's safety "
            f"stages, no evidence: {waiting['ramp']:,}"
        )
        if waiting["faulty"]:
            yield f"left out, for they break the turn table's rules: {waiting['faulty']:,}"
        if waiting["strangers"]:
            yield f"left out, for their policy_version is of neither arm: {waiting['strangers']:,}"
        if told["verdict"] not in ("promote", "reject"):
            yield f"the challenger now meets {told['share']:.0%} of customers"
        yield _next(told)
    yield f"verdict{' so far' if told['running'] else ''}: {told['verdict']}"
    yield from (f"  {reason}" for reason in told["reasons"])


def _next(told: Mapping[str, Any]) -> str:
    following = told["next_look"]
    if told["verdict"] == "halt":
        return "next look: none; end this test with `ippo abtest --stop` and its reason"
    if following is None:
        return f"next look: none{' yet' if told['verdict'] == 'continue' else ''}"
    when = "the next night takes it" if following["due"] else f"at {following['conversations']:,} matured conversations"
    if following["expected"]:
        day = datetime.fromisoformat(following["expected"]).date()
        when += f", about {day} at {following['conversations_per_day']:,g} conversations a day"
    return f"next look: {when}; bound {following['bound']:.4g}"


def look_table(told: Mapping[str, Any]) -> Table:
    """A row a look, taken or planned."""
    statistic = "e-value" if told["design"] == "anytime" else "z"
    gain = f"gain ({level_of(told['alpha'])} interval)"
    table = Table("plan", "champion", "challenger", gain, statistic, "bound", box=None, pad_edge=False)
    taken = [look for look in told["looks"] if look["statistic"] is not None]
    for place, bound in enumerate(told["bounds"]):
        measured = _measured(taken[place]) if place < len(taken) else ("", "", "", "")
        table.add_row(f"{bound['fraction']:.0%}", *measured, f"{bound['bound']:.4g}")
    return table


def _measured(look: Mapping[str, Any]) -> tuple[str, str, str, str]:
    champion, challenger = (
        f"{rate:.1%} of {count}" for rate, count in zip(look["rates"], look["conversations"], strict=True)
    )
    gain = f"{look['estimate']:+.1%} ({look['low']:+.1%} to {look['high']:+.1%})"
    return champion, challenger, gain, f"{look['statistic']:.4g}"


def guardrail_table(told: Mapping[str, Any]) -> Table:
    """A row a guardrail, as the last look found it."""
    table = Table("guardrail", "champion", "challenger", "loss at most", "margin", "found", box=None, pad_edge=False)
    for one in told["guardrails"]:
        names = ("champion", "challenger", "loss_bound", "margin")
        values = ("unknown" if one[name] is None else f"{round(one[name], 6) + 0.0:.4g}" for name in names)
        table.add_row(one["measure"], *values, NonInferiority.from_dict(one).found)
    return table


def bounds_of(told: Mapping[str, Any]) -> list[Bound]:
    """For the plot."""
    return [Bound(**one) for one in told["bounds"]]


def plan_table(planned: Sequence[PlannedDesign]) -> Table:
    """A row a design: conversations of both arms, and days where the traffic is known."""
    timed = all(one.most_days is not None for one in planned)
    table = Table(*PLAN, *(DAYS if timed else ()), box=None, pad_edge=False)
    for one in planned:
        sizes = (one.most, one.expected_if_equal, one.expected_if_better)
        days = (one.most_days, one.expected_days_if_equal, one.expected_days_if_better) if timed else ()
        table.add_row(one.design, *(f"{size:,}" for size in sizes), *(f"{day:,.1f}" for day in days))
    return table
