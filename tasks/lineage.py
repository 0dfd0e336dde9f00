"""Lineage: from a policy version back to pi_0 (Q, data set, source files, previous policy), forward to its evidence.

Read from the tags of the registered versions, the audit trail and the rounds' folders; where a version was deleted,
from what `state.json` says of its round. `describe` writes the same as links into MLflow's own pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from iterative_ppo.config import Config
from iterative_ppo.errors import StoreError
from iterative_ppo.files import content_hash, read_json, write_json
from tasks.audit import DONE, OPENINGS, history, kind_of
from tasks.datasets import round_folder
from tasks.experiments import ENDED
from tasks.mlflow_store import plain_errors
from tasks.model_versions import POLICY, Q, Version, versions
from tasks.state import load_state
from tasks.tracking import Tracking

SOURCES = "sources.json"


def write_sources(config: Config, arrived: Path, folder: Path) -> None:
    """Write which files a data set was made from, and which log those were imported from."""
    files = [{"file": file.name, "content": content_hash(file)} for file in sorted(arrived.glob("*.parquet"))]
    path = config.source.path
    write_json(folder / SOURCES, {"source": config.source.kind, "path": str(path) if path else None, "files": files})


def lineage(config: Config, tracking: Tracking, number: int) -> dict[str, Any]:
    """A policy version, JSON-able: where it comes from, `from` its parent and so on to pi_0, and its `evidence`.

    Raises StoreError where no such version was ever made.
    """
    records = history(config.data.root)
    rows = {int(row["challenger"]): row for row in load_state(config.data.root).rounds if "challenger" in row}
    policies = {one.number: one for one in versions(tracking, POLICY)}
    values = {one.number: one for one in versions(tracking, Q)}
    if number not in policies and number not in rows:
        there = ", ".join(map(str, sorted({*policies, *rows}))) or "none"
        raise StoreError(f"{POLICY} has no version {number} (there are: {there})")
    line: list[dict[str, Any]] = []
    following: int | None = number
    while following is not None and following not in {one["policy"] for one in line}:
        found = _policy(following, policies.get(following), rows.get(following, {}))
        found["evidence"] = _evidence(records, following)
        q, made_in = found.pop("q"), found["round"]
        found["q"] = _q(q, values.get(q)) if q is not None else None
        found["data"] = _data(config, tracking, made_in, found.pop("data_md5")) if q is not None else None
        line.append(found)
        following = found["parent"]
    for child, parent in pairwise(line):
        child["from"] = parent
    return line[0]


def describe(tracking: Tracking, name: str, version: Version) -> None:
    """Write a version's description in MLflow: its lineage as links to the pages of what it came from."""
    tags, about = version.tags, []
    if parent := tags.get("parent", tags.get("policy")):
        about.append(f"{'made from' if name == POLICY else 'values'} {_link(POLICY, parent)}")
    if q := tags.get("q_version"):
        about.append(f"improved against {_link(Q, q)}")
    if md5 := tags.get("data_md5"):
        about.append(f"data set `{md5}` of round {tags.get('round')}")
    if source := tags.get("source"):
        about.append(f"fine-tuned on {source}")
    if version.run_id:
        run = f"#/experiments/{tracking.experiment_id}/runs/{version.run_id}"
        about.append(f"[the round's run]({run}), with its A/B test in `ab_test.json`")
    with plain_errors(f"description of {name} version {version.number}"):
        tracking.client.update_model_version(name, str(version.number), "; ".join(about))


def _link(name: str, number: str) -> str:
    return f"[{name} {number}](#/models/{name}/versions/{number})"


def _policy(number: int, version: Version | None, row: Mapping[str, Any]) -> dict[str, Any]:
    tags = version.tags if version else {}
    return {
        "policy": number,
        "deleted": version is None,
        "aliases": list(version.aliases) if version else [],
        "verdict": tags.get("verdict"),
        "round": _int(tags.get("round", row.get("round"))),
        "content": tags.get("content"),
        "run": version.run_id if version else None,
        "registered": version.created.isoformat(timespec="seconds") if version else None,
        "corpus": tags.get("source"),
        "data_md5": tags.get("data_md5", row.get("data_md5")),
        "q": _int(tags.get("q_version", row.get("q"))),
        "parent": _int(tags.get("parent", row.get("champion"))),
    }


def _q(number: int, version: Version | None) -> dict[str, Any]:
    tags = version.tags if version else {}
    return {
        "version": number,
        "deleted": version is None,
        "of_policy": _int(tags.get("policy")),
        "content": tags.get("content"),
        "run": version.run_id if version else None,
    }


def _data(config: Config, tracking: Tracking, made_in: int | None, md5: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"round": made_in, "md5": md5, "source": None, "path": None, "files": []}
    return found | (_sources(config, tracking, made_in) if made_in is not None else {})


def _sources(config: Config, tracking: Tracking, made_in: int) -> dict[str, Any]:
    """From the round's folder, else from its MLflow run; nothing where neither has it."""
    here = round_folder(config, made_in) / "validated" / SOURCES
    try:
        return dict(read_json(here if here.exists() else tracking.artifact(made_in, SOURCES)))
    except StoreError:
        return {}


def _evidence(records: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """What the trail says of a version, oldest first: its A/B tests with their verdicts, and its moves."""
    done = {record.get("id") for record in records if record.get("event") == DONE}
    found = []
    for record in records:
        if record.get("event") == ENDED and number in (record["champion"], record["challenger"]):
            keys = ("salt", "champion", "challenger", "verdict", "reasons")
            test = record["evidence"].get("test")
            found.append({"at": record["at"], "what": "A/B test", **{key: record[key] for key in keys}, "test": test})
        elif record.get("event") in OPENINGS and record["id"] in done and number in (record["from"], record["to"]):
            actor = record.get("actor") or f"noticed by {record.get('noticed_by')}"
            ends = {"from": record["from"], "to": record["to"], "actor": actor}
            found.append({"at": record["at"], "what": kind_of(record), **ends})
    return found


def _int(value: Any) -> int | None:
    return None if value is None else int(value)
