"""The run's key figures, each with what stands behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from iterative_ppo.evaluation.ab_test import ABTest, Arm, p_in_words
from iterative_ppo.report import words
from iterative_ppo.report.customers import CHALLENGER, CHAMPION, Group, wilson
from iterative_ppo.report.record import Closing, RunRecord
from iterative_ppo.report.verdict import current, first, largest, last_test


@dataclass(frozen=True)
class Card:
    """A key figure: what it is, its value, and what stands behind it."""

    name: str
    value: str
    note: str = ""


def cards(run: RunRecord) -> tuple[Card, ...]:
    """The key figures that are known."""
    return tuple(card for card in (*_success(run), *_work(run)) if card)


def _success(run: RunRecord) -> Iterator[Card | None]:
    if run.closing:
        yield from _closing(run.closing, run.changed)
        return
    now, start = current(run), first(run)
    if now and last_test(run):
        yield _rate_card("Success, last test", now)
    yield _rate_card("Success in the log" if run.rounds[0].from_logs else "Success at start", start) if start else None
    if found := last_test(run):
        yield Card("Gain, last test", words.points(found[0].gain).split()[0], _interval(found[0]))


def _closing(closing: Closing, changed: bool) -> Iterator[Card]:
    yield _rate_card("Success now", closing.test.challenger, closing.last)
    if changed:
        yield _rate_card("Success at start", closing.test.champion, closing.first)
        yield Card("Gain in points", words.points(closing.test.gain).split()[0], _interval(closing.test))


def _interval(test: ABTest) -> str:
    return f"{words.points_span(test.gain_low, test.gain_high)}\n{p_in_words(test.p_value)}"


def _rate_card(name: str, arm: Arm, policy: str | None = None) -> Card:
    who = f"{words.policy(policy)}, " if policy else ""
    note = f"{words.span(*wilson(arm))}\n{who}n = {words.count(arm.conversations)}"
    return Card(name, words.percent(arm.rate), note)


def _work(run: RunRecord) -> Iterator[Card | None]:
    if not run.rounds:
        return
    challengers = sum(one.offline is not None for one in run.rounds)
    kept = f"{run.promotions} of {words.count(challengers, 'challengers')}\npromoted"
    yield Card("Rounds", str(len(run.rounds)), kept if challengers else "no challenger yet")
    data = sum(one.conversations or 0 for one in run.rounds) + sum(g.success.conversations for g in run.tested)
    aside = sum(one.quarantined or 0 for one in run.rounds)
    left = sum(sum(one.set_aside.values()) for one in run.rounds)
    note = f"{words.count(aside)} quarantined" + (f"\n{words.count(left)} set aside at import" if left else "")
    yield Card("Conversations", words.count(data), note) if data else None
    latest = serving(run)
    if latest and latest.adoption:
        note = f"{words.policy(latest.policy)}\n{words.percent(latest.abstained)} abstained"
        yield Card("Sent verbatim", words.percent(latest.adoption["verbatim"]), note)


def serving(run: RunRecord) -> Group | None:
    """The latest conversations of the policy that serves customers now."""
    groups = run.tested or (run.rounds[-1].groups if run.rounds else ())
    decided = [one for one in run.rounds if one.decision]
    won = bool(decided) and decided[-1].promoted
    return largest(groups, CHALLENGER if won else CHAMPION) or largest(groups, CHAMPION)
