"""Frozen configuration: types, bounds and meaning here, defaults only in params.yaml, one loader for every way in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from iterative_ppo.errors import ConfigError, did_you_mean

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
        return self


class TrackingConfig(Frozen):
    uri: str
    """MLflow store; the environment variable MLFLOW_TRACKING_URI wins over it."""
    artifacts: Path
    """Folder of artifacts, where the store is the local SQLite file."""
    experiment: str


class SourceConfig(Frozen):
    kind: Literal["renovation", "star", "craigslist", "table"]
    """Where conversations come from."""
    path: Path | None
    """File or folder of logs; the simulator needs none."""


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


class PolicyConfig(Frozen):
    base_model: str | None
    """Path or name of a Hugging Face causal LM; null builds a tiny one."""
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
    abstain: str
    """The response that means: no suggestion."""


class SupervisedConfig(Frozen):
    epochs: float = Positive
    learning_rate: float = Rate
    batch_size: int = Count


class QConfig(Frozen):
    target: Literal["one_step", "monte_carlo"]
    """one_step: r + gamma V(s') with a Monte Carlo V; monte_carlo: the paper's G."""
    loss: Literal["bce", "mse"]
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
    """Earlier rounds whose turns enter the one-step fit."""


class LoggedConfig(Frozen):
    epochs: float = Field(ge=0.0)
    """0 leaves the logged pass out."""
    learning_rate: float = Rate
    batch_size: int = Count
    clip: float = Positive
    gae_lambda: float = Share


class PPOConfig(Frozen):
    episodes: int = Field(ge=0)
    """Responses sampled against Q; 0 leaves PPO out."""
    epochs: int = Count
    minibatch_size: int = Count
    learning_rate: float = Rate
    clip: float = Positive
    kl_coefficient: float = Field(ge=0.0)
    gae_lambda: float = Share
    missing_eos_penalty: float = Field(ge=0.0)
    """Taken from the reward of a response that reached the length limit."""
    reference: Literal["logged", "champion"]
    """Whom the KL penalty keeps PPO near: the policy after the logged pass, or the paper's pi_i."""


class ImproveConfig(Frozen):
    reward: Literal["outcome", "acceptance"]
    """What returns are made of; acceptance is the myopic baseline."""
    logged: LoggedConfig
    ppo: PPOConfig


class GateConfig(Frozen):
    alpha: float = Rate
    """Level of the A/B test."""
    max_kl: float = Positive
    """Largest mean KL(challenger || champion), in nats a response."""
    max_repetition: float = Share
    """Largest share of repeated bigrams within a response, on average."""
    max_missing_eos: float = Share
    """Largest share of responses without an end of sequence."""
    max_length_ratio: float = Positive
    """Largest ratio of mean response length to the champion's."""
    samples: int = Count
    """Responses a held-out state."""
    states: int = Count
    """Held-out states that the gate looks at."""


class ABTestConfig(Frozen):
    conversations: int = Field(ge=2)
    """Matured conversations, both arms together, at which the test is decided."""
    challenger_share: float = Rate


class RoundsConfig(Frozen):
    max_rounds: int = Count
    final_conversations: int = Count
    """Fresh conversations an arm in the closing comparison of the last champion with pi_0."""
    converged_below: float
    """Rounds end when the A/B test's upper bound on the gain falls below this (0: only max_rounds ends them)."""


class RuntimeConfig(Frozen):
    threads: int = Count
    """Torch threads; more than the free cores is slower than one."""
    device: str


class Config(Frozen):
    """All of params.yaml."""

    seed: int
    outcomes: dict[str, float]
    gamma: float = Rate
    data: DataConfig
    tracking: TrackingConfig
    source: SourceConfig
    simulator: SimulatorConfig
    policy: PolicyConfig
    supervised: SupervisedConfig
    q: QConfig
    improve: ImproveConfig
    gate: GateConfig
    abtest: ABTestConfig
    rounds: RoundsConfig
    runtime: RuntimeConfig

    @model_validator(mode="after")
    def _outcomes(self) -> Config:
        if not self.outcomes:
            raise ValueError("outcomes: name at least one outcome and its weight")
        return self


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Config:
    """Defaults, then the profile of the source, then the user's params file, then overrides.

    Args:
        path: a params.yaml that may hold any subset of the keys; None means the defaults alone.
        overrides: `{"a.b": value}` or strings `"a.b=value"`, the value read as YAML.

    Raises ConfigError with the file, the key, what was expected and, for an unknown key, the nearest known one.
    """
    defaults = _read_yaml(DEFAULTS)
    profiles = defaults.pop("profiles")
    layers = [] if path is None else [(_read_yaml(path), str(path))]
    layers += [(_nested(key, value), f"override {key!r}") for key, value in _pairs(overrides)]
    for layer, where in layers:
        profiles = _merge(profiles, layer.pop("profiles", {}), profiles, where, ("profiles",))
    kind = _laid_over(defaults, layers)["source"]["kind"]
    profile = profiles.get(kind, {}) if isinstance(kind, str) else {}
    values = _laid_over(defaults, [(profile, f"profile {kind!r}"), *layers])
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "params"
        given = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
        raise ConfigError(f"{path or DEFAULTS.name}: {where}: {first['msg']}{given}") from None


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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    """`base` with `new` laid over it. The outcomes' names are the user's own, so that section is replaced whole."""
    merged = dict(base)
    for key, value in new.items():
        path = (*at, str(key))
        if key not in known:
            raise ConfigError(f"{where}: unknown key {'.'.join(path)!r}{did_you_mean(str(key), known)}")
        if path == ("outcomes",) or not isinstance(known[key], dict):
            merged[key] = value
        elif isinstance(value, Mapping):
            merged[key] = _merge(merged[key], value, known[key], where, path)
        else:
            raise ConfigError(f"{where}: {'.'.join(path)} is a section, expected keys below it, got {value!r}")
    return merged
