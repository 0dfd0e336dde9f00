"""What a challenger has to show, and who is told."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, SecretStr, model_validator

from iterative_ppo.config.section import Count, Frozen, Positive, Rate, Share


class GuardrailConfig(Frozen):
    function: str
    """A measure of `iterative_ppo/evaluation/guardrails.py` by name, or one of your own as `module:function`."""
    direction: Literal["higher", "lower"]
    """Which way is good."""
    margin: float = Field(ge=0.0)
    """The loss against the champion that would be too much, in the measure's own units."""
    limit: float | None
    """A value that a challenger may not be worse than, whatever the champion does; null: none."""


class GateConfig(Frozen):
    promotion: Literal["automatic", "approve"]
    """Who carries out a promotion, or a rollback that an alarm calls for: the flow, or it waits for `ippo approve`."""
    alpha: float = Rate
    """Level of the A/B test, of guardrails, and of each bound of an offline estimate."""
    samples: int = Count
    """Responses of each policy in a held-out state."""
    states: int = Count
    """Held-out states, whole conversations of them, that both policies answer."""
    draws: int = Field(ge=100)
    """Resamples of the bootstrap."""
    min_effective: float = Positive
    """Effective sample size of importance weights below which the logs cannot tell."""
    max_weight: float = Rate
    """Share of one weight above which the logs cannot tell."""
    min_support: float = Share
    """Mean importance weight, 1 where the logs hold all that the challenger does, below which they cannot tell."""
    fqe: bool
    """Whether off-policy estimates rest on the challenger's own Q by fitted Q evaluation, which costs a second fit, and
    not on the champion's."""
    guardrails: dict[str, GuardrailConfig]
    """By name; what is named here is laid over the defaults of that name, a new name is a guardrail more."""


class ABTestConfig(Frozen):
    design: Literal["fixed", "group_sequential", "anytime"]
    """One look at the planned size; a few scheduled looks; looks at any time (e-process)."""
    conversations: int = Field(ge=2)
    """Matured conversations, both arms together, at which the test is decided; no design goes on beyond, but to wait
    for businesses where either arm has fewer than 10."""
    challenger_share: float = Rate
    """Share of units that meet the challenger in the last stage of the ramp."""
    looks: int = Count
    """Planned looks of the group sequential design, equally far apart in matured conversations."""
    mde: float = Rate
    """The least gain worth finding, in outcome; a test ends early where it is ruled out."""
    success_above: float | None
    """R above which a conversation is a success; null: 0, and where outcomes are costs alone, no cost."""
    power: float = Rate
    """Probability of finding it, for the planner."""
    ramp: tuple[float, ...]
    """Rising challenger shares of the safety stages, whose conversations are no evidence. Simulated customers come
    without a clock and meet the last share at once."""
    ramp_hours: float = Positive
    """Length of each safety stage."""
    unit: Literal["conversation", "business"]
    """What is assigned to an arm, by hash: each conversation, or a business with all of its conversations."""
    business_conversations: int = Count
    """Conversations of a business that make its one observation in the anytime design; also for the planner."""
    business_icc: float = Field(ge=0.0, lt=1.0)
    """Likeness (intraclass correlation) of one business's outcomes, for the planner; tests measure it."""

    @property
    def smaller_share(self) -> float:
        """Share of units in the smaller arm, in the last stage of the ramp."""
        return min(self.challenger_share, 1 - self.challenger_share)

    @model_validator(mode="after")
    def _rising(self) -> ABTestConfig:
        shares = (0.0, *self.ramp, self.challenger_share)
        if any(later <= earlier for earlier, later in pairwise(shares)):
            raise ValueError(f"ramp must rise from above 0 to below challenger_share ({self.challenger_share:g})")
        return self


class AlarmsConfig(Frozen):
    """While a promoted champion serves: is it worse than in the A/B test that promoted it?"""

    enabled: bool
    alpha: float = Rate
    """Probability of a false alarm over all measures and looks, where nothing is worse by more than its margin."""
    margin: float = Share
    """How much lower the outcome rate and the acceptance, and how much higher the abstention may be; a share. Of what
    is lower than twice as much, half of it: a rate of 4 % may fall to 2 %."""
    length_margin: float = Positive
    """How much longer or shorter suggestions may be, as a share of their mean length when it was promoted."""
    conversations: int = Field(ge=2)
    """Conversations at which it is looked at first; then at twice as many, and so on."""


class NotifyConfig(Frozen):
    """Whom a round's verdict and every alarm are told."""

    kind: Literal["webhook", "slack"]
    """webhook: JSON with event, subject and body is posted; slack: a message to a channel's incoming webhook."""
    url: SecretStr | None
    """Where to; null: nobody. The environment's IPPO_NOTIFY_URL wins over it and keeps a secret out of files."""


class RoundsConfig(Frozen):
    max_rounds: int = Count
    last_policy_iterations: int = Count
    """Policy iterations of the last of them, where more than improve's: no later round needs the variety they cost."""
    final_conversations: int = Count
    """Fresh conversations an arm in the closing comparison of the last champion with pi_0."""
    converged_below: float
    """Rounds end when the certificate's upper bound on the single-turn gain is below this in two rounds running."""
    kl_budget: float = Positive
    """Nats a response that a round may well spend; one that moved less than half as far cannot show convergence."""
