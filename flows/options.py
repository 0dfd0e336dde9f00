"""What commands of `ippo` share: a params file and overrides, the configuration that they make, who asks, tables."""

from __future__ import annotations

import getpass
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from iterative_ppo.config import Config, load_config, read_overrides
from tasks.mlflow_store import is_sqlite

Params = Annotated[
    Path | None, typer.Option("--params", "-p", help="A params.yaml; without it ./params.yaml, else the defaults.")
]
WIDE = 300
ADDRESSES = {"notify.url": "IPPO_NOTIFY_URL", "tracking.uri": "MLFLOW_TRACKING_URI", "data.remote": "IPPO_DATA_REMOTE"}
"""Settings that may be secrets, and the environment variable that wins over each."""
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON.")]
Sets = Annotated[list[str] | None, typer.Option("--set", "-s", help="Override one key: section.key=value. Repeatable.")]


def configured(params: Path | None, sets: list[str] | None, **more: Any) -> tuple[Config, str | None, dict[str, Any]]:
    """The configuration of a command, and the same as flow parameters (a file's path and overrides).

    Prefect stores a flow's parameters, so an address that is a secret goes by the environment instead.
    """
    file = params or (Path("params.yaml") if Path("params.yaml").exists() else None)
    overrides = [*(sets or []), *(f"{k.replace('__', '.')}={_literal(v)}" for k, v in more.items() if v is not None)]
    config = load_config(file, overrides)
    pairs, secrets = as_parameters(overrides)
    for variable, address in secrets.items():
        os.environ[variable] = os.environ.get(variable) or address
    return config, str(file) if file else None, pairs


def as_parameters(overrides: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Overrides of the command line as a flow's; apart from them secret addresses, by environment variable."""
    pairs: dict[str, Any] = {}
    for key, value in read_overrides(overrides):
        whole = isinstance(value, dict) and any(address.startswith(f"{key}.") for address in ADDRESSES)
        pairs |= {f"{key}.{name}": one for name, one in value.items()} if whole else {key: value}
    secret = [key for key in ADDRESSES if pairs.get(key) and _is_secret(key, str(pairs[key]))]
    return pairs, {ADDRESSES[key]: str(pairs.pop(key)) for key in secret}


def _is_secret(key: str, address: str) -> bool:
    """A webhook's is in any case; others may hold a password before the host, or among their settings."""
    return key == "notify.url" or (not is_sqlite(address) and re.search("://.*[@?]", address) is not None)


def _literal(value: Any) -> str:
    """A text as YAML that is this text, whatever YAML would make of it."""
    return json.dumps(str(value)) if isinstance(value, str | Path) else str(value)


def person() -> str:
    """Who sits at the command line, as far as the system knows."""
    try:
        return f"{getpass.getuser()}, command line"
    except (KeyError, OSError):  # a container without a user database
        return "command line"


def show(what: Any) -> None:
    """Print a table or a tree, as wide as the terminal; in a pipe or a file wide enough that a row stays a line."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=WIDE)).print(what)
