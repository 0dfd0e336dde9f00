"""What the run comes to: one sentence in plain words, and a line of support."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from iterative_ppo.evaluation.ab_test import ABTest, Arm, p_in_words
from iterative_ppo.report import words
from iterative_ppo.report.customers import CHAMPION, Group
from iterative_ppo.report.record import Closing, RoundRecord, RunRecord


@dataclass(frozen=True)
class Verdict:
    """`tone` is good, open or plain, and colours the page's head."""

    status: str
    tone: str
    sentence: str
    detail: str = ""


def verdict(run: RunRecord) -> Verdict:
    """The sentence at the top of the page, by how far the run has come."""
    if not run.rounds:
        return Verdict("Not begun", "open", "No round has been run yet; there is nothing to report.", _doing(run))
    if run.closing and run.changed:
        return _closed(run, run.closing)
    if (last := run.rounds[-1]).offline and last.offline.verdict == "test" and not (last.decision or last.void):
        return _open_test(run, last)
    if run.phase == "finished" or (run.phase is None and last.offline):
        return _finished(run) if run.changed else _unchanged(run)
    return _under_way(run)


def _closed(run: RunRecord, closing: Closing) -> Verdict:
    test = closing.test
    p = p_in_words(test.p_value)
    began = f"it began at {words.percent(test.champion.rate)}"
    tail = f"{began} ({p})" if test.better else f"{began}, and the difference may be chance ({p})"
    sentence = f"After {_rounds(run)} the assistant {_rate(run, test.challenger)}; {tail}."
    sizes = sorted({test.champion.conversations, test.challenger.conversations})
    each = " each" if len(sizes) == 1 else ""
    fresh = f"Fresh customers, {' and '.join(words.count(n) for n in sizes)} conversations{each}."
    gain = f"The gain is {words.points(test.gain)} (95% interval {words.points_span(test.gain_low, test.gain_high)})."
    return Verdict("Finished", "good" if test.better else "plain", sentence, f"{fresh} {gain} {_ended(run)}".strip())


def _open_test(run: RunRecord, last: RoundRecord) -> Verdict:
    policy = words.policy(last.challenger) if last.challenger else "a new policy"
    if run.unmet or run.phase is None:
        learned = f", trained on {words.count(last.conversations, 'conversations')}" if last.conversations else ""
        aim = words.succeeds(run.outcomes, run.success_above).removesuffix(" in")
        passed = f"{policy}{learned}{' of a log,' if learned else ''} passed the offline checks"
        sentence = f"{passed[0].upper()}{passed[1:]}; only an A/B test can tell whether it {aim} more often."
        return Verdict("Awaiting an A/B test", "open", sentence, _so_far(run))
    sentence = f"{policy[0].upper()}{policy[1:]} passed the offline checks and is being tested with customers"
    against = f" against {words.policy(last.champion)}" if last.champion else ""
    if run.ab and run.ab.verdict == "halt":
        fault = f"The A/B test of {policy} is halted, and nothing is decided by it: {run.ab.reasons[0]}."
        return Verdict("A/B test halted", "open", fault, f"A person ends it with `ippo abtest --stop`. {_so_far(run)}")
    detail = "It is looked at as planned; `ippo abtest` shows how far it has come."
    if run.phase == "approve":
        detail = "A person is asked for approval; `ippo status` says of what."
    return Verdict("A/B test running", "open", f"{sentence}{against}.", f"{detail} {_so_far(run)}".strip())


def _finished(run: RunRecord) -> Verdict:
    kept = "1 challenger" if run.promotions == 1 else f"{run.promotions} challengers"
    now = current(run)
    rate = f"; in its last A/B test the assistant {_rate(run, now)}" if now else ""
    sentence = f"After {_rounds(run)}, {kept} proved better with customers{rate}."
    detail = f"{_tested(run)} The closing comparison with the first policy is not there yet. {_ended(run)}"
    return Verdict("Finished", "good", sentence, detail.strip())


def _unchanged(run: RunRecord) -> Verdict:
    tested = any(one.test for one in run.rounds)
    why = "no challenger proved better with customers" if tested else "no challenger passed the offline checks"
    why = "the first policy serves again" if run.promotions else why
    held = "" if run.promotions else _held_back(run)
    found = f", {held}" if held else f" {why}"
    sentence = f"After {_rounds(run)}{found}, so the assistant stays as it was."
    now = run.closing.test.challenger if run.closing else current(run)
    rate = f"It {_rate(run, now)}. " if now else ""
    return Verdict("Finished, nothing promoted", "plain", sentence, f"{rate}{_ended(run)}".strip())


def _ended(run: RunRecord) -> str:
    """Why there is no further round, where the run is over."""
    ended = run.rounds[-1].convergence if run.phase == "finished" else None
    return f"Converged: {ended}." if ended else ""


def _held_back(run: RunRecord) -> str:
    """How many challengers did better with customers and were not promoted, and why; empty where none did."""
    found = [one.held_back for one in run.rounds if one.held_back]
    if not found:
        return ""
    why = "; ".join(dict.fromkeys(reason for reasons in found for reason in reasons))
    were = "was" if len(found) == 1 else "were"
    return f"{words.count(len(found), 'challengers')} did better with customers and {were} not promoted ({why})"


def _under_way(run: RunRecord) -> Verdict:
    now = current(run)
    done = sum(one.decision is not None for one in run.rounds)
    if now and run.changed:
        sentence = f"After {_rounds(run, done)} the assistant {_rate(run, now)}"
        start = first(run)
        began = "in the log it was" if run.rounds[0].from_logs else "it began at"
        began = f"; {began} {words.percent(start.rate)}" if start else ""
        return Verdict("In progress", "open", f"{sentence}{began}.", f"{_doing(run)} {_tested(run)}".strip())
    rate = f": so far the assistant {_rate(run, now)}" if now else ""
    return Verdict("In progress", "open", f"The run is under way{rate}.", _doing(run))


def _doing(run: RunRecord) -> str:
    doing = {"collect": "Conversations are being collected", "train": "A challenger is being trained"}
    where = f" for round {run.round}" if run.phase == "collect" else f" in round {run.round}"
    return f"{doing[run.phase]}{where}." if run.phase in doing else ""


def _tested(run: RunRecord) -> str:
    found = last_test(run)
    return f"The last A/B test: {words.gain(found[0])}." if found else ""


def _so_far(run: RunRecord) -> str:
    now = current(run)
    if now and run.rounds[-1].from_logs:
        succeeded = words.succeeded(run.outcomes, run.success_above)
        return f"In the log, {words.percent(now.rate)} of conversations {succeeded}."
    return f"The present assistant {_rate(run, now)}." if now else ""


def _rate(run: RunRecord, arm: Arm) -> str:
    return f"{words.succeeds(run.outcomes, run.success_above)} {words.percent(arm.rate)} of conversations"


def _rounds(run: RunRecord, done: int | None = None) -> str:
    return words.count(sum(one.offline is not None for one in run.rounds) if done is None else done, "rounds")


def largest(groups: tuple[Group, ...], role: str) -> Group | None:
    """The group of that role with most conversations."""
    return max((g for g in groups if g.role == role), key=lambda g: g.success.conversations, default=None)


def first(run: RunRecord) -> Arm | None:
    """How the first policy did when the run began; where that was a log, how all who wrote it did together."""
    if run.rounds and run.rounds[0].from_logs:
        arms = [group.success for group in run.rounds[0].groups]
        return Arm(sum(arm.successes for arm in arms), sum(arm.conversations for arm in arms))
    group = largest(run.rounds[0].groups, CHAMPION) if run.rounds else None
    return group.success if group else None


def decided_tests(run: RunRecord) -> Iterator[tuple[RoundRecord, ABTest]]:
    """The last one first."""
    yield from ((one, one.test) for one in reversed(run.rounds) if one.test and one.decision)


def last_test(run: RunRecord) -> tuple[ABTest, bool] | None:
    """The last decided A/B test, and whether its challenger won."""
    return next(((test, one.promoted) for one, test in decided_tests(run)), None)


def current(run: RunRecord) -> Arm | None:
    """How the present champion did in its last decided A/B test, or in the first data where it is the first policy."""
    for one, test in decided_tests(run):
        serves = run.serves or (one.challenger if one.promoted else one.champion)
        arms = {one.champion: test.champion, one.challenger: test.challenger}
        if serves in arms:
            return arms[serves]
    began = run.rounds[0].champion if run.rounds else None
    return first(run) if run.serves in (None, began) or began is None else None
