"""What waits for a person. The answer is in the audit trail: the move that was approved, or that it was declined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iterative_ppo.errors import StoreError
from tasks import experiments, registry
from tasks.audit import ABANDONED, INTENT, append, history, locked, standing
from tasks.state import Approval, Experiment, NightState
from tasks.tracking import Tracking

DECLINED = "declined"


def approve(tracking: Tracking, state: NightState, reason: str, actor: str, data_root: Path) -> registry.Move:
    """Carry out what waits, at once; repeated, it changes nothing.

    Raises StoreError, with nothing changed, where nothing waits, it was declined, its A/B test is void, or it cannot be
    carried out any more.
    """
    request = _waiting(state)
    if _declined(history(data_root), request):
        raise StoreError(f"{request.id} was declined before; the next night goes on from there")
    evidence = request.evidence | {"approval": {"id": request.id, "reason": reason}}
    if request.kind == "rollback":
        return registry.rollback(tracking, evidence, actor, data_root, leaving=request.version)
    tested = Experiment.model_validate(evidence["experiment"])
    ended = experiments.ended(data_root, tested)
    if ended is not None and ended["verdict"] == "void":
        raise StoreError(
            f"{request.id}: its A/B test is void: {ended['reasons'][0]}; the next night goes on from there"
        )
    return registry.promote(
        tracking,
        request.version,
        evidence,
        actor,
        data_root,
        instead_of=tested.champion,
        data_md5=evidence["data_md5"],
    )


def decline(state: NightState, reason: str, actor: str, data_root: Path) -> str:
    """Record that what waits shall not be; repeated, it changes nothing. Raises StoreError where it has been done."""
    request = _waiting(state)
    with locked(data_root):
        records = history(data_root)
        if approved(records, request):
            raise StoreError(f"{request.id} was approved before and is done; `ippo rollback` takes a promotion back")
        if not _declined(records, request):
            record = {"event": DECLINED, "request": request.id, "kind": request.kind, "version": request.version}
            append(data_root, {**record, "reason": reason, "actor": actor})
    return f"declined: {request.id}; the next night goes on from there"


def approved(records: Sequence[Mapping[str, Any]], request: Approval) -> bool:
    """Whether the move that was asked for is done; one that a kill cut off is going to be.

    A rollback is done, by whatever way, where its version is champion no more.
    """
    if request.kind == "rollback" and standing(records).champion != request.version:
        return True
    abandoned = {record.get("id") for record in records if record.get("event") == ABANDONED}
    moves = [record for record in records if record.get("event") == INTENT and record["id"] not in abandoned]
    return any(move["evidence"].get("approval", {}).get("id") == request.id for move in moves)


def refusal(records: Sequence[Mapping[str, Any]], request: Approval) -> str | None:
    """Who declined and why, or None."""
    found = _declined(records, request)
    return f"declined by {found['actor']}: {found['reason']}" if found else None


def answer(records: Sequence[Mapping[str, Any]], request: Approval) -> str | None:
    """What was answered, in words, until the next night goes on from there; None while it waits."""
    if approved(records, request):
        return f"approved: {request.id}; the next night goes on from there"
    declined = refusal(records, request)
    return f"{declined}; the next night goes on from there" if declined else None


def command(request: Approval) -> str:
    """What a person may do."""
    return f'`ippo approve` or `ippo approve --reject "why"` ({request.id})'


def _declined(records: Sequence[Mapping[str, Any]], request: Approval) -> Mapping[str, Any] | None:
    return next((r for r in records if r.get("event") == DECLINED and r.get("request") == request.id), None)


def _waiting(state: NightState) -> Approval:
    if state.approval is None:
        raise StoreError(f"nothing waits for an approval (phase {state.phase}); see `ippo status`")
    return state.approval
