"""Registered models: what a round made, by version, and which one speaks, by alias.

Whoever enters first completes a move that was cut off (`tasks/moves.py`) and takes up what somebody moved outside
(`tasks/outside_moves.py`), then makes a move of their own. Aliases sit on the policy; its Q is named by a tag.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from iterative_ppo.errors import StoreError
from tasks.audit import INTENT, Standing, history, locked, open_intent, standing
from tasks.model_versions import (
    CHALLENGER,
    CHAMPION,
    OUTCOME,
    POLICY,
    PREVIOUS,
    REJECTED,
    ROLLED_BACK,
    VOID,
    Q,
    Version,
    aliases,
    check_promotable,
    fetch,
    point,
    register,
    resolve,
    tag,
    version,
    versions,
)
from tasks.moves import Move, complete, perform
from tasks.outside_moves import NothingLoads, last_good, take_up, undisturbed
from tasks.tracking import Tracking

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "OUTCOME",
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
    "withdraw",
]


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
    check_promotable(tracking, number)
    point(tracking, CHALLENGER, number)


def reject(tracking: Tracking, number: int, reasons: str) -> None:
    """Tag a version as rejected and why; it is no longer the challenger."""
    tag(tracking, POLICY, number, verdict=REJECTED, reasons=reasons)
    if challenger(tracking) == number:
        point(tracking, CHALLENGER, None)


def withdraw(tracking: Tracking, number: int, reason: str) -> None:
    """End a challenge that has no verdict; a version that is gone, or has become champion, keeps what it has."""
    if challenger(tracking) == number:
        point(tracking, CHALLENGER, None)
    if champion(tracking) != number and any(one.number == number for one in versions(tracking, POLICY)):
        tag(tracking, POLICY, number, verdict=VOID, reasons=reason)


def promote(
    tracking: Tracking,
    to: int,
    evidence: Mapping[str, Any],
    actor: str,
    data_root: Path,
    *,
    instead_of: int | None = None,
    data_md5: str | None = None,
) -> Move:
    """Make a version the champion; nothing happens where it is.

    Args:
        evidence: JSON-able; why. actor: who. Both go into the audit trail below `data_root`.
        instead_of: the champion that the evidence compares with. data_md5: the data set that it speaks of.

    Raises StoreError, with nothing changed, for a version that is missing, not ours, not loadable or was rolled back,
    for evidence about another champion or data set, and where another move holds the lock for 30 seconds.
    """
    with locked(data_root):
        with suppress(NothingLoads):  # a promotion is the way out of that
            _settle(tracking, data_root, actor)
        told = standing(history(data_root))
        if champion(tracking) == to == told.champion:
            return Move("promote", to, to, "unchanged")
        check_promotable(tracking, to, told.rolled_back)
        _check_evidence(tracking, told, to, instead_of, data_md5)
        return perform(tracking, data_root, _intent("promote", told.champion, to, evidence, actor, tracking))


def rollback(
    tracking: Tracking, evidence: Mapping[str, Any], actor: str, data_root: Path, *, leaving: int | None = None
) -> Move:
    """Make the champion before this one speak again. The version that leaves is never proposed again.

    Who that is says the trail: the latest earlier champion that was not rolled back and still loads. A rollback after
    a rollback so goes one champion further back.

    Args:
        leaving: the champion that the evidence speaks of; nothing happens where it was rolled back before.

    Begun again after a kill, it completes the rollback that was cut off and goes back no further.

    Raises StoreError, with nothing changed, where there is no such champion.
    """
    with locked(data_root):
        cut_off, told = _settle(tracking, data_root, actor), standing(history(data_root))
        for move in cut_off:
            if move.kind == "rollback" and move.outcome == "recovered":
                return move
        if leaving in told.rolled_back:
            return Move("rollback", leaving, told.champion, "unchanged")
        if leaving not in (None, told.champion):
            raise StoreError(f"{POLICY} version {leaving} is not the champion any more: that is {told.champion}")
        to, passed_over = last_good(tracking, told.earlier[::-1], told) if told.earlier else (None, [])
        if told.champion is None or to is None:
            why = f" ({'; '.join(passed_over)})" if passed_over else ""
            raise StoreError(f"{POLICY} has no previous champion to go back to{why}; promote a version instead")
        intent = _intent("rollback", told.champion, to, evidence, actor, tracking)
        return perform(tracking, data_root, intent | ({"passed_over": passed_over} if passed_over else {}))


def recover(tracking: Tracking, data_root: Path, noticed_by: str = "flow") -> tuple[Move, ...]:
    """Complete a move that was cut off and take up what was moved outside; nothing, at once, where there is neither.

    Args:
        noticed_by: which command or flow this is; it goes into the trail.
    """
    if open_intent(data_root) is None and undisturbed(tracking, data_root):
        return ()
    with locked(data_root):
        return _settle(tracking, data_root, noticed_by)


def _settle(tracking: Tracking, data_root: Path, noticed_by: str) -> tuple[Move, ...]:
    completed = complete(tracking, data_root)
    outside = take_up(tracking, data_root, noticed_by)
    return tuple(move for move in (completed, outside) if move is not None)


def _intent(
    kind: str, source: int | None, to: int, evidence: Mapping[str, Any], actor: str, tracking: Tracking
) -> dict[str, Any]:
    data = version(tracking, POLICY, to).tags.get("data_md5")
    move = {"event": INTENT, "kind": kind, "from": source, "to": to}
    return {**move, "data_md5": data, "evidence": dict(evidence), "actor": actor}


def _check_evidence(tracking: Tracking, told: Standing, to: int, instead_of: int | None, data_md5: str | None) -> None:
    if instead_of is not None and instead_of != told.champion:
        raise StoreError(
            f"the evidence for {POLICY} version {to} compares it with version {instead_of}, but the champion is "
            f"{told.champion}; test it against that one"
        )
    made_from = version(tracking, POLICY, to).tags.get("data_md5") if data_md5 is not None else None
    if data_md5 != made_from:
        raise StoreError(
            f"the evidence is from another data set: it names {data_md5}, {POLICY} version {to} was made from "
            f"{made_from or 'none'}"
        )
