"""All of params.yaml, and what its sections mean for each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from iterative_ppo.config.evidence import ABTestConfig, AlarmsConfig, GateConfig, NotifyConfig, RoundsConfig
from iterative_ppo.config.learning import (
    CreditConfig,
    ImproveConfig,
    PolicyConfig,
    QConfig,
    RuntimeConfig,
    SupervisedConfig,
)
from iterative_ppo.config.section import Frozen, Rate
from iterative_ppo.config.traffic import (
    DataConfig,
    ExplorationConfig,
    LabelsConfig,
    SimulatorConfig,
    SourceConfig,
    TrackingConfig,
)
from iterative_ppo.errors import did_you_mean

ON_POLICY = ("monte_carlo", "td_lambda", "sarsa")


class Config(Frozen):
    """All of params.yaml."""

    seed: int = Field(ge=0, lt=2**31)
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
        for name in self.data.outcome_ranges:
            if name not in self.outcomes:
                hint = did_you_mean(name, self.outcomes)
                raise ValueError(f"data.outcome_ranges: no outcome is named {name!r}{hint}")
        if "origin" in self.outcomes:
            raise ValueError("outcomes: no outcome can be named 'origin'; that column says where labels come from")
        return self

    @model_validator(mode="after")
    def _rules(self) -> Config:
        if self.labels.kind == "rule" and not self.labels.rules:
            raise ValueError("labels.kind rule: labels.rules names no rule; give one for an outcome")
        for name, rule in self.labels.rules.items():
            if name not in self.outcomes:
                raise ValueError(f"labels.rules: no outcome is named {name!r}{did_you_mean(name, self.outcomes)}")
            low, high = self.data.range_of(name)
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
