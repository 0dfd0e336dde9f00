"""Where conversations come from, where they are kept, and what their outcomes are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from iterative_ppo.config.section import Count, Frozen, Positive, Rate, Share, regular_expression


class DataConfig(Frozen):
    root: Path
    """Folder of the turn table, quarantine, rounds and state."""
    remote: str | None
    """DVC remote; null means `<root>/remote`. The environment's IPPO_DATA_REMOTE wins over it."""
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
    outcome_ranges: dict[str, tuple[float, float]]
    """Least and greatest of an outcome by its name, where they are others: an order's worth beside a yes or no."""
    quarantine_share: float = Share
    """A round stops when more than this share of conversations fails validation, an import when an outcome's range or
    place sets more than this share aside."""
    outcome_rate_bound: float = Share
    """A change of one policy version's outcome rate beyond this is warned of."""

    @model_validator(mode="after")
    def _range(self) -> DataConfig:
        if self.outcome_low >= self.outcome_high:
            raise ValueError("outcome_low must be below outcome_high")
        _check_holds_nothing(f"outcome_low {self.outcome_low:g} to outcome_high {self.outcome_high:g}", self.range_of())
        for name, (low, high) in self.outcome_ranges.items():
            if low >= high:
                raise ValueError(f"outcome_ranges.{name}: the least, {low:g}, must be below the greatest, {high:g}")
            _check_holds_nothing(f"outcome_ranges.{name} {low:g} to {high:g}", (low, high))
        return self

    def range_of(self, outcome: str | None = None) -> tuple[float, float]:
        """Least and greatest of an outcome; of those that have no range of their own, without a name."""
        return self.outcome_ranges.get(outcome or "", (self.outcome_low, self.outcome_high))


def _check_holds_nothing(what: str, low_high: tuple[float, float]) -> None:
    low, high = low_high
    if not low <= 0 <= high:
        raise ValueError(
            f"{what} leaves out 0, which is what a conversation without an outcome has; count ratings from 0, or "
            "costs as negative numbers up to it"
        )


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
    conversations: int = Count
    """Conversations collected in round 0."""
    max_business_turns: int = Count


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
        regular_expression(pattern)
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
