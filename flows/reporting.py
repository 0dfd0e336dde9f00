"""The state in a few lines, and the report as a file and as an MLflow artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.champions import end_void_test, settle
from iterative_ppo.config import Config
from iterative_ppo.evaluation.convergence import Convergence
from tasks import approvals, registry, tracking
from tasks.state import load_state


def status_lines(config: Config) -> Iterator[str]:
    """What `ippo status` prints."""
    store = tracking.open_tracking(config)
    settle(config, store, "ippo status")
    state = load_state(config.data.root)
    champion = registry.champion(store)
    yield f"champion: {f'policy version {champion}' if champion else 'none yet (`ippo run` starts with pi_0)'}"
    yield f"round {state.round}, phase {state.phase}"
    if reason := end_void_test(config, store, state):
        yield f"the A/B test is void: {reason}; the next night goes on from there"
    elif state.experiment:
        e = state.experiment
        yield f"A/B test of policy version {e.challenger} against version {e.champion}: see `ippo abtest`"
    if state.approval and not reason:
        answered = approvals.answer(registry.history(config.data.root), state.approval)
        yield answered or f"waits for you: {approvals.command(state.approval)}"
        yield from () if answered else state.approval.reasons
    for record in state.rounds:
        yield _round_line(record)
        if distance := record.get("distance"):
            nats = distance.get("held_out_nats_a_token", float("nan"))
            first = "cloned from the log" if distance.get("cloned", 1.0) else "the base model as it is"
            yield f"the first policy, {first}, is {nats:.2f} nats a token from the log on held-out conversations"
    if state.phase == "finished" and state.rounds and (ended := state.rounds[-1].get("convergence")):
        yield f"converged: {Convergence(**ended).words}"


def _round_line(record: Mapping[str, Any]) -> str:
    """A round in a line, as far as it has come."""
    line = f"round {record['round']}: policy {record.get('challenger', '-')} from {record.get('champion', '-')}"
    gate = record.get("offline")
    line += f", offline {gate['verdict']}" if gate else ", not gated yet"
    if decision := record.get("decision"):
        return f"{line}, A/B {decision['verdict']}: {decision['reasons'][0]}"
    if gate and gate["verdict"] == "reject":
        return f"{line}: {gate['reasons'][0]}"
    return f"{line}, A/B void: {record['void']}" if "void" in record else line


def publish(config: Config, out: Path) -> Path:
    """Write the report, and put it on the last round's run in MLflow, which stays as finished as it was."""
    from iterative_ppo.report.page import write_report

    path = write_report(config.data.root, out)
    state = load_state(config.data.root)
    if state.rounds:
        store = tracking.open_tracking(config)
        if run := store.find_round(state.rounds[-1]["round"]):
            store.log(run, artifacts=[path])
    return path
