"""One round as it lies on disk: its data, Q, improvement, gate and A/B test, as far as it has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from iterative_ppo.evaluation.ab_test import ABTest
from iterative_ppo.evaluation.convergence import Convergence
from iterative_ppo.evaluation.gate import Decision
from iterative_ppo.evaluation.guardrails import LIMIT
from iterative_ppo.evaluation.metrics import Calibration
from iterative_ppo.evaluation.non_inferiority import Found, NonInferiority
from iterative_ppo.learning.objective import usual_success
from iterative_ppo.mdp.labels import counts
from iterative_ppo.report.customers import Group, groups, read_returns, read_turns
from iterative_ppo.report.q_record import (
    CreditRecord,
    Numbers,
    OutcomeRecord,
    calibration_of,
    credit_of,
    forecast_of,
    outcomes_of,
)
from iterative_ppo.report.stored import decision_of, finite, label, numbers, optional, part, shaped, test_of
from iterative_ppo.report.tested import TEST, read_tested

STAGES = ("validated", "q", "improved", "gate")
SAMPLED = ("ppo", "grpo", "rloo")


@dataclass(frozen=True)
class Said:
    """What a policy says in a state, and what Q expects of it."""

    text: str
    q: float | None


@dataclass(frozen=True)
class Example:
    """A held-out state, (customer, business) messages in turn, and what both policies say in it."""

    messages: tuple[tuple[str | None, str | None], ...]
    champion: Said
    challenger: Said

    @property
    def differs(self) -> bool:
        return self.champion.text != self.challenger.text


@dataclass(frozen=True)
class Guarded:
    """A guardrail's values and what it found; None where a value is not known."""

    challenger: float | None
    champion: float | None
    margin: float | None
    found: Found


@dataclass(frozen=True)
class RoundRecord:
    """One round: its data, Q, improvement, gate and A/B test, as far as it has come."""

    number: int
    champion: str | None = None
    challenger: str | None = None
    data_md5: str | None = None
    conversations: int | None = None
    quarantined: int | None = None
    quarantine_reasons: Mapping[str, int] = field(default_factory=dict)
    set_aside: Mapping[str, int] = field(default_factory=dict)
    """Conversations of a log that its import left out, by reason."""
    warnings: tuple[str, ...] = ()
    success_above: float | None = None
    """The R above which a conversation was a success."""
    groups: tuple[Group, ...] = ()
    origins: Mapping[str, int] = field(default_factory=dict)
    """Conversations by the origin of their outcome: reported, rule, classifier:<version>, or none."""
    classifier: Numbers = field(default_factory=dict)
    """Figures of the classifier that was fitted to say outcomes, on held-out conversations."""
    mean_return: float | None = None
    q: Numbers = field(default_factory=dict)
    calibration: Calibration | None = None
    forecast: Mapping[str, Calibration] = field(default_factory=dict)
    """Q against the undiscounted outcome: as it is, and mapped by each way of calibration."""
    outcomes: Mapping[str, OutcomeRecord] = field(default_factory=dict)
    """Q's heads, by the outcome's name, where there are several."""
    credit: CreditRecord | None = None
    distance: Numbers = field(default_factory=dict)
    """How near a policy cloned from a log is to that log."""
    curves: Mapping[str, tuple[Numbers, ...]] = field(default_factory=dict)
    """Of each pass of the improvement that ran, in order: one entry an update, or a rollout of a sampled algorithm."""
    improved: Numbers = field(default_factory=dict)
    """Figures of the improvement."""
    candidates: int | None = None
    """Responses a state, of which the best of n was learnt."""
    evidence: Numbers = field(default_factory=dict)
    guardrails: Mapping[str, Guarded] = field(default_factory=dict)
    """Of the offline gate, by name, with what its own limit found where that is worse."""
    examples: tuple[Example, ...] = ()
    temperature: float | None = None
    offline: Decision | None = None
    test: ABTest | None = None
    decision: Decision | None = None
    counted: bool = False
    """Whether its A/B test says which conversations it counted."""
    with_customers: Mapping[str, Guarded] = field(default_factory=dict)
    """The same guardrails of its A/B test."""
    looks: tuple[float, ...] = ()
    """Looks at its A/B test, as shares of the planned conversations."""
    void: str | None = None
    """Why its A/B test ended without a verdict, where it did."""
    convergence: str | None = None
    """Whether the rounds had converged, and why, with the figure."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def promoted(self) -> bool:
        return self.decision is not None and self.decision.verdict == "promote"

    @property
    def held_back(self) -> tuple[str, ...]:
        """Why its challenger was not promoted though customers showed it to be better; empty where that is not so."""
        if self.promoted or self.decision is None or self.test is None or not self.test.better:
            return ()
        unheld = [(name, one.found) for name, one in self.with_customers.items() if one.found != "holds"]
        return tuple(f"guardrail {name} {found}" for name, found in unheld) or (
            self.decision.reasons[0].removeprefix("failed: "),
        )

    @property
    def algorithm(self) -> str | None:
        """What improved the policy on sampled responses, where anything did."""
        return next((name for name in SAMPLED if name in self.curves), None)

    @property
    def sampled(self) -> tuple[Numbers, ...]:
        """That algorithm's curve, one entry a rollout."""
        return self.curves[self.algorithm] if self.algorithm else ()

    @property
    def differing(self) -> int:
        """Examples in which the two policies say something else."""
        return sum(example.differs for example in self.examples)

    @property
    def kl_margin(self) -> float | None:
        """How far from the champion the offline gate lets a challenger be, nats a response."""
        return self.guardrails["kl"].margin if "kl" in self.guardrails else None

    @property
    def from_logs(self) -> bool:
        """Whether the round's conversations come from a log rather than from live traffic."""
        return bool(self.groups) and all(group.of_log for group in self.groups)


def read_round(root: Path, number: int, row: Mapping[str, Any], state: Path, outcomes: Numbers) -> RoundRecord:
    """A round below the run's `root`; `row` is what state.json, at `state`, says of it.

    Args:
        outcomes: the run's, with their weights, for rounds that do not record what a success was.
    """
    folder = root / "rounds" / f"{number:04d}"
    with shaped(state):
        named = {key: label(row.get(key)) for key in ("champion", "challenger", "data_md5")}
    verdicts = _verdicts(folder, row, state)
    return RoundRecord(
        number, **{**named, **_data(root, folder, outcomes), **_learning(folder), **_gating(folder), **verdicts}
    )


def _data(root: Path, folder: Path, outcomes: Numbers) -> dict[str, Any]:
    frame = read_turns(root / "turns" / f"round={folder.name}")
    validation = _validation(folder / "validated" / "validation.json")
    above = validation.get("success_above")
    above = usual_success(outcomes) if above is None else above
    tested = read_tested(folder.with_name(f"{int(folder.name) - 1:04d}") / TEST)
    found: tuple[Group, ...] = ()
    if frame is not None:
        returns = read_returns(folder / "returns" / "returns.parquet")
        found = groups(tested.of(frame) if tested else frame, above, returns)
    return {
        **validation,
        "success_above": above,
        "set_aside": _set_aside(folder / "import.json"),
        "conversations": None if frame is None else frame["conversation_id"].nunique(),
        "groups": tuple(map(tested.judged, found)) if tested else found,
        "classifier": numbers(folder / "outcome_classifier" / "stage.json", "metrics"),
        "origins": counts(frame) if frame is not None else {},
        "mean_return": numbers(folder / "returns" / "stage.json", "metrics").get("mean_return"),
    }


def _learning(folder: Path) -> dict[str, Any]:
    settings = {name: part(folder / name / "stage.json", "inputs") for name in STAGES}
    return {
        "q": numbers(folder / "q" / "stage.json", "metrics"),
        "calibration": calibration_of(folder / "q" / "calibration.json"),
        "forecast": forecast_of(folder / "q" / "forecast.json"),
        "outcomes": outcomes_of(folder / "q" / "outcomes.json"),
        "credit": credit_of(folder / "q"),
        "distance": numbers(folder / "distance" / "stage.json", "metrics"),
        "curves": _curves(folder / "improved" / "curves.json"),
        "improved": numbers(folder / "improved" / "stage.json", "metrics"),
        "temperature": numbers(folder / "improved" / "model" / "policy.json").get("temperature"),
        "candidates": _candidates(folder / "improved" / "stage.json", settings["improved"]),
        "settings": settings,
    }


def _gating(folder: Path) -> dict[str, Any]:
    evidence = folder / "gate" / "evidence.json"
    return {
        "evidence": numbers(evidence),
        "guardrails": _guardrails(optional(evidence) or {}, evidence),
        "examples": _examples(folder / "gate" / "examples.json"),
    }


def _guardrails(values: Mapping[str, Any], path: Path) -> dict[str, Guarded]:
    found: dict[str, Guarded] = {}
    with shaped(path):
        for one in values.get("guardrails", []):
            name, limit, _ = str(one["measure"]).partition(LIMIT)
            told, value = NonInferiority.from_dict(one).found, finite(one)
            if limit and name in found:
                found[name] = replace(found[name], found=max(found[name].found, told, key=get_args(Found).index))
            else:
                found[name] = Guarded(value.get("challenger"), value.get("champion"), value.get("margin"), told)
    return found


def _verdicts(folder: Path, row: Mapping[str, Any], state: Path) -> dict[str, Any]:
    """What state.json says; where a kill came before it was written, what the stages say."""
    with shaped(state):
        offline, decision = decision_of(row.get("offline")), decision_of(row.get("decision"))
        test, ended = test_of(row.get("ab_test")), row.get("convergence")
        experiment = row.get("experiment") or {}
        looks = tuple(float(look["fraction"]) for look in experiment.get("looks", []))
        convergence = Convergence(**ended).words if ended else None
    late_test, late_decision = _ab_test(folder / TEST)
    return {
        "offline": offline or _gate(folder / "gate" / "decision.json"),
        "test": test or late_test,
        "decision": decision or late_decision,
        "counted": read_tested(folder / TEST) is not None,
        "looks": looks,
        "with_customers": _guardrails(experiment, state),
        "void": label(row.get("void")),
        "convergence": convergence,
    }


def _validation(path: Path) -> dict[str, Any]:
    values = optional(path)
    if values is None:
        return {}
    with shaped(path):
        return {
            "quarantined": int(values["quarantined_conversations"]),
            "quarantine_reasons": {str(reason): int(count) for reason, count in values.get("reasons", {}).items()},
            "warnings": tuple(map(str, values.get("warnings", []))),
            "success_above": finite(values).get("success_above"),
        }


def _set_aside(path: Path) -> dict[str, int]:
    values = optional(path) or {}
    with shaped(path):
        return {str(reason): int(count) for reason, count in values.get("set_aside", {}).items()}


def _curves(path: Path) -> dict[str, tuple[Numbers, ...]]:
    values = optional(path)
    with shaped(path):
        entries = values.items() if values is not None else ()
        return {name: tuple(finite(entry) for entry in curve) for name, curve in entries if curve}


def _candidates(path: Path, inputs: Mapping[str, Any]) -> int | None:
    with shaped(path):
        samples = inputs.get("improve", {}).get("best_of_n", {}).get("samples")
        return None if samples is None else int(samples)


def _gate(path: Path) -> Decision | None:
    with shaped(path):
        return decision_of(optional(path))


def _ab_test(path: Path) -> tuple[ABTest | None, Decision | None]:
    values = optional(path)
    if values is None:
        return None, None
    with shaped(path):
        return test_of(values["test"]), decision_of(values["decision"])


def _examples(path: Path) -> tuple[Example, ...]:
    with shaped(path):
        return tuple(_example(value) for value in optional(path) or [])


def _example(value: Mapping[str, Any]) -> Example:
    messages = tuple((label(m.get("customer")), label(m.get("business"))) for m in value["messages"])
    return Example(messages, _said(value["champion"]), _said(value["challenger"]))


def _said(value: Mapping[str, Any]) -> Said:
    return Said(str(value["text"]), finite(value).get("q"))
