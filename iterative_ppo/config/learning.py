"""The policy, Q and the improvement: how they are made and fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from iterative_ppo.config.section import Count, Frozen, Positive, Rate, Share, regular_expression


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
        return regular_expression(targets) if isinstance(targets, str) else targets


class PolicyConfig(Frozen):
    base_model: str | None
    """Path or name of a Hugging Face causal LM; null builds a tiny one."""
    init: Literal["prompt", "sft"]
    """pi_0: the base model as it is, steered by its prompt (the paper's line 1), or fine-tuned on a corpus first."""
    lora: LoRAConfig
    save: Literal["auto", "merged", "adapters"]
    """What a version holds of a LoRA policy: full weights, or the adapters alone, which then need the base in place.

    auto: adapters under bfloat16, which rounds most of a small step away once it is part of a weight; else merged.
    """
    architecture: Literal["gpt2", "llama"]
    hidden_size: int = Count
    layers: int = Count
    heads: int = Count
    tokenizer: Literal["word", "bpe"]
    """Tokenizer that is trained for the tiny model."""
    vocabulary: int = Count
    """Largest vocabulary of that tokenizer."""
    copying_start: bool
    """Whether a tiny model's last attention begins by saying again what it looks at: it learns to copy sooner."""
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
    prompts: int | None = Field(ge=1)
    """At most so many of a round's, drawn at random, so that a night's work does not grow with its log; null: all."""
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
    rollout: int = Field(ge=2)
    """Responses between two looks at the policy: sampled together, then learnt from for `epochs`. Where it does not
    divide `episodes`, as many as make rollouts of like size."""
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
        if self.episodes == 1:
            raise ValueError("episodes 1 is one response, which is no better than itself; 0 leaves PPO out")
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
