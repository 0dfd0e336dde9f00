"""Where a night takes up the thread: one small, readable file beside the registry."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from iterative_ppo.errors import StoreError
from iterative_ppo.files import read_settings, write_json

FORMAT = 1
DRAFT = re.compile(r"\..+\.[a-z0-9_]{8}")
DELIVERY_SECONDS = 24 * 3600
Phase = Literal["collect", "train", "test", "approve", "finished"]


class Experiment(BaseModel):
    """A running A/B test: who is tested against whom, and the salt of its assignment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: str
    champion: int
    challenger: int
    started: AwareDatetime | None = None
    settings: dict[str, Any] = {}
    """What defines its evidence; it may not change before its end."""
    looks: list[dict[str, Any]] = []
    """Those that spent evidence, oldest first (`Look.as_dict`)."""
    guardrails: list[dict[str, Any]] = []
    """As the last of these looks found them."""

    @property
    def fractions(self) -> list[float]:
        """Of the plan, at the looks so far."""
        return [look["fraction"] for look in self.looks]


class Approval(BaseModel):
    """What waits for a person: a promotion that the A/B test found right, or a rollback that an alarm calls for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    kind: Literal["promote", "rollback"]
    version: int
    """Who would become champion, or who would leave."""
    reasons: tuple[str, ...]
    evidence: dict[str, Any]
    resume: Phase
    """Where the night was when it asked."""


class NightState(BaseModel):
    """What persists between nights.

    collect: conversations of the champion are awaited for `round`; train: they are here; test: an A/B test runs whose
    conversations become the data of the next round; approve: a person is asked for `approval`; finished: converged or
    out of budget.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    round: int = 0
    phase: Phase = "collect"
    champion: int | None = None
    """Whose conversations the round's dataset is for, once it is frozen."""
    experiment: Experiment | None = None
    approval: Approval | None = None
    outcome_rates: dict[str, float] = {}
    rounds: list[dict[str, Any]] = []

    @property
    def champion_rate(self) -> float | None:
        """The success rate of its conversations in the round's dataset, where they are known."""
        return self.outcome_rates.get(str(self.champion))

    @property
    def gathering(self) -> int:
        """The round whose data are arriving now: the next one, once this one's dataset is frozen.

        After the last one they are set apart from its A/B test's, where there was one.
        """
        phase = self.approval.resume if self.approval else self.phase
        tested = bool(self.rounds) and "decision" in self.rounds[-1]
        return self.round + {"train": 1, "test": 1, "finished": 1 + tested}.get(phase, 0)

    def advance(self, **changes: Any) -> NightState:
        return self.model_copy(update=changes)


def state_file(root: Path) -> Path:
    return root / "state.json"


def load_state(root: Path) -> NightState:
    """The persisted state, or a new one. Raises StoreError for a damaged or newer file."""
    path = state_file(root)
    if not path.exists():
        return NightState()
    try:
        return NightState.model_validate(read_settings(path, FORMAT))
    except ValidationError as error:
        first = error.errors()[0]
        raise StoreError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; restore the file") from None


def save_state(root: Path, state: NightState) -> None:
    write_json(state_file(root), state.model_dump(mode="json"))


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold the lock of a night, drafts of a killed one swept. Raises StoreError at once where another holds it."""
    lock = FileLock(root / "night.lock", timeout=0)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"{root}: another run is at work here; wait for it, or give this one its own data.root"
        ) from None
    except OSError as error:
        raise StoreError(f"{root}: cannot be written to ({error}); free it, or set another data.root") from None
    try:
        sweep(root)
        yield
    finally:
        lock.release()


def sweep(root: Path) -> None:
    """Remove the drafts that a killed run left beside what it was writing (names that `files` gives to drafts).

    Who delivers to the inbox holds no lock of ours, so a draft there counts as left only after a day.
    """
    places = [root.glob(f".{state_file(root).name}.*")]
    places += [(root / folder).rglob(".*") for folder in ("inbox", "quarantine", "rounds", "turns")]
    for path in [p for place in places for p in place if DRAFT.fullmatch(p.name)]:
        arriving = path.is_relative_to(root / "inbox") and path.exists()
        if arriving and time() - path.stat().st_mtime < DELIVERY_SECONDS:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
