"""What a block of training costs in CPU seconds and memory; standard library alone, so that every peer can use it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1024.0


def resident_mib(field: str) -> float:
    """A memory field of this process in MiB: `VmRSS` now, `VmHWM` its peak (Linux, proc(5))."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / MIB for line in status.splitlines() if line.startswith(f"{field}:"))


@contextmanager
def training_cost() -> Iterator[dict[str, float]]:
    """Fill a dict with CPU seconds of the whole process, and resident memory before and at its peak, in MiB.

    The peak that the system keeps is set back first, so that loading's own peak does not hide training's.
    """
    cost: dict[str, float] = {}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    cost["before_mib"] = resident_mib("VmRSS")
    began = time.process_time()
    yield cost
    cost["cpu_seconds"] = time.process_time() - began
    cost["peak_mib"] = resident_mib("VmHWM")
