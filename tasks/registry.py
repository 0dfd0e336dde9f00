"""Registered models: what a round made, by version, and which one speaks, by alias.

A move appends its intent, sets `previous`, then `champion`, deletes `challenger`, tags the verdict and appends that it
is done. An intent left open is carried out first by whoever comes next, from what it says and never from the aliases:
killed between any two of these steps, `champion` names a version that loads. Aliases sit on the policy; its Q is named
by a tag.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from filelock import FileLock, Timeout

from iterative_ppo.errors import StoreError
from tasks.audit import append, history, open_intent
from tasks.mlflow_store import plain_errors
from tasks.model_versions import (
    POLICY,
    PROMOTED,
    REJECTED,
    ROLLED_BACK,
    Q,
    Version,
    aliases,
    check_loads,
    fetch,
    register,
    resolve,
    tag,
    version,
    versions,
)
from tasks.tracking import Tracking

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "POLICY",
    "PREVIOUS",
    "Move",
    "Q",
    "Version",
    "aliases",
    "challenger",
    "champion",
    "fetch",
    "history",
    "promote",
    "recover",
    "register",
    "reject",
    "resolve",
    "rollback",
    "set_challenger",
    "tag",
    "version",
    "versions",
    "was_rolled_back",
]

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class Move:
    """What became of a promotion or rollback; as text, a line for a person."""

    kind: Literal["promote", "rollback"]
    source: int | None
    target: int
    outcome: Literal["done", "recovered", "unchanged", "abandoned"]

    def __str__(self) -> str:
        target, before = f"policy version {self.target}", f", after version {self.source}" if self.source else ""
        return {
            "done": f"{self.kind}: {target} is the champion{before}",
            "recovered": f"{self.kind}, cut off before, is complete: {target} is the champion{before}",
            "unchanged": f"{target} is the champion already; nothing changed",
            "abandoned": f"{self.kind}, cut off before, is undone, for {target} was deleted; champion: {self.source}",
        }[self.outcome]


def champion(tracking: Tracking) -> int | None:
    """The policy version that speaks, or None before the first promotion."""
    return aliases(tracking, POLICY).get(CHAMPION)


def challenger(tracking: Tracking) -> int | None:
    """The policy version under test, or None."""
    return aliases(tracking, POLICY).get(CHALLENGER)


def was_rolled_back(tracking: Tracking, number: int) -> bool:
    """Whether a version once lost the champion's place to a rollback: it is never proposed again."""
    return version(tracking, POLICY, number).tags.get("verdict") == ROLLED_BACK


def set_challenger(tracking: Tracking, number: int) -> None:
    """Propose a version. Raises StoreError where it cannot be promoted, or is the champion."""
    if number == champion(tracking):
        raise StoreError(f"{POLICY} version {number} is the champion; it cannot challenge itself")
    _check_promotable(tracking, number)
    _point(tracking, CHALLENGER, number)


def reject(tracking: Tracking, number: int, reasons: str) -> None:
    """Tag a version as rejected and why; it is no longer the challenger."""
    tag(tracking, POLICY, number, verdict=REJECTED, reasons=reasons)
    if challenger(tracking) == number:
        _point(tracking, CHALLENGER, None)


def promote(tracking: Tracking, to: int, evidence: Mapping[str, Any], actor: str, data_root: Path) -> Move:
    """Make a version the champion; nothing happens where it is.

    Args:
        evidence: JSON-able; why. actor: who. Both go into the audit trail below `data_root`.

    Raises StoreError, with nothing changed, for a version that is missing, not ours, not loadable or was rolled back,
    and where another move holds the lock for 30 seconds.
    """
    with _alone(data_root):
        _recover(tracking, data_root)
        now = aliases(tracking, POLICY)
        if now.get(CHAMPION) == to:
            return Move("promote", to, to, "unchanged")
        _check_promotable(tracking, to)
        return _move(tracking, data_root, "promote", now, to, {"evidence": evidence, "actor": actor})


def rollback(tracking: Tracking, evidence: Mapping[str, Any], actor: str, data_root: Path) -> Move:
    """Make the previous champion the champion again. The version that leaves is never proposed again.

    Raises StoreError, with nothing changed, where there is no previous champion or it cannot be promoted.
    """
    with _alone(data_root):
        _recover(tracking, data_root)
        now = aliases(tracking, POLICY)
        if now.get(CHAMPION) is None or now.get(PREVIOUS) in (None, now[CHAMPION]):
            raise StoreError(f"{POLICY} has no previous champion to go back to; promote a version instead")
        _check_promotable(tracking, now[PREVIOUS])
        return _move(tracking, data_root, "rollback", now, now[PREVIOUS], {"evidence": evidence, "actor": actor})


def recover(tracking: Tracking, data_root: Path) -> Move | None:
    """Carry out a move that was cut off, where there is one; None, at once, where there is none."""
    if open_intent(data_root) is None:
        return None
    with _alone(data_root):
        return _recover(tracking, data_root)


def _check_promotable(tracking: Tracking, number: int) -> None:
    if "rolled_back" in version(tracking, POLICY, number).tags:
        raise StoreError(f"{POLICY} version {number} was rolled back; such a version is never proposed again")
    check_loads(POLICY, fetch(tracking, POLICY, number), f"{POLICY} version {number}")


def _move(
    tracking: Tracking,
    data_root: Path,
    kind: Literal["promote", "rollback"],
    now: Mapping[str, int],
    to: int,
    why: Mapping[str, Any],
) -> Move:
    """The protocol. `now` are the aliases, read under the lock."""
    moved = {"kind": kind, "from": now.get(CHAMPION), "to": to, "challenger": now.get(CHALLENGER)}
    intent = append(data_root, {"event": "intent", "id": uuid4().hex, **moved, **why})
    _carry_out(tracking, intent)
    append(data_root, {"event": "done", "id": intent["id"]})
    return Move(kind, intent["from"], to, "done")


def _carry_out(tracking: Tracking, intent: Mapping[str, Any]) -> None:
    """The steps between intent and done; each may be repeated, and only what the intent knew of is touched."""
    source, to, promotion = intent["from"], intent["to"], intent["kind"] == "promote"
    source_is_there = any(one.number == source for one in versions(tracking, POLICY))
    if source_is_there:
        _point(tracking, PREVIOUS, source)
    _point(tracking, CHAMPION, to)
    if challenger(tracking) in ([to, intent["challenger"]] if promotion else [to]):
        _point(tracking, CHALLENGER, None)
    if promotion:
        tag(tracking, POLICY, to, verdict=PROMOTED)
    elif source_is_there:
        tag(tracking, POLICY, source, rolled_back=intent["at"], verdict=ROLLED_BACK)


def _recover(tracking: Tracking, data_root: Path) -> Move | None:
    intent = open_intent(data_root)
    if intent is None:
        return None
    there = {one.number for one in versions(tracking, POLICY)}
    outcome: Literal["recovered", "abandoned"] = "recovered" if intent["to"] in there else "abandoned"
    if outcome == "recovered":
        _carry_out(tracking, intent)
    elif intent["from"] in there:  # somebody deleted the target in between: nothing is left to go to
        _point(tracking, CHAMPION, intent["from"])
    append(data_root, {"event": "done" if outcome == "recovered" else outcome, "id": intent["id"]})
    return Move(intent["kind"], intent["from"], intent["to"], outcome)


def _point(tracking: Tracking, alias: str, number: int | None) -> None:
    with plain_errors(f"alias {alias} of {POLICY}"):
        if number is None:
            tracking.client.delete_registered_model_alias(POLICY, alias)
        else:
            tracking.client.set_registered_model_alias(POLICY, alias, str(number))


@contextmanager
def _alone(data_root: Path) -> Iterator[None]:
    data_root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(data_root / "registry.lock", timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise StoreError(f"{data_root}: another promotion or rollback has run for {LOCK_SECONDS:g} seconds") from None
