"""The commands about who speaks: `ippo promote`, `rollback`, `approve`, `history` and `lineage`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.options import AsJson, Params, Sets, configured, person, show
from iterative_ppo.config import Config

if TYPE_CHECKING:
    from tasks.tracking import Tracking

Reason = Annotated[str, typer.Option(help="Why; it goes into the audit trail.")]


def add_to(app: typer.Typer) -> None:
    """Add these commands to `ippo`."""
    for command in (promote, rollback, approve, history, lineage):
        app.command()(command)


def promote(
    version: Annotated[int, typer.Argument(help="Version of the registered policy.")],
    reason: Reason,
    params: Params = None,
    sets: Sets = None,
) -> None:
    """Make a version the champion, by hand."""
    config, store = _opened(params, sets, "ippo promote")
    from tasks import registry

    _done(config, store, registry.promote(store, version, {"reason": reason}, person(), config.data.root))


def rollback(
    reason: Reason,
    leaving: Annotated[
        int | None,
        typer.Option("--from", help="Only where this version is the champion; begun again, it is done once."),
    ] = None,
    params: Params = None,
    sets: Sets = None,
) -> None:
    """Make the champion before this one speak again. The version that leaves is never proposed again."""
    config, store = _opened(params, sets)
    from flows.champions import settle
    from tasks import audit, registry

    if audit.open_intent(config.data.root) is None:  # else it may be this rollback that was cut off
        settle(config, store, "ippo rollback")
    evidence = {"reason": reason}
    _done(config, store, registry.rollback(store, evidence, person(), config.data.root, leaving=leaving))


def approve(
    reason: Annotated[str, typer.Option(help="Why; it goes into the audit trail.")] = "",
    reject: Annotated[str | None, typer.Option(help="Decline instead, and why.")] = None,
    params: Params = None,
    sets: Sets = None,
) -> None:
    """Carry out, or decline, what waits for a person (see `ippo status`); the next night goes on from there."""
    config, store = _opened(params, sets, "ippo approve")
    from tasks import approvals
    from tasks.state import load_state

    state = load_state(config.data.root)
    if reject is not None:
        typer.echo(approvals.decline(state, reject, person(), config.data.root))
    else:
        _done(config, store, approvals.approve(store, state, reason, person(), config.data.root))


def history(as_json: AsJson = False, params: Params = None, sets: Sets = None) -> None:
    """The audit trail: every promotion and rollback, who or what decided it, when and why."""
    config, _ = _opened(params, sets, "ippo history")
    from flows.trail_views import history_table
    from tasks.audit import history as told

    records = told(config.data.root)
    if as_json:
        typer.echo(json.dumps(records, indent=2, ensure_ascii=False))
    else:
        show(history_table(records))


def lineage(
    version: Annotated[str, typer.Argument(help="A version of the policy, or an alias.")] = "champion",
    as_json: AsJson = False,
    params: Params = None,
    sets: Sets = None,
) -> None:
    """Where a policy comes from: Q, data, source files, the policy before it, back to pi_0; and its A/B evidence."""
    config, store = _opened(params, sets, "ippo lineage")
    from flows.trail_views import lineage_tree
    from tasks import lineage as lines
    from tasks import registry

    number = int(version) if version.isdecimal() else registry.resolve(store, version)
    found = lines.lineage(config, store, number)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        show(lineage_tree(found))


def _opened(params: Path | None, sets: list[str] | None, noticed_by: str | None = None) -> tuple[Config, Tracking]:
    """Configuration and store; with `noticed_by`, what was cut off or moved outside is taken up first."""
    config, _, _ = configured(params, sets)
    from flows.champions import settle
    from tasks import tracking

    store = tracking.open_tracking(config)
    if noticed_by:
        settle(config, store, noticed_by)
    return config, store


def _done(config: Config, store: Tracking, move: Any) -> None:
    """Say what became of a move, and end the A/B test that it makes void."""
    from flows.champions import end_void_test
    from tasks.state import load_state

    typer.echo(str(move))
    end_void_test(config, store, load_state(config.data.root))
