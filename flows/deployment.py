"""`ippo deploy`: register the deployments of prefect.yaml on the team's Prefect server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from iterative_ppo.errors import ConfigError, StoreError

PROJECT = Path(__file__).resolve().parents[1]
POOL = "iterative-ppo"


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


def _prefect(*arguments: str) -> None:
    home = {"IPPO_HOME": str(PROJECT), **os.environ}
    done = subprocess.run([sys.executable, "-m", "prefect", *arguments], cwd=PROJECT, env=home, check=False)
    if done.returncode:
        raise StoreError(f"prefect {' '.join(arguments)} failed (exit {done.returncode}); its own words are above")
