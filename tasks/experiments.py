"""A/B tests in the audit trail: each salt is used once, a test begins and ends once, and some tests become void."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from iterative_ppo.errors import StoreError
from tasks.audit import DONE, INTENT, append, history, locked, standing
from tasks.state import Experiment

STARTED, ENDED = "experiment started", "experiment ended"


def start(data_root: Path, experiment: Experiment, data_md5: str) -> Experiment:
    """Record that a test begins, and return it with its start; begun again before its end, it is the same test.

    Raises StoreError, with nothing changed, for a salt that assigned another pair before (its units would meet the
    same arms again), for a test that has ended, and for one that began with another data set.
    """
    with locked(data_root):
        for known in _of(data_root, experiment.salt, STARTED, ENDED):
            if (known["champion"], known["challenger"]) != (experiment.champion, experiment.challenger):
                raise StoreError(
                    f"the salt {experiment.salt!r} assigned version {known['challenger']} against "
                    f"{known['champion']} before; a salt serves one experiment"
                )
            if known["event"] == ENDED:
                raise StoreError(
                    f"experiment {experiment.salt!r} ended ({known['verdict']}, {known['at']}) and is not started "
                    "twice; restore the newest state.json"
                )
            if known["data_md5"] != data_md5:
                raise StoreError(
                    f"experiment {experiment.salt!r} began with a challenger of data {known['data_md5']}, and this "
                    f"one is of {data_md5}: evidence of another data set; restore the newest state.json"
                )
        begun = _of(data_root, experiment.salt, STARTED)
        record = {"event": STARTED, **_named(experiment), "settings": experiment.settings, "data_md5": data_md5}
        first = begun[0] if begun else append(data_root, record)
        return experiment.model_copy(update={"started": datetime.fromisoformat(first["at"])})


def end(data_root: Path, experiment: Experiment, decision: Mapping[str, Any], evidence: Mapping[str, Any]) -> None:
    """Record a test's verdict, once."""
    with locked(data_root):
        if decision["verdict"] not in verdicts(data_root, experiment):
            record = {"event": ENDED, **_named(experiment), "verdict": decision["verdict"]}
            append(data_root, {**record, "reasons": list(decision["reasons"]), "evidence": dict(evidence)})


def verdicts(data_root: Path, experiment: Experiment) -> set[str]:
    """The verdicts that a test has; none while it runs."""
    return {known["verdict"] for known in _of(data_root, experiment.salt, ENDED)}


def ended(data_root: Path, experiment: Experiment) -> Mapping[str, Any] | None:
    """The record of a test's end, the last where a promotion made it void after; None while it runs."""
    return next(reversed(_of(data_root, experiment.salt, ENDED)), None)


def decided(data_root: Path, experiment: Experiment) -> dict[str, Any] | None:
    """The evidence that a test was decided on before a kill: it promoted, or was rejected; None while it runs."""
    promotion = promotion_by(history(data_root), experiment.salt)
    if promotion is not None:
        return dict(promotion["evidence"])
    rejections = [r for r in _of(data_root, experiment.salt, ENDED) if r["verdict"] == "reject"]
    return dict(rejections[-1]["evidence"]) if rejections else None


def promotion_by(records: Sequence[Mapping[str, Any]], salt: str) -> Mapping[str, Any] | None:
    """The promotion that a test's evidence made, where it is done."""
    done = {record.get("id") for record in records if record.get("event") == DONE}
    for record in records:
        tested = record.get("evidence", {}).get("experiment") if record.get("event") == INTENT else None
        if tested and tested["salt"] == salt and record["id"] in done:
            return record
    return None


def void(data_root: Path, experiment: Experiment, there: set[int]) -> str | None:
    """Why a test tells nothing any more, or None. Once void it stays so, whoever becomes champion later.

    Args:
        there: the policy versions that exist.
    """
    records = history(data_root)
    if promotion_by(records, experiment.salt):
        return None
    for known in _of(data_root, experiment.salt, ENDED):
        if known["verdict"] == "void":
            return str(known["reasons"][0])
    stands = standing(records)
    if stands.champion != experiment.champion:
        now = f"{stands.champion} became the champion meanwhile" if stands.champion else "there is no champion any more"
        return f"policy version {experiment.challenger} was tested against {experiment.champion}, but {now}"
    if experiment.challenger not in there:
        return f"policy version {experiment.challenger}, the challenger, was deleted"
    if experiment.challenger in stands.rolled_back:
        return f"policy version {experiment.challenger}, the challenger, was rolled back"
    return None


def _of(data_root: Path, salt: str, *events: str) -> list[dict[str, Any]]:
    return [r for r in history(data_root) if r.get("event") in events and r.get("salt") == salt]


def _named(experiment: Experiment) -> dict[str, Any]:
    return experiment.model_dump(include={"salt", "champion", "challenger"})
