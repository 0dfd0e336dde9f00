"""A simulated business of the user's own, for the pipeline to run on: any object with a few methods."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from iterative_ppo.environments.rollout import Environment, Sampler
from iterative_ppo.errors import ConfigError, IterativePPOError, SourceError
from iterative_ppo.files import content_hash
from iterative_ppo.references import failure, imported

SETTING = "source.path"


@runtime_checkable
class Scripted(Protocol):
    """An environment that also knows who can write the corpus that pi_0 is fine-tuned on."""

    def script(self, seed: int) -> Sampler: ...


def own_environment(reference: str | None) -> Environment:
    """The environment that `module:name` makes: a class or function without arguments, or the object itself.

    Its `start(conversations, seed)` returns sessions, each with `turns`, `closed`, `state` and `step(suggestion)`
    (rollout.Session); `business_of(k)` says whose conversation the k-th is; `script(seed)` (Scripted) is wanted where
    pi_0 is fine-tuned. The same seed must give the same customers, whoever answers them.

    Raises ConfigError where there is none, or it lacks a method.
    """
    if reference is None:
        raise ConfigError(
            f"{SETTING}: source.kind environment needs module:name of an environment of your own, got null"
        )
    found = imported(reference, SETTING)
    try:
        made: Any = found() if callable(found) else found
    except Exception as error:  # the user's own code raises what it likes
        raise ConfigError(f"{SETTING}: {reference} cannot be made without arguments: {failure(error)}") from error
    for method in ("start", "business_of"):
        if not callable(getattr(made, method, None)):
            raise ConfigError(
                f'{SETTING}: {reference} has no method {method!r}; see "A simulator of your own" in docs/operations.md'
            )
    environment: Environment = made
    return environment


@contextmanager
def own_code(reference: str) -> Iterator[None]:
    """For a block in which the environment's own code runs: what that raises is a SourceError with its line."""
    try:
        yield
    except IterativePPOError:
        raise
    except Exception as error:  # the user's own code raises what it likes
        raise SourceError(f"{reference}: {failure(error)}") from error


def version_of(reference: str) -> str:
    """`module:name` with a hash of the module's file, so that what was made by another version is known."""
    imported(reference, SETTING)
    file = getattr(sys.modules[reference.partition(":")[0]], "__file__", None)
    return f"{reference} {content_hash(Path(file))}" if file else reference


def script_of(environment: Environment, seed: int) -> Sampler:
    """Who writes its corpus. Raises ConfigError where nobody does."""
    if not isinstance(environment, Scripted):
        raise ConfigError(
            f"{SETTING}: {type(environment).__name__} has no script(seed) to write a corpus to fine-tune pi_0 on; "
            "add it, or set policy.init to prompt and policy.base_model to a model that talks"
        )
    return environment.script(seed)
