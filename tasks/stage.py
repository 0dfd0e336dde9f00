"""A stage writes one directory, whole or not at all, with a record of what went in; finished work is not done twice.

The record serves Prefect, DVC and the command line alike, so a killed run resumes with or without a server.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_ppo.errors import StoreError
from iterative_ppo.files import content_hash, fingerprint, read_json, whole_directory, write_json

RECORD = "stage.json"


@dataclass(frozen=True)
class Stage:
    """A finished stage: where it is, what it was made from, what was measured."""

    path: Path
    key: str
    metrics: dict[str, float]
    done_before: bool

    def read(self, name: str) -> Any:
        """One of the stage's JSON files."""
        return read_json(self.path / name)


def run_stage(path: Path, inputs: Mapping[str, Any], work: Callable[[Path], Mapping[str, float]]) -> Stage:
    """Do `work` in an empty directory that becomes `path`, unless the same inputs were finished before.

    Args:
        inputs: JSON-able; what the result depends on. Another value means the stage is done anew.
        work: fills the directory and returns its metrics.
    """
    key = fingerprint(inputs)
    record = _finished(path, key)
    if record is not None:
        return Stage(path, key, record["metrics"], True)
    with whole_directory(path) as draft:
        metrics = dict(work(draft))
        content = content_hash(draft)
        inputs = json.loads(json.dumps(dict(inputs), default=str))
        write_json(draft / RECORD, {"key": key, "inputs": inputs, "metrics": _finite(metrics), "content": content})
    return Stage(path, key, _finite(metrics), False)


def made_with(path: Path, inputs: Mapping[str, Any], name: str) -> Any:
    """What a stage finished at `path` was made with in place of one input; None where others differ too, or none is."""
    try:
        record = _record(path)
    except StoreError:
        return None
    wanted, known = json.loads(json.dumps(dict(inputs), default=str)), dict(record.get("inputs", {}))
    wanted.pop(name)
    value = known.pop(name, None)
    return value if known == wanted and record["content"] == content_hash(path, RECORD) else None


def inputs_of(path: Path) -> dict[str, Any]:
    """What a stage was made from. Raises StoreError where none was finished there."""
    inputs: dict[str, Any] = _record(path).get("inputs", {})
    return inputs


def load_stage(path: Path) -> Stage:
    """A stage that must have been finished. Raises StoreError."""
    record = _record(path)
    return Stage(path, record["key"], record["metrics"], True)


def _record(path: Path) -> dict[str, Any]:
    record = read_json(path / RECORD)
    if not isinstance(record, dict) or not {"key", "metrics", "content"} <= record.keys():
        raise StoreError(f"{path / RECORD}: not the record of a stage; remove {path} to have the stage done anew")
    return record


def _finished(path: Path, key: str) -> dict[str, Any] | None:
    """The record, where the stage was finished with this key and its files are still what they were."""
    try:
        record = _record(path)
    except StoreError:
        return None
    return record if record["key"] == key and record["content"] == content_hash(path, RECORD) else None


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics that are numbers: JSON and MLflow know no NaN."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
