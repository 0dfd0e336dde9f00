"""What commands of `ippo` share: a params file and overrides, the configuration that they make, who asks, tables."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from iterative_ppo.config import Config, load_config

Params = Annotated[
    Path | None, typer.Option("--params", "-p", help="A params.yaml; without it ./params.yaml, else the defaults.")
]
WIDE = 300
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON.")]
Sets = Annotated[list[str] | None, typer.Option("--set", "-s", help="Override one key: section.key=value. Repeatable.")]


def configured(params: Path | None, sets: list[str] | None, **more: Any) -> tuple[Config, str | None, dict[str, Any]]:
    """The configuration of a command, and the same as flow parameters (a file's path and overrides).

    Prefect stores a flow's parameters, so an address that is a secret goes by the environment instead.
    """
    file = params or (Path("params.yaml") if Path("params.yaml").exists() else None)
    overrides = [*(sets or []), *(f"{k.replace('__', '.')}={_literal(v)}" for k, v in more.items() if v is not None)]
    config = load_config(file, overrides)
    pairs = as_parameters(overrides)
    if address := pairs.pop("notify.url", None):
        os.environ["IPPO_NOTIFY_URL"] = str(address)
    return config, str(file) if file else None, pairs


def as_parameters(overrides: Iterable[str]) -> dict[str, Any]:
    """Overrides of the command line as a flow's."""
    return {key: _yaml(value) for key, _, value in (text.partition("=") for text in overrides)}


def _literal(value: Any) -> str:
    """A text as YAML that is this text, whatever YAML would make of it."""
    return json.dumps(str(value)) if isinstance(value, str | Path) else str(value)


def _yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


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
