"""Promotions and rollbacks, killed between any two writes or begun at once: what tests/test_moves.py proves."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.results_file import figure

PROOFS = Path(__file__).parents[1] / "tests" / "test_moves.py"
KILLED = "test_killed_between_any_two_writes_twenty_times"
AT_ONCE = "test_two_promotions_at_once_come_one_after_the_other"


class Counts:
    """A pytest plugin: what passed, failed and took how long, by test function and scenario."""

    def __init__(self) -> None:
        self.passed: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            named = re.search(r"::(\w+)(?:\[(.*)-\d+\])?", report.nodeid)
            assert named is not None
            (self.passed if report.passed else self.failed)[": ".join(filter(None, named.groups()))] += 1


def rows() -> Iterator[dict[str, object]]:
    """How often the champion was lost or the trail untrue, over all points of a kill, each 20 times; and at once."""
    began, counts = time.process_time(), Counts()
    arguments = ["-m", "", "-q", "-k", f"{KILLED} or {AT_ONCE}", "-p", "no:cacheprovider", str(PROOFS)]
    pytest.main(arguments, plugins=[counts])
    names = {KILLED: "moves that a kill anywhere spoilt", AT_ONCE: "promotions at once that spoilt each other"}
    ran = sorted({*counts.passed, *counts.failed})
    cpu = (time.process_time() - began) / max(1, len(ran))
    for name in ran:
        test, _, scenario = name.partition(": ")
        failed, runs = counts.failed[name], counts.passed[name] + counts.failed[name]
        what = f"{names[test]}{f', {scenario}' if scenario else ''} (of {runs} times)"
        yield figure(what, failed, None, "0 of 20", failed == 0 and runs == 20, cpu_seconds=cpu)
