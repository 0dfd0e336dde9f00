"""The gate: pure functions from evidence to a decision with reasons in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from iterative_ppo.evaluation.certificate import Certificate
from iterative_ppo.evaluation.evidence import OfflineEvidence
from iterative_ppo.evaluation.experiment import Look
from iterative_ppo.evaluation.guardrails import LIMIT
from iterative_ppo.evaluation.non_inferiority import NonInferiority
from iterative_ppo.evaluation.ope import Estimate

Verdict = Literal["test", "promote", "reject", "continue", "halt"]
Finding = Literal["failed", "not told", "cannot tell from these logs", "passed"]
Check = tuple[Finding, str]
UNSHOWN: Finding = "not told"
UNTOLD: Finding = "cannot tell from these logs"


@dataclass(frozen=True)
class Decision:
    """A verdict and why; `reasons` speak of every check: failed ones first, then what is not told.

    test: an A/B test with customers may begin. promote, reject: what becomes of the challenger. continue: the A/B test
    goes on. halt: it is at fault itself, or the challenger does harm, and a person must look.
    """

    verdict: Verdict
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {"verdict": self.verdict, "reasons": list(self.reasons)}


def offline_gate(evidence: OfflineEvidence) -> Decision:
    """Whether a challenger may meet customers: better in Q's eyes, not worse by the logs, and within its guardrails.

    Logs that cannot tell stand in nobody's way: the A/B test can. A guardrail does, where it is not shown to hold; not
    so where only events too rare for these conversations may be missed: those that turns tell the A/B test must show.
    """
    e = evidence
    gain = e.q_challenger - e.q_champion
    seen = f"E[Q] on held-out states moved by {gain:+.4f} ({e.q_gain_low:+.4f} to {e.q_gain_high:+.4f})"
    seen_in = f"{e.states:,} held-out states"
    guardrails = [_guardrail(one, seen_in, UNTOLD if one.missed else UNSHOWN) for one in e.guardrails]
    return _decide([(_held(e.q_gain_low > 0), seen), *_by_the_logs(e), *guardrails], "test")


def outcome_gate(look: Look, guardrails: Sequence[NonInferiority] = ()) -> Decision:
    """What becomes of a challenger by a look at its A/B test; it is promoted only with every guardrail held.

    Args:
        guardrails: of the two arms' conversations, however good the outcome.
    """
    if look.verdict in ("continue", "halt"):
        return Decision(look.verdict, look.reasons)
    seen = "; ".join(reversed(look.reasons))
    champion, challenger = look.conversations
    arms = f"{challenger:,} conversations of the challenger and {champion:,} of the champion"
    held = [_guardrail(one, arms) for one in guardrails]
    return _decide([(_held(look.verdict == "promote"), seen), *held], "promote")


def waiting(look: Look, earlier: Sequence[Look], guardrails: Sequence[NonInferiority]) -> Look:
    """The look; where it wins before the plan's end but a guardrail cannot be told yet, the test goes on to that end.

    The better a challenger is the sooner it wins, and the less is known then of all else. The guardrails are asked once
    more at the end, and not before. One that is shown to be broken waits for nothing.
    """
    if look.verdict != "promote" or look.fraction >= 1:
        return look
    untold = [one.measure for one in guardrails if one.found == "not told"]
    if any(one.broken for one in guardrails) or not (untold or _won(earlier)):
        return look
    why = f"better, and the test goes on to its end, for guardrails are not told yet: {', '.join(untold) or 'some'}"
    return replace(look, verdict="continue", reasons=(why, *look.reasons))


def chances(look: Look, earlier: Sequence[Look]) -> int:
    """How often the guardrails of a test may be asked that is as far as this look, which share their level."""
    return 1 if look.fraction >= 1 and not _won(earlier) else 2


def _won(looks: Sequence[Look]) -> bool:
    return any(one.statistic is not None and one.bound is not None and one.statistic >= one.bound for one in looks)


def _by_the_logs(evidence: OfflineEvidence) -> list[Check]:
    certificate, estimate = evidence.certificate, evidence.estimates["doubly_robust_gain"]
    return [
        (_told(certificate), f"certificate: {certificate.reason}"),
        (_told(estimate), f"off-policy gain of whole conversations: {estimate.reason}"),
    ]


def _told(found: Certificate | Estimate) -> Finding:
    if found.refusal:
        return UNTOLD
    return "failed" if found.high < 0 else "passed" if found.low > 0 else UNTOLD


def _guardrail(one: NonInferiority, seen: str, unshown: Finding = UNSHOWN) -> Check:
    name, limit, _ = one.measure.partition(LIMIT)
    said = f"{name} {one.challenger:.4g} (limit {one.champion:.4g})" if limit else one.reason
    if one.found == "not told":
        return unshown, f"guardrail {said}; {seen} do not tell"
    return _held(one.holds), f"guardrail {said}"


def _held(good: bool) -> Finding:
    return "passed" if good else "failed"


def _decide(checks: Sequence[Check], good: Verdict) -> Decision:
    reasons = tuple(f"{kind}: {text}" for kind in get_args(Finding) for found, text in checks if found == kind)
    return Decision("reject" if any(found in ("failed", UNSHOWN) for found, _ in checks) else good, reasons)
