"""The gate: pure functions from evidence to a decision with reasons in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iterative_ppo.config import GateConfig
from iterative_ppo.evaluation.ab_test import ABTest
from iterative_ppo.evaluation.evidence import OfflineEvidence

Verdict = Literal["test", "promote", "reject", "continue"]


@dataclass(frozen=True)
class Decision:
    """A verdict and why; `reasons` speak of every check, failed ones first."""

    verdict: Verdict
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {"verdict": self.verdict, "reasons": list(self.reasons)}


def offline_gate(evidence: OfflineEvidence, config: GateConfig) -> Decision:
    """Whether a challenger may meet customers: near the champion, well-formed, and better in Q's eyes.

    A measure that is not a number fails its check: no evidence is not good evidence.
    """
    e = evidence
    gain = e.q_challenger - e.q_champion
    checks = [
        (
            e.q_gain_low > 0,
            f"E[Q] on held-out states moved by {gain:+.4f} ({e.q_gain_low:+.4f} to {e.q_gain_high:+.4f})",
        ),
        (
            e.kl_challenger_champion <= config.max_kl,
            f"KL to the champion is {e.kl_challenger_champion:.2f} nats a response (bound {config.max_kl:g})",
        ),
        (
            e.missing_eos <= config.max_missing_eos,
            f"{e.missing_eos:.1%} of responses have no end (bound {config.max_missing_eos:.1%})",
        ),
        (
            e.repetition <= config.max_repetition,
            f"{e.repetition:.1%} of bigrams repeat (bound {config.max_repetition:.1%})",
        ),
        (
            1 / config.max_length_ratio <= e.length_ratio <= config.max_length_ratio,
            f"responses are {e.length_ratio:.2f} times as long as the champion's (bound {config.max_length_ratio:g})",
        ),
    ]
    return _decide(checks, "test")


def outcome_gate(test: ABTest, planned: int) -> Decision:
    """Whether a challenger becomes champion, from an A/B test at its planned size; before that, continue."""
    seen = test.champion.conversations + test.challenger.conversations
    if seen < planned:
        return Decision("continue", (f"{seen} of {planned} planned conversations have matured",))
    measured = (
        f"challenger {test.challenger.rate:.1%} of {test.challenger.conversations}, champion {test.champion.rate:.1%} "
        f"of {test.champion.conversations}: {test.gain:+.1%} ({test.gain_low:+.1%} to {test.gain_high:+.1%}), "
        f"p = {test.p_value:.2g} at alpha {test.alpha:g}"
    )
    return _decide([(test.p_value < test.alpha, measured)], "promote")


def _decide(checks: list[tuple[bool, str]], good: Verdict) -> Decision:
    failed = [f"failed: {text}" for passed, text in checks if not passed]
    passed = [f"passed: {text}" for ok, text in checks if ok]
    return Decision("reject" if failed else good, (*failed, *passed))
