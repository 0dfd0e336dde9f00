"""A round's tasks in Prefect: each runs one stage, logs it to MLflow, and hands on where its result lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from iterative_ppo.config import Config
from iterative_ppo.evaluation.gate import Decision
from iterative_ppo.files import content_hash, write_json
from iterative_ppo.learning.objective import success_above
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation
from tasks import labels, lineage, registry, tracking, validation, versioning
from tasks.datasets import Dataset, round_folder, turns_folder
from tasks.gating import decision_of, gate_stage
from tasks.learning import (
    PolicyVersion,
    Prompts,
    curves,
    distance_stage,
    fit_q_stage,
    improve_stage,
    initial_policy_stage,
    previous_q,
    prompts_stage,
    returns_stage,
)
from tasks.stage import Stage, run_stage
from tasks.turn_checks import check_parts


@dataclass(frozen=True)
class RoundContext:
    """What every task of a round knows: the configuration, the MLflow store, and the round's run."""

    config: Config
    tracking: tracking.Tracking
    round_number: int
    run_id: str

    @property
    def folder(self) -> Path:
        return round_folder(self.config, self.round_number)

    def log(self, name: str, stage: Stage, dataset: Dataset | None = None) -> None:
        """One nested MLflow run a stage: its inputs, metrics, curves and readable files, and the data it used."""
        inputs = stage.read("stage.json")["inputs"]
        run = self.tracking.stage_run(self.run_id, name, stage.key)
        self.tracking.log(
            run,
            params=inputs,
            metrics=stage.metrics,
            curves=curves(stage),
            artifacts=sorted(stage.path.glob("*.json")),
        )
        if dataset is not None:
            self.log_dataset(run, dataset)
        self.tracking.finish(run)

    def log_dataset(self, run: str, dataset: Dataset) -> None:
        pointer = dataset.path.with_name(f"{dataset.path.name}.dvc")
        self.tracking.log_dataset(run, dataset.read(self.config), dataset.path, dataset.md5, pointer)


@dataclass(frozen=True)
class QVersion:
    """A fitted Q: its stage, and its version in the registry."""

    stage: Path
    version: int


@dataclass(frozen=True)
class Candidate:
    """An improved policy that is not registered yet."""

    path: Path


def open_round(config: Config, store: tracking.Tracking, round_number: int) -> RoundContext:
    """The round's MLflow run, found again where it was begun before."""
    run = store.round_run(round_number, {"source": config.source.kind})
    return RoundContext(config.in_round(round_number), store, round_number, run)


@task(name="initial policy", cache_policy=NO_CACHE)
def initialize(context: RoundContext, corpus: list[Conversation], source: str) -> PolicyVersion:
    """Line 1: pi_0, registered and made the first champion, ungated."""
    stage = initial_policy_stage(context.config, corpus, source)
    context.log("initial policy", stage)
    tags = {"round": "0", "verdict": "initial", "source": source}
    version = _registered(context, registry.POLICY, stage.path / "model", tags)
    evidence = {"reason": "pi_0 is the first champion, ungated"}
    registry.promote(context.tracking, version, evidence, "flow", context.config.data.root)
    return policy_version(context.tracking, version)


def policy_version(store: tracking.Tracking, version: int, logged_as: str | None = None) -> PolicyVersion:
    """A registered policy with its files at hand."""
    return PolicyVersion(version, registry.fetch(store, registry.POLICY, version), logged_as)


@task(name="label outcomes", cache_policy=NO_CACHE)
def label_outcomes(context: RoundContext) -> Path:
    """Labels for what nobody reported an outcome of, as `labels.kind` says; a classifier is registered first."""
    config, number, folder = context.config, context.round_number, context.folder
    fitted, classifier = labels.classifier_stage(config, number, folder), None
    if fitted is not None:
        context.log("outcome classifier", fitted)
        tags = {"round": str(number)} | {key: f"{value:.4g}" for key, value in fitted.metrics.items()}
        classifier = _registered(context, registry.OUTCOME, fitted.path / "model", tags), fitted.path / "model"
    stage = labels.labels_stage(config, number, folder, classifier)
    context.log("label outcomes", stage)
    return stage.path


@task(name="validate and version", cache_policy=NO_CACHE)
def freeze_dataset(context: RoundContext, rates: dict[str, float], labelled: Path) -> Dataset:
    """What arrived becomes the round's dataset: with its labels, validated, versioned by DVC."""
    config, number = context.config, context.round_number
    stage = run_stage(
        context.folder / "validated",
        {
            "arrived": content_hash(context.folder / "arrived"),
            "labels": content_hash(labelled),
            "data": config.data.model_dump(),
            "outcomes": config.outcomes,
        }
        | ({} if (above := config.abtest.success_above) is None else {"success_above": above}),
        lambda draft: _validated(context, rates, labelled, draft),
    )
    target = turns_folder(config, number)
    turns = turn_table.read(stage.path / "turns.parquet", config.outcomes)
    turn_table.write(turns, target / "turns.parquet", config.outcomes)
    version = versioning.version(number, config)
    context.log("validate and version", stage)
    return Dataset(number, target, version.md5)


def _validated(context: RoundContext, rates: dict[str, float], labelled: Path, draft: Path) -> dict[str, float]:
    frame = labels.labelled(context.config, context.round_number, labelled)
    checked = validation.validate(frame, context.config, rates, context.round_number)
    for warning in checked.warnings:
        get_run_logger().warning(warning)
    check_parts(checked.good, context.config)
    turn_table.write(checked.good, draft / "turns.parquet", context.config.outcomes)
    facts = {"reasons": checked.reasons, "warnings": checked.warnings, **checked.statistics}
    facts["success_above"] = success_above(context.config)
    write_json(draft / "validation.json", facts)
    lineage.write_sources(context.config, context.folder / "arrived", draft)
    return {
        "conversations": float(checked.good["conversation_id"].nunique()),
        "quarantined": float(checked.statistics["quarantined_conversations"]),
    }


@task(name="returns", cache_policy=NO_CACHE)
def returns(context: RoundContext, dataset: Dataset) -> Path:
    """Monte Carlo returns of every turn."""
    stage = returns_stage(context.config, dataset, context.folder)
    context.log("returns", stage, dataset)
    return stage.path


@task(name="fit Q", cache_policy=NO_CACHE)
def fit_q(context: RoundContext, policy: PolicyVersion, dataset: Dataset) -> QVersion:
    """Line 5 of Algorithm 1."""
    start = previous_q(context.config, context.round_number)
    stage = fit_q_stage(context.config, policy, dataset, context.folder, start)
    context.log("fit q", stage, dataset)
    tags = _lineage(context, dataset) | {"policy": str(policy.version)}
    version = _registered(context, registry.Q, stage.path / "model", tags)
    return QVersion(stage.path, version)


@task(name="prompts", cache_policy=NO_CACHE)
def prompts(context: RoundContext, policy: PolicyVersion, dataset: Dataset) -> Prompts:
    """Line 6 of Algorithm 1."""
    stage = prompts_stage(context.config, policy, dataset, context.folder)
    context.log("prompts", stage, dataset)
    return Prompts(stage.path, dataset)


@task(name="improve", cache_policy=NO_CACHE)
def improve(context: RoundContext, policy: PolicyVersion, prompts: Prompts, q: QVersion) -> Candidate:
    """Line 7 of Algorithm 1."""
    stage = improve_stage(context.config, policy, prompts, q.stage / "model", context.folder)
    context.log("improve", stage, prompts.dataset)
    return Candidate(stage.path / "model")


@task(name="offline gate", cache_policy=NO_CACHE)
def gate(
    context: RoundContext, champion: PolicyVersion, candidate: Candidate, q: QVersion, dataset: Dataset
) -> tuple[Decision, Path]:
    """Whether the challenger may meet customers, from held-out states."""
    stage = gate_stage(context.config, champion, candidate.path, q.stage, dataset, context.folder)
    context.log("offline gate", stage, dataset)
    return decision_of(stage), stage.path


@task(name="register", cache_policy=NO_CACHE)
def register(
    context: RoundContext,
    champion: PolicyVersion,
    candidate: Candidate,
    q: QVersion,
    dataset: Dataset,
    decision: Decision,
) -> int:
    """The candidate as a version of the registered policy: a challenger where it passed, else tagged with why not."""
    tags = _lineage(context, dataset) | {
        "parent": str(champion.version),
        "q_version": str(q.version),
        "verdict": "challenger" if decision.verdict == "test" else "rejected",
        "reasons": "; ".join(decision.reasons),
    }
    version = _registered(context, registry.POLICY, candidate.path, tags)
    tested = {"champion": champion.version, "challenger": version, "q": q.version, "data_md5": dataset.md5}
    context.tracking.round_run(context.round_number, tested)
    if decision.verdict == "test" and version != registry.champion(context.tracking):
        registry.set_challenger(context.tracking, version)
    return version


def _registered(context: RoundContext, name: str, directory: Path, tags: dict[str, str]) -> int:
    """A version, with its lineage as links on its page in MLflow."""
    number = registry.register(context.tracking, name, directory, context.run_id, tags)
    lineage.describe(context.tracking, name, registry.version(context.tracking, name, number))
    return number


def _lineage(context: RoundContext, dataset: Dataset) -> dict[str, str]:
    return {"round": str(context.round_number), "data_md5": dataset.md5}


@task(name="distance to the log", cache_policy=NO_CACHE)
def distance(context: RoundContext, policy: PolicyVersion, dataset: Dataset) -> dict[str, float]:
    """How near a policy cloned from a log is to the policy that wrote it, for which Q is fitted."""
    stage = distance_stage(context.config, policy, dataset, context.folder)
    context.log("distance to the log", stage, dataset)
    return stage.metrics
