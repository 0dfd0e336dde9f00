"""`make bench-run`: what `make run` costs and reaches, once, on this machine as it is."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.results_file import figure, write
from iterative_ppo.files import read_json

WORK = Path(__file__).parent / "work" / "run"


def figures(closing: dict[str, Any], wall: float, cpu: float, peak_gib: float) -> list[dict[str, Any]]:
    """The run's cost beside its limits, and its closing comparison."""
    first, last = closing["champion"], closing["challenger"]
    before, after = (arm["successes"] / arm["conversations"] for arm in (first, last))
    return [
        figure("make run, wall minutes", wall / 60, None, "about 10", wall <= 630, cpu_seconds=cpu),
        figure("make run, CPU minutes", cpu / 60),
        figure("make run, peak memory of a process, GiB", peak_gib, None, "<= 4", peak_gib <= 4),
        figure("make run, pi_0's success on fresh customers", before),
        figure("make run, the last champion's success on fresh customers", after),
        figure("make run, gain", closing["gain"], (closing["gain_low"], closing["gain_high"])),
        figure("make run, p of the gain", closing["p_value"], None, "< .01", closing["p_value"] < 0.01),
    ]


def main() -> None:
    """Run `ippo run` in a folder of its own."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "flows.command_line", "run"], cwd=WORK, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    closing = read_json(WORK / "data" / "rounds" / "closing" / "closing.json")
    cpu = used.ru_utime + used.ru_stime
    write("bench-run", figures(closing, time.monotonic() - began, cpu, used.ru_maxrss / 2**20))


if __name__ == "__main__":
    main()
