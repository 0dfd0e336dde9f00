"""Line 9 of Algorithm 1, "until Q_i has converged", as a rule over what the rounds measured.

Q_i - Q_{i-1} measures the noise of two fits. What can be known is whether another round could gain anything worth
having: by the certificate's upper bound, or by the A/B test's. A round that hardly moved shows neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iterative_ppo.config import Config

ROUNDS_RUNNING = 2
NOT_HELD = {
    True: "its challenger broke a guardrail",
    False: "a guardrail of its challenger is not told",
    None: "no challenger is known to hold its guardrails",
}


@dataclass(frozen=True)
class RoundFigures:
    """What a round measured; None where it did not, or could not tell.

    Attributes:
        kl: nats a response that the challenger moved. guardrails_held: in the offline gate. guardrails_broken: there;
            what does not hold may just not be told.
        certificate_high: upper bound of the single-turn gain, where the logs could tell.
        ab_high: upper bound of the gain with customers, where any outcome differed from another.
        promoted: whether its challenger won: what one round gained another may.
    """

    kl: float | None
    guardrails_held: bool
    certificate_high: float | None = None
    ab_high: float | None = None
    promoted: bool = False
    guardrails_broken: bool | None = None

    @classmethod
    def of(cls, record: dict[str, Any]) -> RoundFigures:
        """From a round's record in the state of the nights."""
        test = record.get("ab_test") or {}
        arms = [test[arm] for arm in ("champion", "challenger") if arm in test]
        won, all_of_them = (sum(arm[key] for arm in arms) for key in ("successes", "conversations"))
        return cls(
            record.get("kl"),
            bool(record.get("guardrails_held")),
            record.get("certificate_high"),
            test.get("gain_high") if not arms or 0 < won < all_of_them else None,
            (record.get("decision") or {}).get("verdict") == "promote",
            record.get("guardrails_broken"),
        )

    def counts(self, kl_budget: float) -> bool:
        """Whether it went far enough to show that nothing is to be gained: half its budget, within its guardrails."""
        return self.guardrails_held and self.kl is not None and self.kl >= kl_budget / 2


@dataclass(frozen=True)
class Convergence:
    """Whether rounds end, whether that is because they have converged, and why, with the figure."""

    over: bool
    converged: bool
    reason: str

    @property
    def words(self) -> str:
        """In plain words."""
        return f"{'yes' if self.converged else 'no'}, {self.reason}"


def convergence(rounds: Sequence[RoundFigures], config: Config) -> Convergence:
    """Converged: the certificate's upper bound below `rounds.converged_below` in two rounds running, or the last A/B
    test's below `abtest.mde`, in rounds that count, the last of which promoted nobody. Over as well where the budget of
    rounds is spent.
    """
    budget, least = config.rounds.kl_budget, config.rounds.converged_below
    last = rounds[-1] if rounds else None
    stood = last is not None and not last.promoted
    if last and stood and last.counts(budget) and last.ab_high is not None and last.ab_high < config.abtest.mde:
        gain = f"customers gain at most {last.ab_high:+.1%} from the last challenger"
        return Convergence(True, True, f"{gain}, less than the least worth finding ({config.abtest.mde:.1%})")
    counted = [one for one in rounds[-ROUNDS_RUNNING:] if one.counts(budget)]
    running = [one.certificate_high for one in counted if one.certificate_high is not None]
    if stood and len(running) == ROUNDS_RUNNING and all(bound < least for bound in running):
        shown = " and ".join(f"{bound:+.4f}" for bound in running)
        return Convergence(True, True, f"single turns gain at most {shown} in two rounds running (below {least:g})")
    if len(rounds) >= config.rounds.max_rounds:
        return Convergence(True, False, f"the budget of {config.rounds.max_rounds} rounds is spent")
    return Convergence(False, False, _open(last, config))


def _open(last: RoundFigures | None, config: Config) -> str:
    if last is None:
        return "no round has ended yet"
    if not last.guardrails_held:
        return f"the last round shows nothing: {NOT_HELD[last.guardrails_broken]}"
    if last.promoted:
        return "the last round's challenger won: another may gain as well"
    if not last.counts(config.rounds.kl_budget):
        moved = "an unknown distance" if last.kl is None else f"{last.kl:.2f} nats a response"
        budget = f"{config.rounds.kl_budget:g}"
        if last.ab_high is None:
            return f"the last round shows nothing: its challenger moved {moved}, less than half of {budget}"
        found = f"customers gain at most {last.ab_high:+.1%} from the last challenger, but it moved {moved}"
        return f"{found}, too little to show what another could gain (half of {budget} and more does)"
    if last.ab_high is not None:
        return f"customers may gain up to {last.ab_high:+.1%} (converged below {config.abtest.mde:.1%})"
    if last.certificate_high is not None:
        bound = config.rounds.converged_below
        return f"single turns may gain up to {last.certificate_high:+.4f} (converged below {bound:g}, twice)"
    return "the logs cannot tell what a single turn may gain"
