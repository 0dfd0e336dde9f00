"""A figure of `make bench-q` by part, method and seed, measured once and kept in benchmarks/work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results_file import averaged
from iterative_ppo.config import Config
from iterative_ppo.files import fingerprint, read_json, write_json

WORK = Path(__file__).parent / "work" / "q"
TARGETS = ("monte_carlo", "one_step", "td_lambda", "sarsa", "fqe", "retrace", "lstd_q", "archer")
Row = dict[str, Any]
FITTED = ("seed", "outcomes", "gamma", "data", "policy", "credit", "q")
"""Sections of the configuration that a fit of Q depends on."""


def sections(config: Config, *names: str) -> dict[str, Any]:
    """Those of a configuration by which a cell is known, so that a changed default is measured anew."""
    return config.model_dump(mode="json", include=set(names))


def cell(part: str, method: str, seed: int, settings: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What one method gave with one seed, done once under these settings."""
    place = WORK / part / f"{method.replace(' ', '-').replace(chr(39), '')}-{seed}-{fingerprint(settings)}.json"
    if not place.exists():
        began = time.process_time()
        found = work()
        write_json(place, {**found, "cpu_seconds": time.process_time() - began})
        print(f"{part}, {method}, seed {seed}: {found}", flush=True)
    found = read_json(place)
    return dict(found)


def row(name: str, found: Sequence[dict[str, Any]], key: str, **judged: Any) -> Row:
    """The mean of one figure over seeds with its interval."""
    cpu = float(np.mean([f["cpu_seconds"] for f in found]))
    return averaged(name, [f[key] for f in found], list(range(len(found))), cpu_seconds=cpu, **judged)
