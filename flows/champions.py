"""What a night does about the champion before its own work: outside moves, void tests, alarms, and people's answers."""

from __future__ import annotations

import logging

from iterative_ppo.config import Config
from iterative_ppo.errors import StoreError
from tasks import approvals, audit, experiments, notify, registry, watch
from tasks.state import Approval, NightState, load_state
from tasks.tracking import Tracking

log = logging.getLogger("iterative_ppo.champions")


def settle(config: Config, store: Tracking, noticed_by: str) -> tuple[registry.Move, ...]:
    """Every command and flow begins so: a move that was cut off is completed, what was moved outside is taken up.

    Args:
        noticed_by: which command or flow this is.
    """
    moves = registry.recover(store, config.data.root, noticed_by)
    for move in moves:
        log.warning("%s", move)
        notify.tell(config, "champion", move.kind, f"{move} (noticed by {noticed_by})")
    if moves:
        end_void_test(config, store, load_state(config.data.root))
    return moves


def end_void_test(config: Config, store: Tracking, state: NightState) -> str | None:
    """Where the running A/B test tells nothing any more: withdraw its challenger, record and tell why, and return it.

    The state is left to the next night.
    """
    if state.experiment is None:
        return None
    there = {one.number for one in registry.versions(store, registry.POLICY)}
    reason = experiments.void(config.data.root, state.experiment, there)
    if reason is not None and "void" not in experiments.verdicts(config.data.root, state.experiment):
        registry.withdraw(store, state.experiment.challenger, reason)
        log.warning("the A/B test of round %d is void: %s", state.round, reason)
        notify.tell(config, "verdict", f"round {state.round}: A/B test void", reason)
        experiments.end(config.data.root, state.experiment, {"verdict": "void", "reasons": [reason]}, {})
    return reason


def watched(config: Config, store: Tracking, state: NightState) -> NightState:
    """Raise alarms about the champion; with `gate.promotion: automatic` they roll it back, else a person is asked."""
    found = watch.raised(config, state)
    if found is None:
        return state
    said = "\n".join(map(str, found.alarms))
    if not watch.known(config, found):
        log.error("%s: %s", found.id, said)
        notify.tell(config, "alarm", found.id, said)
        watch.note(config, found)
    if not audit.standing(registry.history(config.data.root)).earlier:
        return state
    if config.gate.promotion == "automatic":
        _roll_back(config, store, found)
        return state
    request = Approval(
        id=found.id,
        kind="rollback",
        version=found.version,
        reasons=tuple(map(str, found.alarms)),
        evidence=found.evidence(),
        resume=state.phase,
    )
    if state.approval is not None or approvals.refusal(registry.history(config.data.root), request):
        return state
    return asked(config, state, request)


def _roll_back(config: Config, store: Tracking, found: watch.Raised) -> None:
    try:
        move = registry.rollback(store, found.evidence(), "alarm", config.data.root, leaving=found.version)
    except StoreError as error:  # the night goes on: a better policy may come of it
        log.error("%s: %s", found.id, error)
        notify.tell(config, "alarm", f"{found.id} failed", str(error))
        return
    notify.tell(config, "alarm", str(move), "\n".join(map(str, found.alarms)))


def asked(config: Config, state: NightState, request: Approval) -> NightState:
    """The state in which a person's answer is awaited; they are told."""
    notify.tell(config, "approval", request.id, "\n".join([*request.reasons, approvals.command(request)]))
    return state.advance(phase="approve", approval=request)
