"""One exception type for each boundary crossed; every message says what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class IterativePPOError(Exception):
    """Base of all errors that a user can mend; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(IterativePPOError):
    """params.yaml, a `--set` override or a Prefect parameter is wrong."""

    exit_code = 2


class SourceError(IterativePPOError):
    """A log that is imported is not what it says it is."""

    exit_code = 3


class TurnTableError(IterativePPOError):
    """Rows do not form a turn table: wrong columns, order or values."""

    exit_code = 4


class ValidationStopped(IterativePPOError):  # noqa: N818 (a verdict, not a defect)
    """Too large a share of conversations failed validation, so the round stops."""

    exit_code = 5


class ModelError(IterativePPOError):
    """A model or tokenizer cannot be loaded, or lacks what is needed."""

    exit_code = 6


class TrainingError(IterativePPOError):
    """Training produced, or would produce, something that is not a policy: NaN, constant reward, no data."""

    exit_code = 7


class Diverged(TrainingError):  # noqa: N818 (what happened)
    """An update is not a number. Whoever set its rate says which setting that is."""


class WorkerLost(TrainingError):  # noqa: N818 (what happened)
    """One of several training processes was killed, or died of something that is no error of ours."""


class NothingToLearn(TrainingError):  # noqa: N818 (what a round finds)
    """A round's conversations, or the Q that they gave, teach nothing; those of another round may."""


class SameReward(NothingToLearn):
    """Q tells none of the policy's responses from another."""


class SupportError(NothingToLearn):
    """A log is too far from a policy to tell Q of it: the effective sample size is below the floor."""


class StoreError(IterativePPOError):
    """Persisted state is missing, damaged, locked or written by a newer version."""

    exit_code = 8


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint ` (did you mean 'x'?)`, or nothing where no known word is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
