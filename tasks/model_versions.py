"""Registered models: versions that load, aliases, and what may become champion.

A version is a directory that Hugging Face, this program and MLflow's pyfunc all load; weights are stored once.
Aliases sit on the policy; its Q is named by a tag.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iterative_ppo.errors import StoreError
from iterative_ppo.files import content_hash
from tasks.mlflow_store import plain_errors
from tasks.tracking import OURS, Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

POLICY, Q, OUTCOME = "iterative-ppo-policy", "iterative-ppo-q", "iterative-ppo-outcome"
CONTENT = "content"
OF_MLFLOW = ("MLmodel", "registered_model_meta")
"""Files that MLflow leaves beside a version's own."""
CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
NOT_THERE = "RESOURCE_DOES_NOT_EXIST"
PROMOTED, REJECTED, ROLLED_BACK, VOID = "promoted", "rejected", "rolled back", "void"


@dataclass(frozen=True)
class Version:
    """A registered model's version; `tags` are those of this program, without their prefix."""

    name: str
    number: int
    run_id: str | None
    tags: dict[str, str]
    aliases: tuple[str, ...]
    ready: bool
    created: datetime


def register(tracking: Tracking, name: str, directory: Path, run_id: str, tags: Mapping[str, Any]) -> int:
    """The version that holds a saved model; made once for the same content and the same `round` tag.

    Args:
        directory: as LanguagePolicy.save, QModel.save or OutcomeClassifier.save wrote it.

    Raises StoreError where the directory does not hold such a model or the store refuses.
    """
    check_loads(name, directory, str(directory))
    wanted = {CONTENT: content_hash(directory)} | {key: str(value) for key, value in tags.items()}
    with tracking.locked(), plain_errors(f"registering {directory} as {name}"):
        for known in versions(tracking, name):
            if all(known.tags.get(key) == wanted.get(key) for key in (CONTENT, "round")):
                tag(tracking, name, known.number, **_news(known, wanted))
                return known.number
        if not tracking.client.search_registered_models(f"name = '{name}'"):
            tracking.client.create_registered_model(name)
        model_id, location = _store(tracking, name, directory, wanted[CONTENT], run_id)
        # A SQL store looks `models:/` up in the process's global store, not in the client's; a server in its own.
        source = f"models:/{model_id}" if tracking.uri.startswith(("http", "databricks")) else location
        ours = {f"{OURS}{key}": value for key, value in wanted.items()}
        made = tracking.client.create_model_version(name, source, run_id, tags=ours, model_id=model_id)
        return int(made.version)


def _news(known: Version, wanted: Mapping[str, str]) -> dict[str, str]:
    """Tags that changed; a verdict stays once the version has been champion."""
    settled = known.tags.get("verdict") in (PROMOTED, ROLLED_BACK)
    return {key: value for key, value in wanted.items() - known.tags.items() if not (settled and key == "verdict")}


def _store(tracking: Tracking, name: str, directory: Path, content: str, run_id: str) -> tuple[str, str]:
    """Id and location of the stored model. One that a killed process left, or that another round made, is taken up."""
    client, tag = tracking.client, f"{OURS}{CONTENT}"
    found = client.search_logged_models([tracking.experiment_id], f"tags.`{tag}` = '{content}' and name = '{name}'")
    model = next((m for m in found if m.status in ("READY", "PENDING")), None)
    if model is None:
        model = client.create_logged_model(tracking.experiment_id, name, run_id, tags={tag: content})
    if model.status != "READY":
        client.log_model_artifacts(model.model_id, str(directory))
        with tempfile.TemporaryDirectory() as folder:
            description = Path(folder) / "MLmodel"
            _description(name, model.model_id).save(str(description))
            client.log_model_artifact(model.model_id, str(description))
        client.finalize_logged_model(model.model_id, "READY")
    return model.model_id, model.artifact_location


def _description(name: str, model_id: str) -> Any:
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    if name == POLICY:
        given, said = ColSpec(DataType.string, "prompt"), ColSpec(DataType.string)
        params = ParamSchema([ParamSpec("seed", DataType.long, 0)])
        signature = ModelSignature(Schema([given]), Schema([said]), params)
    elif name == Q:
        signature = ModelSignature(
            Schema([ColSpec(Array(DataType.long), "tokens")]), Schema([ColSpec(DataType.double)])
        )
    else:
        told, probabilities = ColSpec(DataType.string, "transcript"), ColSpec(Array(DataType.double))
        signature = ModelSignature(Schema([told]), Schema([probabilities]))
    model = Model(signature=signature)
    model.model_id = model_id
    add_to_model(model, loader_module="tasks.served_model")
    return model


def check_loads(name: str, directory: Path, called: str) -> None:
    """Raise StoreError where a directory does not hold a model of this kind that loads."""
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.outcome_classifier import OutcomeClassifier
    from iterative_ppo.learning.q_model import QModel

    kinds: dict[str, Any] = {POLICY: LanguagePolicy, Q: QModel, OUTCOME: OutcomeClassifier}
    try:
        kinds[name].load(directory)
    except Exception as error:  # damaged files raise what their readers like: safetensors, tokenizers, json, torch
        raise StoreError(f"{called} does not load: {' '.join(str(error).split())[:400]}") from error


def check_version(tracking: Tracking, number: int) -> None:
    """Raise StoreError where a policy version does not load, or its files are not those that were registered."""
    place, called = fetch(tracking, POLICY, number), f"{POLICY} version {number}"
    check_loads(POLICY, place, called)
    registered = version(tracking, POLICY, number).tags.get(CONTENT)
    if registered and content_hash(place, *OF_MLFLOW) != registered:
        raise StoreError(
            f"{called}: its files in {place} are not those that were registered, but altered, lost or more"
        )


def check_promotable(tracking: Tracking, number: int, rolled_back: Collection[int] = ()) -> None:
    """Raise StoreError where a policy version is missing, not ours, not loadable, altered, or was rolled back.

    Args:
        rolled_back: versions that the audit trail knows as rolled back, should their tags be lost.
    """
    if "rolled_back" in version(tracking, POLICY, number).tags or number in rolled_back:
        raise StoreError(f"{POLICY} version {number} was rolled back; such a version is never proposed again")
    try:
        check_version(tracking, number)
    except StoreError as error:
        way_out = "restore its files or use another version; `ippo abtest --stop` ends a test of it"
        raise StoreError(f"{error}; {way_out}") from error


def registered(tracking: Tracking, name: str) -> bool:
    """Whether the store knows a model of that name, be it without versions."""
    with plain_errors(f"model {name}"):
        return bool(tracking.client.search_registered_models(f"name = '{name}'"))


def versions(tracking: Tracking, name: str) -> list[Version]:
    """All versions, oldest first; none where nothing was registered."""
    with plain_errors(f"versions of {name}"):
        named = aliases(tracking, name)
        found = tracking.client.search_model_versions(f"name = '{name}'", max_results=10_000)
        pointing = [[alias for alias, number in named.items() if number == int(one.version)] for one in found]
        return sorted(map(_version, found, pointing), key=lambda version: version.number)


def version(tracking: Tracking, name: str, number: int) -> Version:
    """One version. Raises StoreError where there is none, or none of this program's."""
    from mlflow.exceptions import MlflowException

    with plain_errors(f"{name} version {number}"):
        try:
            entity = tracking.client.get_model_version(name, str(number))
        except MlflowException as error:
            if error.error_code != NOT_THERE:
                raise
            there = ", ".join(str(one.number) for one in versions(tracking, name)) or "none"
            raise StoreError(
                f"{name} has no version {number}: it was deleted or never registered (there are: {there})"
            ) from None
    found = _version(entity, entity.aliases)
    if CONTENT not in found.tags:
        raise StoreError(f"{name} version {number} was not registered by this program; `ippo` uses only its own")
    return found


def _version(found: ModelVersion, pointing: Iterable[str]) -> Version:
    tags = {key.removeprefix(OURS): value for key, value in found.tags.items() if key.startswith(OURS)}
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    names, run = tuple(sorted(pointing)), found.run_id or None
    return Version(found.name, int(found.version), run, tags, names, found.status == "READY", created)


def aliases(tracking: Tracking, name: str) -> dict[str, int]:
    """A model's aliases and the versions that they point to; none where nothing was registered."""
    from mlflow.exceptions import MlflowException

    with plain_errors(f"aliases of {name}"):
        try:
            found = tracking.client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code == NOT_THERE:
                return {}
            raise
        return {alias: int(number) for alias, number in found.items()}


def point(tracking: Tracking, alias: str, number: int | None) -> None:
    """Let an alias of the policy name a version, or none."""
    with plain_errors(f"alias {alias} of {POLICY}"):
        if number is None:
            tracking.client.delete_registered_model_alias(POLICY, alias)
        else:
            tracking.client.set_registered_model_alias(POLICY, alias, str(number))


def resolve(tracking: Tracking, alias: str, name: str = POLICY) -> int:
    """The version that an alias, or a number as text, names. Raises StoreError where it names none."""
    if alias.isdecimal():
        return version(tracking, name, int(alias)).number
    known = aliases(tracking, name)
    if alias not in known:
        there = ", ".join(f"{key} ({number})" for key, number in sorted(known.items())) or "none"
        raise StoreError(f"{name} has no alias {alias!r} (there are: {there})")
    return known[alias]


def fetch(tracking: Tracking, name: str, version_or_alias: int | str) -> Path:
    """The directory of a version, which is read only: it is the stored one where the store is on this machine.

    Raises StoreError where the version was deleted, is not ready, or has lost its files.
    """
    given = version_or_alias
    number = given if isinstance(given, int) else resolve(tracking, given, name)
    if not version(tracking, name, number).ready:
        raise StoreError(f"{name} version {number} is not ready; register it again")
    with plain_errors(f"{name} version {number}"):
        return tracking.fetch(tracking.client.get_model_version_download_uri(name, str(number)))


def tag(tracking: Tracking, name: str, number: int, **tags: Any) -> None:
    """Tag a version."""
    with plain_errors(f"tags of {name} version {number}"):
        for key, value in tags.items():
            tracking.client.set_model_version_tag(name, str(number), f"{OURS}{key}", str(value))
