"""Python of the user's own, named in a setting as `module:name`."""

from __future__ import annotations

import importlib
from typing import Any

from iterative_ppo.errors import ConfigError


def imported(reference: str, setting: str) -> Any:
    """What `module:name` stands for. Raises ConfigError, naming the setting, where it is not there."""
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{setting}: {reference!r} cannot be imported ({error}); expected module:name, the module in the working "
            "folder or on PYTHONPATH"
        ) from None
