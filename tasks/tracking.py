"""MLflow runs: one a round, a nested one for each of its stages, found again by their tags when anything repeats.

Runs are named by id throughout. MLflow's active run belongs to a thread, and a task on another would open a stray one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

from iterative_ppo.config import Config
from iterative_ppo.errors import StoreError
from tasks.mlflow_store import client_of, locked, open_store, plain_errors, shown

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run

OURS = "iterative_ppo."
PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class Tracking:
    """An open MLflow store and the experiment in it. Plain values, so that it travels to other processes.

    Every method raises StoreError, in one line, where the store refuses or cannot be reached.
    """

    uri: str
    experiment: str
    experiment_id: str
    artifacts: Path
    """Folder of artifacts where the store is a database; of copies where it is a server."""

    @property
    def client(self) -> MlflowClient:
        return client_of(self.uri)

    def locked(self) -> AbstractContextManager[None]:
        """Nobody else looks for a thing and then makes it: for a local store only, a server has no such lock."""
        return locked(self.uri)

    def round_run(self, round_number: int, tags: Mapping[str, Any] | None = None) -> str:
        """The run of a round, made where there is none; a finished one runs again."""
        return self._run(f"round {round_number}", {f"{OURS}round": str(round_number)}, tags)

    def stage_run(self, parent_run_id: str, stage: str, key: str = "", tags: Mapping[str, Any] | None = None) -> str:
        """The run of a stage within its round; another `key`, say a fingerprint of its inputs, is another run."""
        return self._run(stage, {PARENT: parent_run_id, f"{OURS}stage": stage, f"{OURS}key": key}, tags)

    def find_round(self, round_number: int) -> str | None:
        """The run of a round, or None."""
        with plain_errors(f"round {round_number}"):
            run = self._find({f"{OURS}round": str(round_number)})
        return run.info.run_id if run else None

    def _run(self, name: str, identity: dict[str, str], tags: Mapping[str, Any] | None) -> str:
        more = {f"{OURS}{key}": str(value) for key, value in (tags or {}).items()}
        with self.locked(), plain_errors(f"run {name!r}"):
            run = self._find(identity)
            if run is None:
                return self.client.create_run(self.experiment_id, tags={**identity, **more}, run_name=name).info.run_id
            if run.info.status != "RUNNING":
                self.client.update_run(run.info.run_id, status="RUNNING")
            self._batch(run.info.run_id, tags=more)
            return run.info.run_id

    def _find(self, identity: dict[str, str]) -> Run | None:
        stable = [key for key in identity if key != f"{OURS}key"]  # a key is the caller's: any characters
        where = " and ".join(f"tags.`{key}` = '{identity[key]}'" for key in stable)
        found = self.client.search_runs([self.experiment_id], where, order_by=["attributes.start_time ASC"])
        return next((run for run in found if identity.items() <= run.data.tags.items()), None)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Nested params under dotted names. MLflow keeps a param's first value: a later one becomes a tag `changed.`"""
        flat = {key: str(value) for key, value in _flat(params)}
        with plain_errors(f"params of run {run_id}"):
            known = self.client.get_run(run_id).data.params
            new = {key: value for key, value in flat.items() if key not in known}
            changed = {f"{OURS}changed.{k}": v for k, v in flat.items() if known.get(k, v) != v}
            self._batch(run_id, params=new, tags=changed)

    def log_metrics(self, run_id: str, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Nested numbers under dotted names; None is left out, NaN is kept."""
        with plain_errors(f"metrics of run {run_id}"):
            self._batch(run_id, metrics=[(key, value, step) for key, value in _flat(metrics) if value is not None])

    def log_curves(self, run_id: str, rows: Sequence[Mapping[str, Any]], prefix: str = "", step: str = "step") -> None:
        """A list of dicts as curves over its `step` column, or over its rows. Steps that are there stay as they are."""
        points = [
            (f"{prefix}{key}", value, int(row.get(step, index)))
            for index, row in enumerate(rows)
            for key, value in _flat(row)
            if key != step and value is not None
        ]
        with plain_errors(f"curves of run {run_id}"):
            known = self.client.get_run(run_id).data.metrics
            there = {key: self._steps(run_id, key) for key in {key for key, _, _ in points} & known.keys()}
            self._batch(run_id, metrics=[p for p in points if p[2] not in there.get(p[0], ())])

    def _steps(self, run_id: str, key: str) -> set[int]:
        return {metric.step for metric in self.client.get_metric_history(run_id, key)}

    def _batch(
        self,
        run_id: str,
        metrics: Iterable[tuple[str, Any, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """A call for each value is 50 times slower; a call takes 1000 metrics, 100 params, 100 tags."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time() * 1000)
        measured = [Metric(key, float(value), now, step) for key, value, step in metrics]
        for some in _chunks(measured, 1000):
            self.client.log_batch(run_id, metrics=some)
        for some in _chunks([Param(key, value) for key, value in (params or {}).items()], 100):
            self.client.log_batch(run_id, params=some)
        for some in _chunks([RunTag(key, value) for key, value in (tags or {}).items()], 100):
            self.client.log_batch(run_id, tags=some)

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """A file, or a directory under its own name, below the run's artifacts."""
        if not path.exists():
            raise StoreError(f"{path}: not found, so run {run_id} cannot keep it")
        with plain_errors(f"artifact {path.name} of run {run_id}"):
            self.client.log_artifact(run_id, str(path), folder)

    def log_json(self, run_id: str, value: Any, name: str) -> None:
        """A JSON-able value as an artifact, say `gate.json`."""
        self.log_text(run_id, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", name)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """A text as an artifact; one named `.html` is shown as a page."""
        with plain_errors(f"artifact {name} of run {run_id}"):
            self.client.log_text(run_id, text, name)

    def log_dataset(
        self,
        run_id: str,
        data: pd.DataFrame | int,
        *,
        source: Path,
        digest: str,
        name: str,
        pointer: Path | None = None,
    ) -> None:
        """The data that a run read: searchable by `datasets.digest`. Repeated, it stays one input.

        Args:
            data: the table, whose schema is kept, or how many rows it has. digest: its md5 as DVC writes it.
            pointer: the `.dvc` file, kept as an artifact, by which `download` brings the data back.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        with plain_errors(f"dataset {name} of run {run_id}"):
            if isinstance(data, int):
                where, profile = json.dumps({"uri": str(source)}), json.dumps({"num_rows": data})
                entity = Dataset(name, digest, "local", where, profile=profile)
            else:
                from mlflow.data.pandas_dataset import from_pandas

                entity = Dataset(**from_pandas(data, source=str(source), name=name, digest=digest).to_dict())
            tags = [InputTag("mlflow.data.context", "training")]
            self.client.log_inputs(run_id, [DatasetInput(entity, tags)])
        if pointer is not None:
            self.log_artifact(run_id, pointer)

    def artifacts_of(self, run_id: str) -> list[str]:
        """Names of the files and folders that lie directly in a run's artifacts."""
        with plain_errors(f"artifacts of run {run_id}"):
            return [found.path for found in self.client.list_artifacts(run_id)]

    def download(self, run_id: str, name: str, destination: Path) -> Path:
        """Copy a run's artifact below `destination` and return its place there."""
        folder, _, _ = name.rpartition("/")
        with plain_errors(f"artifact {name} of run {run_id}"):
            there = [found.path for found in self.client.list_artifacts(run_id, folder or None)]
            if name not in there:
                raise StoreError(f"run {run_id} has no artifact {name!r} (it has: {', '.join(there) or 'none'})")
            destination.mkdir(parents=True, exist_ok=True)
            return Path(self.client.download_artifacts(run_id, name, str(destination)))

    def download_of_round(self, round_number: int, name: str, destination: Path) -> Path:
        """Copy an artifact of a round's run below `destination`, say the `.dvc` file that names its data."""
        run_id = self.find_round(round_number)
        if run_id is None:
            raise StoreError(f"round {round_number} has no run in experiment {self.experiment!r} of {shown(self.uri)}")
        return self.download(run_id, name, destination)

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        with plain_errors(f"run {run_id}"):
            self.client.set_terminated(run_id, status)


def open_tracking(config: Config) -> Tracking:
    """Open the store that MLFLOW_TRACKING_URI or the config names; a local one is made where there is none.

    Raises StoreError where the store is damaged, of another MLflow's schema, locked or out of reach.
    """
    uri, experiment_id = open_store(config.tracking)
    return Tracking(uri, config.tracking.experiment, experiment_id, config.tracking.artifacts.absolute())


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = prefix + re.sub(r"[^\w\-./: ]", "_", str(key))
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _chunks(values: list[Any], size: int) -> Iterator[list[Any]]:
    return (values[begin : begin + size] for begin in range(0, len(values), size))
