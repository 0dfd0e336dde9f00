"""The gate: pure functions from evidence to a decision with reasons in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from iterative_ppo.evaluation.certificate import Certificate
from iterative_ppo.evaluation.evidence import OfflineEvidence
from iterative_ppo.evaluation.experiment import Look
from iterative_ppo.evaluation.guardrails import LIMIT
from iterative_ppo.evaluation.non_inferiority import NonInferiority
from iterative_ppo.evaluation.ope import Estimate

Verdict = Literal["test", "promote", "reject", "continue", "halt"]
Finding = Literal["failed", "cannot tell from these logs", "passed"]
Check = tuple[Finding, str]
UNTOLD: Finding = "cannot tell from these logs"


@dataclass(frozen=True)
class Decision:
    """A verdict and why; `reasons` speak of every check: failed ones first, then what cannot be told.

    test: an A/B test with customers may begin. promote, reject: what becomes of the challenger. continue: the A/B test
    goes on. halt: it is at fault itself, and a person must look.
    """

    verdict: Verdict
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {"verdict": self.verdict, "reasons": list(self.reasons)}


def offline_gate(evidence: OfflineEvidence) -> Decision:
    """Whether a challenger may meet customers: better in Q's eyes, not worse by the logs, and within its guardrails.

    Logs that cannot tell stand in nobody's way: the A/B test can. A measure that is not a number fails its check.
    """
    e = evidence
    gain = e.q_challenger - e.q_champion
    seen = f"E[Q] on held-out states moved by {gain:+.4f} ({e.q_gain_low:+.4f} to {e.q_gain_high:+.4f})"
    return _decide([(_held(e.q_gain_low > 0), seen), *_by_the_logs(e), *map(_guardrail, e.guardrails)], "test")


def outcome_gate(look: Look, guardrails: Sequence[NonInferiority] = ()) -> Decision:
    """What becomes of a challenger by a look at its A/B test; it is promoted only with every guardrail held.

    Args:
        guardrails: of the two arms' conversations, however good the outcome.
    """
    if look.verdict in ("continue", "halt"):
        return Decision(look.verdict, look.reasons)
    seen = "; ".join(reversed(look.reasons))
    return _decide([(_held(look.verdict == "promote"), seen), *map(_guardrail, guardrails)], "promote")


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


def _guardrail(found: NonInferiority) -> Check:
    name, limit, _ = found.measure.partition(LIMIT)
    if limit:
        return _held(found.holds), f"guardrail {name} {found.challenger:.4g} (limit {found.champion:.4g})"
    return _held(found.holds), f"guardrail {found.reason}"


def _held(good: bool) -> Finding:
    return "passed" if good else "failed"


def _decide(checks: Sequence[Check], good: Verdict) -> Decision:
    reasons = tuple(f"{kind}: {text}" for kind in get_args(Finding) for found, text in checks if found == kind)
    return Decision("reject" if any(found == "failed" for found, _ in checks) else good, reasons)
