"""`ippo deploy`: register the deployments of prefect.yaml on the team's Prefect server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from iterative_ppo.config import load_config
from iterative_ppo.errors import ConfigError, StoreError

PROJECT = Path(__file__).resolve().parents[1]
POOL, WATCH = "iterative-ppo", "iterative-ppo: mark lost runs as crashed"


def deploy_all(params: Path | None, overrides: dict[str, Any]) -> None:
    """Create the process work pool where it is missing, then deploy, each with its parameters.

    Args:
        params: a params.yaml instead of the one that prefect.yaml names, if any.
        overrides: `{"section.key": value}`, over those of prefect.yaml.

    Raises ConfigError or StoreError.
    """
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError(
            "PREFECT_API_URL is not set: start a server (`prefect server start`), then "
            "`export PREFECT_API_URL=http://127.0.0.1:4200/api` and deploy again"
        )
    given = {one["name"]: _parameters(one.get("parameters") or {}, params, overrides) for one in _deployments()}
    _prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
    for name, parameters in given.items():  # by itself: of parameters that come with `--all`, Prefect takes none
        _prefect("--no-prompt", "deploy", "--name", name, "--params", json.dumps(parameters))
    watch_for_lost_runs()


def _deployments() -> list[dict[str, Any]]:
    """Those of prefect.yaml. Raises ConfigError where a worker would not find their flows."""
    told = yaml.safe_load((PROJECT / "prefect.yaml").read_text(encoding="utf-8"))
    deployments: list[dict[str, Any]] = told["deployments"]
    for one in deployments:
        file = one["entrypoint"].partition(":")[0]
        if not (_home() / file).is_file():
            raise ConfigError(
                f"IPPO_HOME {_home()}: has no {file}, so no night could run; `export IPPO_HOME={PROJECT}`"
            )
    return deployments


def _parameters(own: dict[str, Any], params: Path | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """A deployment's own with what was given over them; checked now, for the night is alone with its errors."""
    file = str(params.resolve()) if params else own.get("params_file")
    both = {**(own.get("overrides") or {}), **overrides}
    load_config(_home() / file if file else None, both)
    return {**own, "params_file": file, "overrides": both}


def _home() -> Path:
    """Where the worker runs the nights."""
    return Path(os.environ.get("IPPO_HOME") or PROJECT).absolute()


def watch_for_lost_runs() -> None:
    """Mark runs whose heartbeat has stopped as crashed: a run lost with its worker would hold the one slot for ever.

    https://docs.prefect.io/v3/advanced/detect-zombie-flows
    """
    from prefect.automations import Automation
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import EventTrigger, Posture

    beat = "prefect.flow-run.heartbeat"
    crash = ChangeFlowRunState.model_validate({"state": StateType.CRASHED, "message": "No heartbeat: worker lost"})
    ended = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    try:
        _: Any = Automation.read(name=WATCH)
    except ValueError:
        Automation(
            name=WATCH,
            description="A flow run without a heartbeat for 90 seconds is marked as crashed.",
            trigger=EventTrigger(
                after={beat},
                expect={beat, *ended},
                match={"prefect.resource.id": ["prefect.flow-run.*"]},
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=90),
            ),
            actions=[crash],
        ).create()


def _prefect(*arguments: str) -> None:
    home = {**os.environ, "IPPO_HOME": str(_home())}
    done = subprocess.run([sys.executable, "-m", "prefect", *arguments], cwd=PROJECT, env=home, check=False)
    if done.returncode:
        raise StoreError(f"prefect {' '.join(arguments)} failed (exit {done.returncode}); its own words are above")
