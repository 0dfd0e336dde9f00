"""`ippo deploy`: register the deployments of prefect.yaml on the team's Prefect server."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from iterative_ppo.errors import ConfigError, StoreError

PROJECT = Path(__file__).resolve().parents[1]
POOL, WATCH = "iterative-ppo", "iterative-ppo: mark lost runs as crashed"


def deploy_all(params: Path | None) -> None:
    """Create the process work pool where it is missing, then deploy. Raises ConfigError or StoreError."""
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError(
            "PREFECT_API_URL is not set: start a server (`prefect server start`), then "
            "`export PREFECT_API_URL=http://127.0.0.1:4200/api` and deploy again"
        )
    _prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
    options = ["--param", f"params_file={params.resolve()}"] if params else []
    _prefect("--no-prompt", "deploy", "--all", *options)
    watch_for_lost_runs()


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
    home = {"IPPO_HOME": str(PROJECT), **os.environ}
    done = subprocess.run([sys.executable, "-m", "prefect", *arguments], cwd=PROJECT, env=home, check=False)
    if done.returncode:
        raise StoreError(f"prefect {' '.join(arguments)} failed (exit {done.returncode}); its own words are above")
