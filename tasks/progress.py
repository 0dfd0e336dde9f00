"""Progress of long work: a bar on a terminal, a line at each quarter elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]
logger = logging.getLogger("iterative_ppo")
logger.setLevel(logging.INFO)


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """Yield `report(done, total)`."""
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def _lines(what: str) -> Report:
    shown, before = -1, 0

    def report(done: int, total: int) -> None:
        nonlocal shown, before
        quarter = 4 * done // max(total, 1)
        if done < before:  # another loop began
            shown = -1
        before = done
        if quarter > shown or done == total:
            shown = 5 if done == total else quarter
            logger.info("%s: %d of %d", what, done, total)

    return report
