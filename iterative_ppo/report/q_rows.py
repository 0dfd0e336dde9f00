"""Two sections of the report: what Q is about where turns are paid, and each named outcome by itself."""

from __future__ import annotations

from itertools import zip_longest
from math import hypot
from typing import Any

from iterative_ppo.report import words
from iterative_ppo.report.customers import CHALLENGER, CHAMPION, Group, Mean
from iterative_ppo.report.plots import gathered
from iterative_ppo.report.q_record import CreditRecord, OutcomeRecord
from iterative_ppo.report.record import RunRecord

ASSIGNERS = {"itpo": "ITPO", "norm_itpo": "Norm-ITPO"}


def credit_section(run: RunRecord) -> dict[str, Any] | None:
    """Rounds whose Q was fitted to turn rewards; None where there is none."""
    found = [(one.number, one.credit) for one in run.rounds if one.credit]
    if not found:
        return None
    objective = found[-1][1].objective
    return {
        "objective": f"{objective[0].upper()}{objective[1:]}.",
        "rows": [{"number": number, **_credit(credit)} for number, credit in found],
    }


def _credit(credit: CreditRecord) -> dict[str, str]:
    def figure(name: str) -> str:
        return words.number(credit.figures.get(f"credit_{name}"))

    return {
        "assigner": ASSIGNERS.get(credit.assigner, credit.assigner),
        "turn": figure("turn_rank_stability"),
        "token": figure("token_rank_stability"),
        "tau": figure("kendall_tau"),
        "held_out": words.count(credit.figures.get("credit_held_out_conversations")),
        "others": words.count(credit.figures.get("credit_conversations_of_others_left_out")),
        "silent": words.count(credit.figures.get("credit_conversations_without_suggestion")),
    }


def outcomes_section(run: RunRecord) -> dict[str, Any] | None:
    """Q and customers by outcome; None where there is but one."""
    if len(run.outcomes) < 2:
        return None
    return {
        "q": [{"number": one.number, **_q(name, q)} for one in run.rounds for name, q in one.outcomes.items()],
        "tests": [row for origin, *pair in _tests(run) for row in _compared(run, origin, pair[0], pair[1])],
    }


def _q(name: str, outcome: OutcomeRecord) -> dict[str, str]:
    figures = outcome.figures
    return {
        "name": name,
        "weight": f"{outcome.weight:g}".replace("-", "−"),
        "r2": words.number(figures.get("r2")),
        "state_r2": words.number(figures.get("state_only_r2")),
        "auc": words.number(figures.get("auc")),
        "calibration": words.number(figures.get("calibration_error")),
        "chance": words.number(figures.get("calibration_error_by_chance_95")),
    }


def _tests(run: RunRecord) -> list[tuple[str, Group, Group]]:
    """Conversations of A/B tests: where they come from, and the groups of the champion and of its challenger."""
    found = []
    for one, after in zip_longest(run.rounds, run.rounds[1:]):
        groups = {(group.arm, group.policy): group for group in (after.groups if after else run.tested)}
        champion, challenger = groups.get((CHAMPION, one.champion)), groups.get((CHALLENGER, one.challenger))
        if champion and challenger:
            found.append((gathered(one, after), champion, challenger))
    return found


def _compared(run: RunRecord, origin: str, champion: Group, challenger: Group) -> list[dict[str, str]]:
    rows = []
    for name in run.outcomes:
        before, after = champion.outcomes.get(name), challenger.outcomes.get(name)
        if before is None or after is None:
            continue
        gain = after.value - before.value
        half = hypot(after.high - after.value, before.high - before.value)
        rows.append(
            {
                "origin": origin,
                "name": name,
                "champion": _mean(before),
                "challenger": _mean(after),
                "gain": words.change(gain),
                "interval": f"{words.change(gain - half)} to {words.change(gain + half)}",
            }
        )
    return rows


def _mean(mean: Mean) -> str:
    return words.number(mean.value)
