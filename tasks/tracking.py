"""MLflow runs: one a round, a nested one for each of its stages, found again by their tags when anything repeats.

Runs are named by id throughout. MLflow's active run belongs to a thread, and a task on another would open a stray one.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

from iterative_ppo.config import Config
from iterative_ppo.errors import StoreError
from iterative_ppo.files import fingerprint, whole_directory
from tasks.mlflow_store import client_of, local_path, locked, open_store, plain_errors, shown

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, Run

OURS = "iterative_ppo."
ROUND, STAGE, KEY = f"{OURS}round", f"{OURS}stage", f"{OURS}key"
PARENT = "mlflow.parentRunId"
Point = tuple[str, float, int]


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
        """Hold a local store, so that nobody else looks for a thing and then makes it too."""
        return locked(self.uri)

    def round_run(self, round_number: int, tags: Mapping[str, Any] | None = None) -> str:
        """The run of a round, made where there is none; a finished one runs again."""
        return self._run(f"round {round_number}", {ROUND: str(round_number)}, tags)

    def stage_run(self, parent_run_id: str, stage: str, key: str = "", tags: Mapping[str, Any] | None = None) -> str:
        """The run of a stage within its round; another `key`, say a fingerprint of its inputs, is another run."""
        return self._run(stage, {PARENT: parent_run_id, STAGE: stage, KEY: key}, tags)

    def find_round(self, round_number: int) -> str | None:
        """The run of a round, or None."""
        with plain_errors(f"round {round_number}"):
            run = self._find({ROUND: str(round_number)})
        return run.info.run_id if run else None

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        with plain_errors(f"run {run_id}"):
            self.client.set_terminated(run_id, status)

    def _run(self, name: str, identity: dict[str, str], tags: Mapping[str, Any] | None) -> str:
        more = {f"{OURS}{key}": str(value) for key, value in (tags or {}).items()}
        with self.locked(), plain_errors(f"run {name!r}"):
            run = self._find(identity)
            if run is None:
                run = self.client.create_run(self.experiment_id, tags={**identity, **more}, run_name=name)
                return run.info.run_id
            if run.info.status != "RUNNING":
                self.client.update_run(run.info.run_id, status="RUNNING")
            self._batch(run.info.run_id, tags=more)
            return run.info.run_id

    def _find(self, identity: Mapping[str, str]) -> Run | None:
        """The oldest run with these tags. A key is the caller's and may hold quotes, so it is compared here."""
        where = " and ".join(f"tags.`{name}` = '{value}'" for name, value in identity.items() if name != KEY)
        found = self.client.search_runs([self.experiment_id], where, order_by=["attributes.start_time ASC"])
        return next((run for run in found if identity.items() <= run.data.tags.items()), None)

    def log(
        self,
        run_id: str,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        artifacts: Iterable[Path] = (),
    ) -> None:
        """Log to a run; what is there already is not logged twice. Nested names become dotted ones, None is left out.

        Args:
            params: MLflow keeps a param's first value: a later one becomes a tag `iterative_ppo.changed.<name>`.
            curves: lists of dicts by name, each dict a point at its `step` or, without one, at its place in the list.
            artifacts: files, and directories under their own names.
        """
        with plain_errors(f"run {run_id}"):
            known = self.client.get_run(run_id).data
            given = {name: str(value) for name, value in _flat(params or {})}
            new = {name: value for name, value in given.items() if name not in known.params}
            changed = {f"{OURS}changed.{k}": v for k, v in given.items() if known.params.get(k, v) != v}
            measured = [(name, float(value), 0) for name, value in _flat(metrics or {}) if value is not None]
            points = [point for point in measured if str(known.metrics.get(point[0])) != str(point[1])]  # NaN too
            points += self._missing(run_id, _points(curves or {}), set(known.metrics))
            self._batch(run_id, points, new, changed)
        for path in artifacts:
            self.log_artifact(run_id, path)

    def _missing(self, run_id: str, points: list[Point], known: set[str]) -> list[Point]:
        names = {name for name, _, _ in points} & known
        there = {name: {m.step for m in self.client.get_metric_history(run_id, name)} for name in names}
        return [point for point in points if point[2] not in there.get(point[0], ())]

    def _batch(
        self,
        run_id: str,
        points: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """A call for each value is 50 times slower; a call takes 1000 metrics, 100 params or 100 tags."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time() * 1000)
        for some in _chunks([Metric(name, value, now, step) for name, value, step in points], 1000):
            self.client.log_batch(run_id, metrics=some)
        for some in _chunks([Param(name, value) for name, value in (params or {}).items()], 100):
            self.client.log_batch(run_id, params=some)
        for some in _chunks([RunTag(name, value) for name, value in (tags or {}).items()], 100):
            self.client.log_batch(run_id, tags=some)

    def log_artifact(self, run_id: str, path: Path) -> None:
        """Keep a file, or a directory under its own name, among the run's artifacts."""
        if not path.exists():
            raise StoreError(f"{path}: not found, so run {run_id} cannot keep it")
        with plain_errors(f"artifact {path.name} of run {run_id}"):
            self.client.log_artifact(run_id, str(path))

    def log_json(self, run_id: str, value: Any, name: str) -> None:
        """Keep a JSON-able value as an artifact, say `gate.json`."""
        self.log_text(run_id, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", name)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Keep a text as an artifact; MLflow shows one named `.html` as a page."""
        with plain_errors(f"artifact {name} of run {run_id}"):
            self.client.log_text(run_id, text, name)

    def log_dataset(
        self, run_id: str, data: pd.DataFrame | int, source: Path, digest: str, pointer: Path | None = None
    ) -> None:
        """The data that a run read, searchable by `datasets.digest`. Repeated, it stays one input.

        Args:
            data: the table, whose schema is kept, or how many rows it has. digest: its md5 as DVC writes it.
            pointer: the `.dvc` file, kept as an artifact: with it DVC brings the data back.
        """
        from mlflow.entities import DatasetInput, InputTag

        with plain_errors(f"dataset {source.name} of run {run_id}"):
            given = DatasetInput(_dataset(data, source, digest), [InputTag("mlflow.data.context", "training")])
            self.client.log_inputs(run_id, [given])
        if pointer is not None:
            self.log_artifact(run_id, pointer)

    def artifact(self, round_number: int, name: str) -> Path:
        """An artifact of a round's run or of one of its stages, say the `.dvc` file that names its data. Read only."""
        parent = self.find_round(round_number)
        if parent is None:
            raise StoreError(f"round {round_number} has no run in experiment {self.experiment!r} of {shown(self.uri)}")
        with plain_errors(f"artifact {name} of round {round_number}"):
            stages = self.client.search_runs([self.experiment_id], f"tags.`{PARENT}` = '{parent}'")
            for run in [self.client.get_run(parent), *stages]:
                if name in {found.path for found in self.client.list_artifacts(run.info.run_id)}:
                    return self.fetch(f"{run.info.artifact_uri}/{name}", fresh=True)
        raise StoreError(f"round {round_number}: no artifact {name!r} in run {parent} or in its {len(stages)} stages")

    def fetch(self, location: str, fresh: bool = False) -> Path:
        """What lies at an artifact location: in its place where that is on this machine, else copied here.

        Args:
            fresh: copy it again though it was copied before, because it may change.

        Raises FileNotFoundError where it is gone.
        """
        here = local_path(location)
        if here is not None:
            if not here.exists():
                raise FileNotFoundError(f"{here} is gone; restore it from a backup")
            return here
        from mlflow.artifacts import download_artifacts

        copy = self.artifacts / "downloads" / fingerprint(location) / location.rpartition("/")[2]
        if fresh or not copy.exists():
            with whole_directory(copy.parent) as draft:
                download_artifacts(artifact_uri=location, dst_path=str(draft), tracking_uri=self.uri)
        return copy


def open_tracking(config: Config) -> Tracking:
    """Open the store that MLFLOW_TRACKING_URI or the config names; a local one is made where there is none.

    Raises StoreError where the store is damaged, of another MLflow's schema, locked or out of reach.
    """
    uri, experiment_id = open_store(config.tracking)
    return Tracking(uri, config.tracking.experiment, experiment_id, config.tracking.artifacts.absolute())


def _dataset(data: pd.DataFrame | int, source: Path, digest: str) -> Dataset:
    from mlflow.data.pandas_dataset import from_pandas
    from mlflow.entities import Dataset

    if isinstance(data, int):
        where, profile = json.dumps({"uri": str(source)}), json.dumps({"num_rows": data})
        return Dataset(source.name, digest, "local", where, profile=profile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hints for people who infer a model's signature from a sample
        return Dataset(**from_pandas(data, source=str(source), name=source.name, digest=digest).to_dict())


def _points(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Point]:
    return [
        (name, float(value), int(row.get("step", place)))
        for curve, rows in curves.items()
        for place, row in enumerate(rows)
        for name, value in _flat({curve: {key: row[key] for key in row if key != "step"}})
        if value is not None
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = prefix + re.sub(r"[^\w\-./: ]", "_", str(key))
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _chunks(values: list[Any], size: int) -> Iterator[list[Any]]:
    return (values[begin : begin + size] for begin in range(0, len(values), size))
