"""The least number for which something holds, found in few tries."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable


def first_that(holds: Callable[[int], bool], near: int, last: int) -> int:
    """The least number up to `last` for which `holds` is true, `last` where there is none; what is near is found soon.

    `holds` must stay true once it is.
    """
    step = 1
    if near < last and not holds(near):
        low, high = near, near + step  # holds(low) is false
        while high < last and not holds(high):
            step *= 2
            low, high = high, high + step
    else:
        low, high = near - step, near  # holds(high) is true, or high is last
        while low >= 0 and holds(low):
            step *= 2
            low, high = low - step, low
    return bisect_left(range(last), True, max(low + 1, 0), min(high, last), key=holds)
