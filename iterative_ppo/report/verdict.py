"""What the run comes to: one sentence in plain words, a line of support, and the key figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from iterative_ppo.evaluation.ab_test import ABTest, Arm
from iterative_ppo.report import words
from iterative_ppo.report.customers import CHALLENGER, CHAMPION, Group, wilson
from iterative_ppo.report.record import Closing, RoundRecord, RunRecord


@dataclass(frozen=True)
class Verdict:
    """`tone` is good, open or plain, and colours the page's head."""

    status: str
    tone: str
    sentence: str
    detail: str = ""


@dataclass(frozen=True)
class Card:
    """A key figure: what it is, its value, and what stands behind it."""

    name: str
    value: str
    note: str = ""


def verdict(run: RunRecord) -> Verdict:
    """The sentence at the top of the page, by how far the run has come."""
    if not run.rounds:
        return Verdict("Not begun", "open", "No round has been run yet; there is nothing to report.", _doing(run))
    if run.closing and run.promotions:
        return _closed(run, run.closing)
    if (last := run.rounds[-1]).offline and last.offline.verdict == "test" and not last.decision:
        return _open_test(run, last)
    if run.phase == "finished" or (run.phase is None and last.offline):
        return _finished(run) if run.promotions else _unchanged(run)
    return _under_way(run)


def _closed(run: RunRecord, closing: Closing) -> Verdict:
    test = closing.test
    better = test.p_value < test.alpha and test.gain > 0
    p = words.p_value(test.p_value)
    began = f"it began at {words.percent(test.champion.rate)}"
    tail = f"{began} ({p})" if better else f"{began}, and the difference may be chance ({p})"
    sentence = f"After {_rounds(run)} the assistant {_rate(run, test.challenger)}; {tail}."
    sizes = sorted({test.champion.conversations, test.challenger.conversations})
    each = " each" if len(sizes) == 1 else ""
    fresh = f"Fresh customers, {' and '.join(words.count(n) for n in sizes)} conversations{each}."
    gain = f"The gain is {words.points(test.gain)} (95% interval {words.points_span(test.gain_low, test.gain_high)})."
    return Verdict("Finished", "good" if better else "plain", sentence, f"{fresh} {gain}")


def _open_test(run: RunRecord, last: RoundRecord) -> Verdict:
    policy = f"policy {last.challenger}" if last.challenger else "a new policy"
    if last.from_logs or run.phase is None:
        source = (
            f"From {words.count(last.conversations, 'conversations')} in the log" if last.conversations else "Offline"
        )
        learned = f"{source}, {policy} was trained and passed the offline checks"
        aim = words.succeeds(run.outcomes).split()[0]
        sentence = f"{learned}; whether it {aim} more often, only an A/B test with customers can tell."
        return Verdict("Awaiting an A/B test", "open", sentence, _so_far(run))
    sentence = f"{policy.capitalize()} passed the offline checks and is being tested with customers"
    against = f" against policy {last.champion}" if last.champion else ""
    detail = "The test is read once, when its planned number of conversations has matured."
    return Verdict("A/B test running", "open", f"{sentence}{against}.", f"{detail} {_so_far(run)}".strip())


def _finished(run: RunRecord) -> Verdict:
    kept = "1 challenger" if run.promotions == 1 else f"{run.promotions} challengers"
    now = current(run)
    rate = f"; in its last A/B test the assistant {_rate(run, now)}" if now else ""
    sentence = f"After {_rounds(run)}, {kept} proved better with customers{rate}."
    return Verdict("Finished", "good", sentence, "The closing comparison with the first policy is not there yet.")


def _unchanged(run: RunRecord) -> Verdict:
    tested = any(one.test for one in run.rounds)
    why = "no challenger proved better with customers" if tested else "no challenger passed the offline checks"
    sentence = f"After {_rounds(run)} {why}, so the assistant stays as it was."
    now = run.closing.test.challenger if run.closing else current(run)
    return Verdict("Finished, nothing promoted", "plain", sentence, f"It {_rate(run, now)}." if now else "")


def _under_way(run: RunRecord) -> Verdict:
    now = current(run)
    done = sum(one.decision is not None for one in run.rounds)
    if now and run.promotions:
        sentence = f"After {_rounds(run, done)} the assistant {_rate(run, now)}"
        start = first(run)
        began = f"; it began at {words.percent(start.rate)}" if start else ""
        return Verdict(
            "In progress", "open", f"{sentence}{began}.", f"{_doing(run)} These are A/B tests and no final result."
        )
    rate = f": so far the assistant {_rate(run, now)}" if now else ""
    return Verdict("In progress", "open", f"The run is under way{rate}.", _doing(run))


def _doing(run: RunRecord) -> str:
    doing = {"collect": "Conversations are being collected", "train": "A challenger is being trained"}
    where = f" for round {run.round}" if run.phase == "collect" else f" in round {run.round}"
    return f"{doing[run.phase]}{where}." if run.phase in doing else ""


def _so_far(run: RunRecord) -> str:
    now = current(run)
    return f"The present assistant {_rate(run, now)}." if now else ""


def _rate(run: RunRecord, arm: Arm) -> str:
    return f"{words.succeeds(run.outcomes)} {words.percent(arm.rate)} of conversations"


def _rounds(run: RunRecord, done: int | None = None) -> str:
    return words.count(sum(one.offline is not None for one in run.rounds) if done is None else done, "rounds")


def largest(groups: tuple[Group, ...], role: str) -> Group | None:
    """The group of that role with most conversations."""
    return max((g for g in groups if g.role == role), key=lambda g: g.success.conversations, default=None)


def first(run: RunRecord) -> Arm | None:
    """How the first policy did when the run began."""
    group = largest(run.rounds[0].groups, CHAMPION) if run.rounds else None
    return group.success if group else None


def last_test(run: RunRecord) -> tuple[ABTest, bool] | None:
    """The last decided A/B test, and whether its challenger won."""
    decided = [(one.test, one.promoted) for one in run.rounds if one.test and one.decision]
    return decided[-1] if decided else None


def current(run: RunRecord) -> Arm | None:
    """How the present champion did in the last decided A/B test, or in the first data where there is none."""
    if found := last_test(run):
        test, won = found
        return test.challenger if won else test.champion
    return first(run)


def cards(run: RunRecord) -> tuple[Card, ...]:
    """The key figures that are known."""
    return tuple(card for card in (*_success(run), *_work(run)) if card)


def _success(run: RunRecord) -> Iterator[Card | None]:
    if run.closing:
        test = run.closing.test
        yield _rate_card("Success now", test.challenger, run.closing.last)
        yield _rate_card("Success at start", test.champion, run.closing.first)
        yield Card("Gain in points", words.points(test.gain).split()[0], _interval(test))
        return
    now, start = current(run), first(run)
    if now and last_test(run):
        yield _rate_card("Success, last A/B test", now)
    yield _rate_card("Success at start", start) if start else None
    if found := last_test(run):
        yield Card("Last challenger's gain", words.points(found[0].gain).split()[0], _interval(found[0]))


def _interval(test: ABTest) -> str:
    return f"{words.points_span(test.gain_low, test.gain_high)}\n{words.p_value(test.p_value)}"


def _rate_card(name: str, arm: Arm, policy: str | None = None) -> Card:
    who = f"policy {policy}, " if policy else ""
    note = f"{words.span(*wilson(arm))}\n{who}n = {words.count(arm.conversations)}"
    return Card(name, words.percent(arm.rate), note)


def _work(run: RunRecord) -> Iterator[Card | None]:
    if not run.rounds:
        return
    begun = len(run.rounds)
    yield Card("Rounds", str(begun), f"{run.promotions} of {words.count(begun, 'challengers')}\npromoted")
    data = sum(one.conversations or 0 for one in run.rounds) + sum(g.success.conversations for g in run.tested)
    aside = sum(one.quarantined or 0 for one in run.rounds)
    yield Card("Conversations", words.count(data), f"{words.count(aside)} quarantined") if data else None
    latest = serving(run)
    if latest and latest.adoption:
        note = f"policy {latest.policy}\n{words.percent(latest.abstained)} abstained"
        yield Card("Sent verbatim", words.percent(latest.adoption["verbatim"]), note)


def serving(run: RunRecord) -> Group | None:
    """The latest conversations of the policy that serves customers now."""
    groups = run.tested or (run.rounds[-1].groups if run.rounds else ())
    decided = [one for one in run.rounds if one.decision]
    won = bool(decided) and decided[-1].promoted
    return largest(groups, CHALLENGER if won else CHAMPION) or largest(groups, CHAMPION)
