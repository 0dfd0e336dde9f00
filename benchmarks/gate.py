"""`make bench-gate`: can the gate be fooled, or a promotion be lost?

Error rates, power, coverage, reward hackers, idle rounds, kills. Half an hour on two cores; each part is kept in
benchmarks/work once it is measured, so that `--parts` measures some anew beside what the others gave last time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import ab_tests, hackers, idle, moves, ope
from benchmarks.results_file import write
from iterative_ppo.files import read_json, write_json

WORK = Path(__file__).parent / "work" / "gate"
PARTS: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
    "ab_tests": ab_tests.figures,
    "ope": ope.rows,
    "hackers": hackers.rows,
    "idle": idle.rows,
    "moves": moves.rows,
}


def main() -> None:
    """Measure the parts that are asked for and those that never were, then print and write the whole table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args().parts
    for name, rows in PARTS.items():
        if name in asked or not (WORK / f"{name}.json").exists():
            write_json(WORK / f"{name}.json", list(rows()))
    write("bench-gate", [row for name in PARTS for row in read_json(WORK / f"{name}.json")])


if __name__ == "__main__":
    main()
