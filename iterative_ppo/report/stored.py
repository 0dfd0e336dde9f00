"""JSON files of a run, read with care: a file that is not there is None or empty, a damaged one is a StoreError."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iterative_ppo.errors import StoreError
from iterative_ppo.evaluation.ab_test import ABTest, Arm
from iterative_ppo.evaluation.gate import Decision
from iterative_ppo.files import read_json

ARMS = ("champion", "challenger")
TEST_NUMBERS = ("alpha", "p_value", "gain", "gain_low", "gain_high")


def optional(path: Path) -> Any:
    """The content of a JSON file, or None where there is none."""
    return read_json(path) if path.exists() else None


@contextmanager
def shaped(path: Path) -> Iterator[None]:
    """Turn a value of another shape than expected into an error that names its file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise StoreError(f"{path}: not what a run writes ({reason}); restore it or remove it") from None


def part(path: Path, key: str) -> dict[str, Any]:
    """A section of a JSON file; empty where there is no file."""
    values = optional(path)
    with shaped(path):
        return dict(values[key]) if values is not None else {}


def numbers(path: Path, key: str | None = None) -> dict[str, float]:
    """The numbers of a JSON file, or of a section of it; empty where there is no file."""
    if key is not None:
        return finite(part(path, key))
    values = optional(path)
    with shaped(path):
        return finite(values) if values is not None else {}


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are numbers."""
    return {
        str(key): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def decision_of(value: Mapping[str, Any] | None) -> Decision | None:
    """A decision as `Decision.as_dict` wrote it."""
    return Decision(value["verdict"], tuple(map(str, value["reasons"]))) if value else None


def test_of(value: Mapping[str, Any] | None) -> ABTest | None:
    """An A/B test as `ABTest.as_dict` wrote it. Raises ValueError where its counts cannot be."""
    if not value:
        return None
    champion, challenger = (Arm(int(value[name]["successes"]), int(value[name]["conversations"])) for name in ARMS)
    for arm in (champion, challenger):
        if not (0 <= arm.successes <= arm.conversations and arm.conversations):
            raise ValueError(f"{arm.successes} successes in {arm.conversations} conversations cannot be")
    alpha, p_value, gain, low, high = (float(value[name]) for name in TEST_NUMBERS)
    return ABTest(champion, challenger, alpha, p_value, gain, low, high)


def label(value: Any) -> str | None:
    """A name or a version number as text."""
    return None if value is None else str(value)
