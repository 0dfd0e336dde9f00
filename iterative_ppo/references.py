"""Python of the user's own, named in a setting as `module:name`."""

from __future__ import annotations

import importlib
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from iterative_ppo.errors import ConfigError

_PROJECT = Path(__file__).resolve().parents[1]
NOT_THE_USERS = (
    *(str(_PROJECT / name) for name in ("iterative_ppo", "tasks", "flows")),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    "<frozen",
)
"""How the names of files begin that are ours, Python's or a library's."""


def imported(reference: str, setting: str) -> Any:
    """What `module:name` stands for. Raises ConfigError, naming the setting, where it is not there or fails."""
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"{setting}: expected module:name, found {reference!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{setting}: {reference!r} cannot be imported ({error}); expected module:name, the module in the working "
            "folder or on PYTHONPATH"
        ) from None
    except Exception as error:  # the user's own code raises what it likes
        raise ConfigError(f"{setting}: {reference!r} cannot be imported: {failure(error)}") from error


def failure(error: Exception) -> str:
    """What an error of the user's own code says, and the last line of that code on its way."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(NOT_THE_USERS)]
    return f"{said} ({own[-1].filename}, line {own[-1].lineno})" if own else said
