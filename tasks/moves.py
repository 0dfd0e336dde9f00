"""A move of the champion, by the protocol that a kill cannot break.

It appends its opening to the trail, sets `previous`, then `champion`, deletes `challenger`, tags the verdict and
appends that it is done. An opening left without its end is carried out first by whoever comes next, from what it says
and never from the aliases: killed between any two of these steps, `champion` names a version that loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from tasks.audit import ABANDONED, DONE, MOVED, REFUSED, append, history, kind_of, open_intent, standing
from tasks.model_versions import (
    CHALLENGER,
    CHAMPION,
    POLICY,
    PREVIOUS,
    PROMOTED,
    ROLLED_BACK,
    aliases,
    point,
    tag,
    versions,
)
from tasks.tracking import Tracking

Outcome = Literal["done", "recovered", "unchanged", "abandoned"]


@dataclass(frozen=True)
class Move:
    """What became of a move; as text, a line for a person."""

    kind: str
    """promote, rollback, moved outside or refused outside."""
    source: int | None
    target: int | None
    outcome: Outcome
    reason: str = ""

    def __str__(self) -> str:
        stands = f"policy version {self.target} is the champion" if self.target else "there is no champion"
        before = f", after version {self.source}" if self.source else ""
        if self.outcome == "abandoned":
            return f"{self.kind}, cut off before, is undone, for policy version {self.target} was deleted; " + (
                f"champion: {self.source}" if self.source else "there is no champion"
            )
        if self.outcome == "unchanged":
            return f"{stands} already; nothing changed"
        if self.kind == REFUSED:
            return f"{REFUSED}: {self.reason}; {stands}"
        if self.kind == MOVED:
            return f"{MOVED}: {stands}{before}; somebody moved its alias"
        if self.outcome == "recovered":
            return f"{self.kind}, cut off before, is complete: {stands}{before}"
        return f"{self.kind}: {stands}{before}"


def perform(tracking: Tracking, data_root: Path, move: Mapping[str, Any]) -> Move:
    """Carry a move out from its opening to its end. The caller holds the lock, and no other move is open.

    Args:
        move: event, from, to and whatever shall stand in the trail; `previous` and `challenger` are filled in.
    """
    known = versions(tracking, POLICY)
    there = {one.number for one in known}
    earlier = standing(history(data_root)).after(move).earlier
    aims = {
        "previous": next((number for number in earlier if number in there), None),
        "challenger": next((one.number for one in known if CHALLENGER in one.aliases), None),
    }
    event = {"event": move["event"], "id": uuid4().hex}
    opened = append(data_root, {**event, **{key: move[key] for key in move if key != "event"}, **aims})
    _carry_out(tracking, opened, there)
    return _end(data_root, opened, "done")


def complete(tracking: Tracking, data_root: Path) -> Move | None:
    """Carry out the move that was cut off, where there is one. The caller holds the lock."""
    opened = open_intent(data_root)
    if opened is None:
        return None
    there = {one.number for one in versions(tracking, POLICY)}
    if opened["to"] is None or opened["to"] in there:
        _carry_out(tracking, opened, there)
        return _end(data_root, opened, "recovered")
    _undo(tracking, data_root, opened, there)
    return _end(data_root, opened, "abandoned")


def _carry_out(tracking: Tracking, opened: Mapping[str, Any], there: set[int]) -> None:
    """The steps between opening and end; each may be repeated, and only what the opening knew of is touched.

    An alias that names neither what the move found nor its target was moved since: somebody's move, noticed next.
    """
    source, to, kind = opened["from"], opened["to"], kind_of(opened)
    found = {MOVED: to, REFUSED: opened.get("asked")}.get(kind, source)
    now = aliases(tracking, POLICY)
    if now.get(CHAMPION) in (found, to, None):
        previous = opened["previous"] if opened["previous"] in there else None
        _point_where_it_differs(tracking, now, PREVIOUS, previous)
        _point_where_it_differs(tracking, now, CHAMPION, to)
    if now.get(CHALLENGER) in ([to, opened["challenger"]] if kind == "promote" else [to]):
        _point_where_it_differs(tracking, now, CHALLENGER, None)
    if kind in ("promote", MOVED):
        tag(tracking, POLICY, to, verdict=PROMOTED)
    elif kind == "rollback" and source in there:
        tag(tracking, POLICY, source, rolled_back=opened["at"], verdict=ROLLED_BACK)


def _point_where_it_differs(tracking: Tracking, now: Mapping[str, int], alias: str, number: int | None) -> None:
    if now.get(alias) != number:
        point(tracking, alias, number)


def _undo(tracking: Tracking, data_root: Path, opened: Mapping[str, Any], there: set[int]) -> None:
    """Somebody deleted the target since: back to where the move began, as far as that is there."""
    stands = standing(history(data_root))
    now = aliases(tracking, POLICY)
    if now.get(CHAMPION) in (opened["to"], None) and opened["from"] in there:
        point(tracking, CHAMPION, opened["from"])
    previous = next((number for number in stands.earlier if number in there), None)
    _point_where_it_differs(tracking, now, PREVIOUS, previous)


def _end(data_root: Path, opened: Mapping[str, Any], outcome: Outcome) -> Move:
    append(data_root, {"event": ABANDONED if outcome == "abandoned" else DONE, "id": opened["id"]})
    return Move(kind_of(opened), opened["from"], opened["to"], outcome, opened.get("reason", ""))
