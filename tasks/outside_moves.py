"""Moves of the champion's alias that nobody made here: people promote in MLflow's own UI.

The alias beside the trail tells them. A version that could be promoted here is taken up as champion; any other is
refused, and the last champion of the trail that loads stands. Both go into the trail.
"""

from __future__ import annotations

from pathlib import Path

from iterative_ppo.errors import StoreError
from tasks.audit import MOVED, REFUSED, Standing, audit_file, history, standing
from tasks.mlflow_store import shown
from tasks.model_versions import CHAMPION, POLICY, PREVIOUS, aliases, check_promotable, registered, versions
from tasks.moves import Move, perform
from tasks.tracking import Tracking


class NothingLoads(StoreError):  # noqa: N818 (a finding)
    """Champions of the trail exist, and none of them loads."""


def undisturbed(tracking: Tracking, data_root: Path) -> bool:
    """Whether the alias names the champion that the trail names, and that version is there."""
    named = [one.number for one in versions(tracking, POLICY) if CHAMPION in one.aliases]
    champion = standing(history(data_root)).champion
    return named == ([] if champion is None else [champion])


def take_up(tracking: Tracking, data_root: Path, noticed_by: str) -> Move | None:
    """Accept or refuse what was moved outside; None where nothing was. The caller holds the lock, no move is open.

    Raises NothingLoads, with nothing changed, where no champion is left to go back to though some exist, and StoreError
    where the store has never heard of a policy though the trail tells of champions: it is another one.
    """
    if undisturbed(tracking, data_root):
        return None
    told = told_of(tracking, data_root)
    asked = aliases(tracking, POLICY).get(CHAMPION)
    if asked is None:
        reason: str | None = f"the alias {CHAMPION} of {POLICY} was deleted"
    else:
        reason = _objection(tracking, asked, told)
    if asked is not None and reason is None:
        source = told.champion or _trailless(tracking, asked, told)
        return perform(tracking, data_root, {"event": MOVED, "from": source, "to": asked, "noticed_by": noticed_by})
    to, passed_over = last_good(tracking, told.line, told)
    refusal = {"event": REFUSED, "from": told.champion, "asked": asked, "to": to}
    reasons = "; ".join([str(reason), *passed_over])
    return perform(tracking, data_root, {**refusal, "reason": reasons, "noticed_by": noticed_by})


def told_of(tracking: Tracking, data_root: Path) -> Standing:
    """What the trail tells. Raises StoreError where that is of champions, and the store has never heard of a policy."""
    told = standing(history(data_root))
    if told.line and not registered(tracking, POLICY):
        raise StoreError(
            f"{shown(tracking.uri)}: has no {POLICY}, but {audit_file(data_root)} tells of champion {told.champion}: "
            "another store, by tracking.uri, MLFLOW_TRACKING_URI or the working folder? Name or restore the right one"
        )
    return told


def last_good(tracking: Tracking, line: tuple[int, ...], told: Standing) -> tuple[int | None, list[str]]:
    """The latest of some champions that could be promoted now, and why later ones cannot; None where all are deleted.

    Raises NothingLoads where some exist and none loads: the store's files are in trouble, not the choice of a version.
    """
    there = {one.number for one in versions(tracking, POLICY)}
    objections: list[str] = []
    for number in dict.fromkeys(reversed(line)):
        objection = _objection(tracking, number, told)
        if objection is None:
            return number, objections
        objections.append(objection)
    if there & set(line):
        raise NothingLoads(f"no earlier champion loads ({'; '.join(objections)}); restore the store's files")
    return None, objections


def _objection(tracking: Tracking, number: int, told: Standing) -> str | None:
    try:
        check_promotable(tracking, number, told.rolled_back)
    except StoreError as error:
        return str(error)
    return None


def _trailless(tracking: Tracking, champion: int, told: Standing) -> int | None:
    """Where the trail is new, or was lost, MLflow's alias `previous` is all that tells who spoke before."""
    before = aliases(tracking, POLICY).get(PREVIOUS)
    return before if before not in (None, champion) and _objection(tracking, before, told) is None else None
