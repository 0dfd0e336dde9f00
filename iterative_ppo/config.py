"""Frozen configuration: types, bounds and meaning here, defaults only in params.yaml, one loader for every way in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from iterative_ppo.errors import ConfigError, did_you_mean

NAMED = (("gate", "guardrails"), ("labels", "rules"))
"""Sections in which users name entries of their own."""
WHOLE = (("outcomes",), ("exploration", "personas"))
"""Tables of users' own that are replaced whole."""
ON_POLICY = ("monte_carlo", "td_lambda", "sarsa")
MERGE = "tag:yaml.org,2002:merge"
DEFAULTS = Path(__file__).resolve().parents[1] / "params.yaml"

Share = Field(ge=0.0, le=1.0)
Rate = Field(gt=0.0, lt=1.0)
Positive = Field(gt=0.0)
Count = Field(ge=1)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Frozen):
    root: Path
    """Folder of the turn table, quarantine, rounds and state."""
    remote: str | None
    """DVC remote; null means `<root>/remote`."""
    split_by: Literal["customer", "business"]
    """The id whose hash puts a conversation in the fit or the evidence part."""
    evidence_share: float = Rate
    """Share of conversations held out from Q and from improvement."""
    outcome_window_hours: float = Positive
    """A conversation without an outcome is closed after this silence."""
    edited_at_least: float = Share
    """Similarity from which a sent message counts as an edit of the suggestion."""
    outcome_low: float
    """Least possible outcome."""
    outcome_high: float
    """Greatest possible outcome."""
    quarantine_share: float = Share
    """A round stops when more than this share of conversations fails validation."""
    outcome_rate_bound: float = Share
    """A change of one policy version's outcome rate beyond this is warned of."""

    @model_validator(mode="after")
    def _range(self) -> DataConfig:
        if self.outcome_low >= self.outcome_high:
            raise ValueError("outcome_low must be below outcome_high")
        if not self.outcome_low <= 0 <= self.outcome_high:
            raise ValueError(
                f"outcome_low {self.outcome_low:g} to outcome_high {self.outcome_high:g} leaves out 0, which is what a "
                "conversation without an outcome has; count ratings from 0, or costs as negative numbers up to it"
            )
        return self


class TrackingConfig(Frozen):
    uri: str
    """MLflow store; the environment variable MLFLOW_TRACKING_URI wins over it."""
    artifacts: Path
    """Folder of artifacts, where the store is the local SQLite file."""
    experiment: str


class SourceConfig(Frozen):
    kind: Literal["renovation", "environment", "star", "craigslist", "table"]
    """Where conversations come from."""
    path: Path | None
    """File or folder of logs; `module:name` of a simulator of one's own; the renovation business needs none."""

    @property
    def simulated(self) -> bool:
        """Whether the customers are a simulator's; else they are a team's own."""
        return self.kind in ("renovation", "environment")


class SimulatorConfig(Frozen):
    corpus_conversations: int = Count
    """Conversations of the scripted agent that pi_0 is fine-tuned on."""
    corpus_skill: float = Share
    """How often that agent does the right thing."""
    copying_share: float = Share
    """Share of the corpus that is a short curriculum in copying slot values."""
    conversations: int = Count
    """Conversations collected in round 0."""
    max_business_turns: int = Count


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}; mend or quote it") from None
    return pattern


class LoRAConfig(Frozen):
    rank: int = Field(ge=0)
    """0 trains all weights; otherwise low-rank adapters of this rank are trained (Hu et al. 2021, arXiv 2106.09685)."""
    alpha: int = Count
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = Field(ge=0.0, le=0.0)
    """None yet: dropout would make log-probs and their ratios noise."""
    target_modules: list[str] | str | None
    """Layers that carry adapters, as peft reads them: a list of names, a regular expression of whole names, or
    `all-linear`, which null says too: all linear layers but the vocabulary's."""

    @field_validator("target_modules")
    @classmethod
    def _compiles(cls, targets: list[str] | str | None) -> list[str] | str | None:
        return _regular_expression(targets) if isinstance(targets, str) else targets


class RuleConfig(Frozen):
    """An outcome by rule: did one side say something that the pattern finds?"""

    side: Literal["customer", "business"]
    """Whose messages. What the business sends may be the policy's own words, which then learns to say them."""
    pattern: str
    """A regular expression, found anywhere in a message; `(?i)` at its start ignores case."""
    first_turn: int = Count
    last_turn: int | None = Field(ge=1)
    """Turns whose messages count, both ends included; null: to the conversation's end."""
    value: float
    """The outcome where it is found; 0 elsewhere."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        _regular_expression(pattern)
        if not pattern:
            raise ValueError("'' is found in every message; name what has to be said")
        return pattern

    @model_validator(mode="after")
    def _turns(self) -> RuleConfig:
        if self.last_turn is not None and self.last_turn < self.first_turn:
            raise ValueError(f"last_turn {self.last_turn} is before first_turn {self.first_turn}")
        if not self.value:
            raise ValueError("value is 0, which is what the outcome is without the rule; give what it is worth")
        return self


class ClassifierConfig(Frozen):
    """Logistic regression of the outcome on the words of a conversation, fitted on those with a reported outcome."""

    reported_at_least: int = Field(ge=20)
    """Fewer conversations with a reported outcome are too few to fit it on."""
    vocabulary: int = Count
    """Most words and pairs of words that it looks at."""
    inverse_regularization: float = Positive
    """C of scikit-learn's LogisticRegression."""
    false_positive_cost: float = Positive
    false_negative_cost: float = Positive
    """What a wrong label costs. The threshold is where their sum is least, by cross-validation."""


class LabelsConfig(Frozen):
    kind: Literal["reported", "rule", "classifier"]
    """Where the outcome of a conversation comes from that nobody reported one of: nowhere, which is 0; a rule; or a
    classifier trained on the reported ones. A reported outcome always stands."""
    rules: dict[str, RuleConfig]
    """By the name of the outcome; one without a rule stays 0."""
    classifier: ClassifierConfig


class PersonaConfig(Frozen):
    """How the policy speaks in a conversation that explores."""

    instruction: str
    """What it is told before the conversation; a tiny model, which knows no instructions, is led by temperature."""
    temperature: float = Positive
    """Of its sampling, times the policy's own."""


class ExplorationConfig(Frozen):
    """Persona exploration (section 3.2 of the paper): more kinds of actions for Q to learn from, off-policy."""

    share: float = Field(ge=0.0, lt=1.0)
    """Share of conversations outside A/B tests that a persona leads; the others are the policy's own. 0 is off."""
    personas: dict[str, PersonaConfig]
    """By name; each leads as many conversations. Given anew, the table replaces this one whole."""

    @model_validator(mode="after")
    def _somebody(self) -> ExplorationConfig:
        if self.share and not self.personas:
            raise ValueError("share is above 0 but personas names nobody; name a persona, or set share to 0")
        return self


class PolicyConfig(Frozen):
    base_model: str | None
    """Path or name of a Hugging Face causal LM; null builds a tiny one."""
    init: Literal["prompt", "sft"]
    """pi_0: the base model as it is, steered by its prompt (the paper's line 1), or fine-tuned on a corpus first."""
    lora: LoRAConfig
    save: Literal["merged", "adapters"]
    """What a version holds of a LoRA policy: full weights, or the adapters alone, which then need the base in place."""
    architecture: Literal["gpt2", "llama"]
    hidden_size: int = Count
    layers: int = Count
    heads: int = Count
    tokenizer: Literal["word", "bpe"]
    """Tokenizer that is trained for the tiny model."""
    vocabulary: int = Count
    """Largest vocabulary of that tokenizer."""
    temperature: float = Positive
    """Sampling temperature: part of the policy version."""
    max_prompt_tokens: int = Count
    max_response_tokens: int = Count
    abstain: str = Field(min_length=1)
    """The response that means: no suggestion. A tiny model has a token of its own for it; of a base model, one that its
    tokenizer keeps in reserve is such a token, and any other text is spelled in several."""

    @property
    def fine_tuned(self) -> bool:
        """Whether pi_0 is made from a corpus; else it is the base model as it is."""
        return self.init == "sft"

    @model_validator(mode="after")
    def _something_to_prompt(self) -> PolicyConfig:
        if not self.fine_tuned and self.base_model is None:
            raise ValueError(
                "init: prompt needs a base_model; a tiny model with fresh weights must be fine-tuned (sft)"
            )
        return self


class SupervisedConfig(Frozen):
    epochs: float = Positive
    learning_rate: float = Rate
    batch_size: int = Count
    """Conversations an update."""
    micro_batch_size: int | None = Field(ge=1)
    """Conversations at once: a larger batch goes through in pieces, with the same gradient. null: the whole batch."""

    @model_validator(mode="after")
    def _divides(self) -> SupervisedConfig:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} must divide batch_size {self.batch_size}")
        return self


class QConfig(Frozen):
    target: Literal["monte_carlo", "one_step", "td_lambda", "sarsa", "fqe", "retrace", "lstd_q", "archer"]
    """What Q is regressed on. The paper's are Monte Carlo returns; one_step is r + gamma V(s') with a Monte Carlo V;
    td_lambda and sarsa bootstrap from Q of the logged actions, fqe, retrace, lstd_q and archer (without expectile)
    from the policy's."""
    trace_decay: float = Share
    """The lambda of td_lambda and retrace."""
    iterations: int = Count
    """Fits of td_lambda, sarsa, fqe, retrace and archer, each to targets from before it; at least the usual horizon."""
    samples: int = Count
    """Responses of the policy a state, for E_pi Q(s, .)."""
    polyak: float = Field(gt=0.0, le=1.0)
    """Share of the way that archer's target network goes to the fitted one in each step."""
    expectile: float | None = Field(gt=0.0, lt=1.0)
    """Of archer: V is this expectile of its target network's Q over the logged actions, and no response is sampled
    (implicit Q-learning, arXiv 2110.06169; above .5 that is Q of a better policy than wrote the log, .9 in archer's
    paper). null: V is the mean over responses of the policy."""
    ridge: float = Positive
    """Ridge penalty of lstd_q."""
    effective_size_floor: float = Positive
    """Off-policy estimators refuse logged actions whose ratios have a smaller effective sample size."""
    outcome_heads: bool
    """A head for each named outcome, Q their weighted sum; false fits one head to the weighted sum."""
    members: int = Count
    """Heads on the shared trunk, each on its own bootstrap of the conversations (1: no bootstrap)."""
    judges: int = Field(ge=0)
    """Further such heads, which improvement does not see."""
    pessimism: Literal["min"] | Annotated[float, Field(ge=0.0)]
    """Over members, Q is their mean less this many standard deviations, or their minimum."""
    loss: Literal["bce", "mse", "hl_gauss"]
    """bce: cross-entropy of the outcome scaled to [0, 1]; hl_gauss: of a histogram of it (arXiv 2403.03950)."""
    bins: int = Field(ge=8)
    """Bins of hl_gauss."""
    value_epochs: float = Positive
    value_learning_rate: float = Rate
    value_batch_size: int = Count
    epochs: float = Positive
    learning_rate: float = Rate
    batch_size: int = Count
    running_weight: float = Share
    """Weight of the running value at the tokens between prompt and end of response."""
    warm_start: bool
    """Start from the previous round's Q instead of the policy's backbone."""
    corpus_epochs: float = Field(ge=0.0)
    """Passes over the corpus of pi_0 for the Q that round 0 starts from; 0 starts from the policy's backbone."""
    replay_rounds: int = Field(ge=0)
    """Earlier rounds whose turns enter the fit: of monte_carlo, td_lambda and sarsa only the policy's own."""

    @model_validator(mode="after")
    def _together(self) -> QConfig:
        if self.target == "lstd_q" and self.loss != "mse":
            raise ValueError("target lstd_q is linear in its features; set q.loss to mse")
        if self.expectile is not None and (self.target != "archer" or self.loss == "hl_gauss"):
            raise ValueError(
                "expectile is archer's, under loss bce or mse; set q.target to archer, or q.expectile to null"
            )
        if self.pessimism and self.members < 2:
            raise ValueError("pessimism needs the spread of members; set q.members to 2 or more, or q.pessimism to 0")
        return self


class CreditConfig(Frozen):
    assigner: Literal["outcome", "itpo", "norm_itpo"]
    """What pays a turn: the outcome on arrival, or turn rewards of an implicit process reward model (arXiv 2603.23550);
    norm_itpo's sum to the outcome of their conversation."""
    beta: float = Positive
    """The log-ratio of that model to the policy, times beta and summed, is the logit of success."""
    temperature: float = Positive
    """Of norm_itpo's softmax over a conversation's turns."""
    epochs: float = Positive
    learning_rate: float = Rate
    batch_size: int = Count
    """Conversations an update, and whose scores are normalised together."""


class LoggedConfig(Frozen):
    epochs: float = Field(ge=0.0)
    """0 leaves the logged pass out."""
    learning_rate: float = Rate
    batch_size: int = Count
    clip: float = Positive
    gae_lambda: float = Share


class BestOfNConfig(Frozen):
    epochs: float = Field(ge=0.0)
    """Passes over the best responses; 0 leaves the sampled pass out."""
    samples: int = Field(ge=2)
    """Responses a state, of which the best by Q is learnt."""
    temperature: float = Positive
    """Of the candidates, as a share of the policy's own: below 1 they are what it is surer of, so better written."""
    initial_share: float = Share
    """Share of the candidates that pi_0 says: what later policies have unlearnt stays within reach, should Q come to
    like it. Above 0 it is for rounds that are small against what there is to learn."""
    initial_rounds: int | None = Field(ge=1)
    """Rounds, from the first, in which pi_0 says its share: later it holds back more than it keeps. null: in all."""
    learning_rate: float = Rate
    batch_size: int = Count

    @property
    def of_initial(self) -> int:
        """Candidates that pi_0 says."""
        return round(self.initial_share * self.samples)

    @model_validator(mode="after")
    def _some_of_initial(self) -> BestOfNConfig:
        if self.initial_share and not self.of_initial:
            raise ValueError(
                f"initial_share {self.initial_share:g} of {self.samples} samples is none of them; set it to "
                f"{1 / self.samples:.2g} or more, or to 0"
            )
        return self


class PPOConfig(Frozen):
    episodes: int = Field(ge=0)
    """Responses sampled against Q; 0 leaves PPO out."""
    rollout: int = Count
    """Responses between two looks at the policy: sampled together, then learnt from for `epochs`."""
    epochs: int = Count
    minibatch_size: int = Count
    learning_rate: float = Rate
    clip: float = Positive
    kl_coefficient: float = Field(ge=0.0)
    """Of the KL penalty, where it begins; it stays there unless kl_target is set."""
    kl_target: float | None = Field(gt=0.0)
    """Nats a response from the reference that the coefficient adapts to; null keeps it fixed."""
    kl_budget: float | None = Field(gt=0.0)
    """Nats a response from the champion that PPO may go to: it ends at a rollout that shows more, and gives the policy
    of the rollout before. What it begins from may be farther already: then it makes no update. null sets no limit."""
    critic: Literal["q", "learned"]
    """q: the frozen Q's running value; learned: a copy of it that follows the returns."""
    critic_learning_rate: float = Rate
    judge_patience: int | None = Field(ge=1)
    """Rollouts without a rise in the judges' eyes (q.judges) after which PPO ends, and gives the policy that they liked
    best; null never asks them."""
    gae_lambda: float = Share
    missing_eos_penalty: float = Field(ge=0.0)
    """Taken from the reward of a response that reached the length limit."""
    reference: Literal["start", "champion"]
    """Whom the KL penalty keeps PPO near: the policy that it starts from, or the paper's pi_i."""

    @model_validator(mode="after")
    def _adaptable(self) -> PPOConfig:
        if self.kl_target is not None and not self.kl_coefficient:
            raise ValueError("kl_target adapts kl_coefficient by factors, and it is 0; set it above 0, such as 0.1")
        return self


class GroupConfig(Frozen):
    size: int = Field(ge=2)
    """Responses a prompt, whose rewards are each other's baseline; grpo and rloo take the rest from `ppo`."""


class ImproveConfig(Frozen):
    reward: Literal["outcome", "acceptance"]
    """What returns are made of; acceptance is the myopic baseline."""
    algorithm: Literal["ppo", "grpo", "rloo"]
    """What improves the policy on sampled responses: our PPO, or TRL's GRPO or RLOO."""
    policy_iterations: int = Count
    """Policy iterations on one round's conversations. After the first, Q of the policy so far is fitted to the same
    conversations by fitted Q evaluation, and the passes run again: more from few conversations, at the price of variety
    in the next round's. Acceptance, whose Q is every policy's, takes one."""
    q_iterations: int = Count
    """Fits of each such Q, in place of q.iterations: its network starts from the Q before it."""
    logged: LoggedConfig
    best_of_n: BestOfNConfig
    ppo: PPOConfig
    group: GroupConfig

    @model_validator(mode="after")
    def _learns(self) -> ImproveConfig:
        if not (self.logged.epochs or self.best_of_n.epochs or self.ppo.episodes):
            raise ValueError(
                "logged.epochs, best_of_n.epochs and ppo.episodes are all 0, so the challenger would be the champion "
                "once more; set one of them above 0"
            )
        return self

    @property
    def group_rollout(self) -> int:
        """Responses a rollout of grpo and rloo."""
        return min(self.ppo.rollout, self.ppo.episodes)

    @model_validator(mode="after")
    def _whole_groups(self) -> ImproveConfig:
        """TRL knows no smaller last rollout, minibatch or group, and no critic."""
        if self.algorithm == "ppo" or not self.ppo.episodes:
            return self
        rollout = self.group_rollout
        parts = {"ppo.minibatch_size": self.ppo.minibatch_size, "group.size": self.group.size}
        for name, part in parts.items():
            if rollout % part:
                raise ValueError(f"algorithm {self.algorithm}: {name} {part} must divide the rollout of {rollout}")
        if self.ppo.episodes % rollout:
            raise ValueError(
                f"algorithm {self.algorithm}: ppo.rollout {rollout} must divide ppo.episodes {self.ppo.episodes}"
            )
        if self.ppo.critic == "learned":
            raise ValueError(f"algorithm {self.algorithm} has no critic; set ppo.critic to q")
        return self


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
    """Matured conversations, both arms together, at which the test is decided; no design goes on beyond."""
    challenger_share: float = Rate
    """Share of units that meet the challenger in the last stage of the ramp."""
    looks: int = Count
    """Planned looks of the group sequential design, equally far apart in matured conversations."""
    mde: float = Rate
    """The least gain worth finding, in outcome; a test ends early where it is ruled out."""
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
    """How much lower the outcome rate and the acceptance, and how much higher the abstention may be; a share."""
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


class RuntimeConfig(Frozen):
    threads: int = Count
    """Torch threads; more than the free cores is slower than one."""
    device: str
    precision: Literal["auto", "float32", "bfloat16"]
    """auto: bfloat16 on a CUDA device that has it, float32 elsewhere. Log-probs are float32 in any case."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third more time."""
    micro_batch_tokens: int | None = Field(ge=1)
    """Padded tokens at once in training: a larger batch goes through in pieces, with the same gradient. null: whole."""
    processes: int = Count
    """Processes that fit Q and improve the policy together, started by `accelerate launch`."""
    accelerate: Path | None
    """Accelerate's own configuration for them, for several machines or to shard the model; null: one machine, DDP."""


class Config(Frozen):
    """All of params.yaml."""

    seed: int
    outcomes: dict[str, float]
    gamma: float = Rate
    data: DataConfig
    tracking: TrackingConfig
    source: SourceConfig
    simulator: SimulatorConfig
    labels: LabelsConfig
    exploration: ExplorationConfig
    policy: PolicyConfig
    supervised: SupervisedConfig
    credit: CreditConfig
    q: QConfig
    improve: ImproveConfig
    gate: GateConfig
    abtest: ABTestConfig
    alarms: AlarmsConfig
    notify: NotifyConfig
    rounds: RoundsConfig
    runtime: RuntimeConfig

    @model_validator(mode="after")
    def _outcomes(self) -> Config:
        if not self.outcomes:
            raise ValueError("outcomes: name at least one outcome and its weight")
        if not any(self.outcomes.values()):
            raise ValueError(
                f"outcomes: {', '.join(self.outcomes)} all weigh 0, so no conversation would be better than another; "
                "give one of them a weight"
            )
        if "origin" in self.outcomes:
            raise ValueError("outcomes: no outcome can be named 'origin'; that column says where labels come from")
        return self

    @model_validator(mode="after")
    def _rules(self) -> Config:
        if self.labels.kind == "rule" and not self.labels.rules:
            raise ValueError("labels.kind rule: labels.rules names no rule; give one for an outcome")
        low, high = self.data.outcome_low, self.data.outcome_high
        for name, rule in self.labels.rules.items():
            if name not in self.outcomes:
                raise ValueError(f"labels.rules: no outcome is named {name!r}{did_you_mean(name, self.outcomes)}")
            if not low <= rule.value <= high:
                raise ValueError(f"labels.rules.{name}.value: {rule.value:g} is not from {low:g} to {high:g}")
        return self

    @model_validator(mode="after")
    def _one_reward(self) -> Config:
        if self.credit.assigner != "outcome" and self.improve.reward == "acceptance":
            raise ValueError(
                f"credit.assigner {self.credit.assigner} makes turn rewards of the outcome, improve.reward acceptance "
                "pays each turn by itself; set credit.assigner to outcome, or improve.reward to outcome"
            )
        further = {
            "improve.policy_iterations": self.improve.policy_iterations,
            "rounds.last_policy_iterations": self.rounds.last_policy_iterations,
        }
        for name, count in further.items():
            if self.credit.assigner == "norm_itpo" and count > 1:
                raise ValueError(
                    f"{name} {count} fits Q of policies that have led no conversation, and credit.assigner norm_itpo "
                    f"pays a turn by how its conversation ended; set {name} to 1, or credit.assigner to itpo"
                )
        return self

    @model_validator(mode="after")
    def _trainable(self) -> Config:
        ppo, algorithm = self.improve.ppo, self.improve.algorithm
        if algorithm != "ppo" and ppo.episodes and self.runtime.processes > ppo.minibatch_size:
            raise ValueError(
                f"runtime.processes {self.runtime.processes} are more than the {ppo.minibatch_size} responses of "
                f"improve.ppo.minibatch_size, which improve.algorithm {algorithm} shares among them; set one of the two"
            )
        if ppo.judge_patience is not None and not self.q.judges:
            raise ValueError(
                f"improve.ppo.judge_patience {ppo.judge_patience} asks judges, but q.judges is 0; set it to 1 or more"
            )
        return self

    @model_validator(mode="after")
    def _launched(self) -> Config:
        runtime, improve = self.runtime, self.improve
        if runtime.processes == 1 or runtime.accelerate is None or not _shards(runtime.accelerate):
            return self
        if improve.algorithm != "ppo" and improve.ppo.episodes and not self.policy.lora.rank:
            raise ValueError(
                f"improve.algorithm {improve.algorithm} trains a whole model in each process, and {runtime.accelerate} "
                "shards it; set runtime.accelerate to null, policy.lora.rank above 0, or improve.algorithm to ppo"
            )
        return self

    @model_validator(mode="after")
    def _explored(self) -> Config:
        target, assigner, reward = self.q.target, self.credit.assigner, self.improve.reward
        for key, value, learns_alone, cure in (
            ("q.target", target, target in ON_POLICY, "one_step, fqe or retrace"),
            ("credit.assigner", assigner, assigner == "norm_itpo", "outcome"),
            ("improve.reward", reward, reward == "acceptance", "outcome"),
        ):
            if self.exploration.share and learns_alone:
                raise ValueError(
                    f"exploration.share {self.exploration.share:g}: {key} {value} learns from the policy's own "
                    f"conversations alone; set {key} to {cure}, or exploration.share to 0"
                )
        return self

    def in_round(self, number: int) -> Config:
        """What holds in a round: how long pi_0 says its share, and the last one's own number of policy iterations."""
        improve, best = self.improve, self.improve.best_of_n
        changes: dict[str, Any] = {}
        if best.initial_share and best.initial_rounds is not None and number >= best.initial_rounds:
            changes["best_of_n"] = best.model_copy(update={"initial_share": 0.0})
        most = max(improve.policy_iterations, self.rounds.last_policy_iterations)
        if number + 1 >= self.rounds.max_rounds and most > improve.policy_iterations:
            changes["policy_iterations"] = most
        return self.model_copy(update={"improve": improve.model_copy(update=changes)}) if changes else self


def _shards(path: Path) -> bool:
    """Whether accelerate's configuration shards the model. Raises ValueError where it is none, or of an older FSDP."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"runtime.accelerate: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"runtime.accelerate: {path} is no configuration of accelerate's; `accelerate config` makes one"
        )
    sharded = values.get("distributed_type") == "FSDP"
    if sharded and (values.get("fsdp_config") or {}).get("fsdp_version") != 2:
        raise ValueError(f"runtime.accelerate: the fsdp_version of {path} is not 2; see configs/accelerate/fsdp.yaml")
    return sharded


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Config:
    """Defaults, then the user's params file, then overrides, each with its own profile of the source laid over it.

    So a copy of the defaults (`ippo init`) means what the defaults mean, and a file without profiles wins over theirs.

    Args:
        path: a params.yaml that may hold any subset of the keys; None means the defaults alone.
        overrides: `{"a.b": value}` or strings `"a.b=value"`, the value read as YAML.

    Raises ConfigError with the file, the key, what was expected and, for an unknown key, the nearest known one.
    """
    defaults = _read_yaml(DEFAULTS)
    users = [] if path is None else [(_read_yaml(path), str(path))]
    users += [(_nested(key, value), f"override {key!r}") for key, value in _pairs(overrides)]
    names = list(defaults["profiles"])
    profiles = [_profiles_of(layer, where, defaults, names) for layer, where in [(defaults, "defaults"), *users]]
    kind = _laid_over(defaults, users)["source"]["kind"]
    layers: list[tuple[dict[str, Any], str]] = []
    for (layer, where), own in zip([({}, "defaults"), *users], profiles, strict=True):
        profile = own.get(kind, {}) if isinstance(kind, str) else {}
        layers += [(layer, where), (profile, f"{where}: profile {kind!r}")]
    try:
        return Config.model_validate(_laid_over(defaults, layers))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        where = _blamed(defaults, layers, _fault(first)) or str(path or DEFAULTS.name)
        given = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(": ".join(filter(None, (where, key, f"{said}{given}")))) from None


def _blamed(defaults: dict[str, Any], layers: Sequence[tuple[dict[str, Any], str]], fault: str) -> str | None:
    """The layer since which a fault has been there; None where the defaults alone have it."""
    for count in range(len(layers), 0, -1):
        if fault not in _faults(_laid_over(defaults, layers[: count - 1])):
            return layers[count - 1][1]
    return None


def _faults(values: dict[str, Any]) -> list[str]:
    try:
        Config.model_validate(values)
    except ValidationError as error:
        return [_fault(one) for one in error.errors()]
    return []


def _fault(error: Mapping[str, Any]) -> str:
    return repr((error["loc"], error["msg"], error["input"] if error["type"] != "value_error" else None))


def _profiles_of(
    layer: dict[str, Any], where: str, defaults: dict[str, Any], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Take a layer's profiles out of it, by source. Raises ConfigError for an unknown source or key."""
    found = layer.pop("profiles", {})
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: profiles is a section, expected keys below it, got {found!r}")
    for name, profile in found.items():
        if not isinstance(profile, dict):
            raise ConfigError(f"{where}: profiles.{name} is a section, expected keys below it, got {profile!r}")
        if name not in names:
            raise ConfigError(f"{where}: unknown key 'profiles.{name}'{did_you_mean(str(name), names)}")
        _merge(defaults, profile, defaults, f"{where}: profile {name!r}", ())
    return found


def _laid_over(defaults: dict[str, Any], layers: Iterable[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    values = defaults
    for layer, where in layers:
        values = _merge(values, layer, defaults, where, ())
    return values


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def _pairs(overrides: Mapping[str, Any] | Iterable[str]) -> Iterable[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {text!r}: expected section.key=value")
        try:
            yield key.strip(), yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"override {text!r}: the value is not YAML ({' '.join(str(error).split())})") from None


class _Once(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML's readers take the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for name, _ in node.value:
            if name.tag == MERGE:
                continue
            key = self.construct_object(name, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} is given twice", problem_mark=name.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such params file; `ippo init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    return values


def _merge(
    base: Mapping[str, Any], new: Mapping[str, Any], known: Any, where: str, at: tuple[str, ...]
) -> dict[str, Any]:
    """`base` with `new` laid over it. The names of outcomes and personas are the user's own: replaced whole.

    Guardrails and rules of the user's own stand beside the known ones.
    """
    merged = dict(base)
    for key, value in new.items():
        path = (*at, str(key))
        if at in NAMED and key not in known and isinstance(value, Mapping):
            merged[key] = {**merged.get(key, {}), **value}
            continue
        if key not in known:
            raise ConfigError(f"{where}: unknown key {'.'.join(path)!r}{did_you_mean(str(key), known)}")
        if path in WHOLE or not isinstance(known[key], dict):
            merged[key] = value
        elif isinstance(value, Mapping):
            merged[key] = _merge(merged[key], value, known[key], where, path)
        else:
            raise ConfigError(f"{where}: {'.'.join(path)} is a section, expected keys below it, got {value!r}")
    return merged
