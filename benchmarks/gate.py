"""`make bench-gate`: can the gate be fooled? Its error rates and power, as measured in simulation."""

from __future__ import annotations

from benchmarks import ab_tests
from benchmarks.results_file import write


def main() -> None:
    write("bench-gate", list(ab_tests.figures()))


if __name__ == "__main__":
    main()
