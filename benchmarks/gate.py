"""`make bench-gate`: can the gate be fooled? Error rates, power, coverage, reward hackers and idle rounds."""

from __future__ import annotations

from benchmarks import ab_tests, idle, ope
from benchmarks.results_file import write


def main() -> None:
    write("bench-gate", [*ab_tests.figures(), *ope.rows(), *idle.rows()])


if __name__ == "__main__":
    main()
