"""Moves that are killed: `python killed_moves.py` reads jobs, a JSON list of them a line, and forks for each.

A job is [tracking, data root, what, version, point]. Its process gets SIGKILL at that point among its writes; 0 lets it
end. A line of the trail has two points: before it, and in its middle. The answer is [exit status, what it said].
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow import MlflowClient

from iterative_ppo.errors import StoreError
from tasks import audit, registry
from tasks.tracking import Tracking

STORE = ("set_registered_model_alias", "delete_registered_model_alias", "set_model_version_tag")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: int) -> None:
    """Count the writes to the store and the trail, and end this process at one of them."""
    left = iter(range(1, point))

    def here() -> bool:
        return point > 0 and next(left, None) is None

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if here():
                die()
            return function(*args, **kwargs)

        return call

    def write(handle: int, content: bytes) -> int:
        if here():
            die()
        if here():
            os.write(handle, content[: len(content) // 2])
            os.fsync(handle)
            die()
        return os.write(handle, content)

    for name in STORE:
        setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
    audit.os = SimpleNamespace(**{**vars(os), "write": write})  # type: ignore[attr-defined]


def do(tracking: list[str], data: str, what: str, version: int) -> str:
    store = Tracking(*tracking[:3], Path(tracking[3]))
    if what == "recover":
        return "; ".join(map(str, registry.recover(store, Path(data), "a test")))
    if what == "promote":
        return str(registry.promote(store, version, {"p": 0.01}, "a test", Path(data)))
    return str(registry.rollback(store, {"p": 0.01}, "a test", Path(data)))


def child(job: list[Any], pipe: int) -> None:
    *work, point = job
    die_at(point)
    try:
        said = do(*work)
    except StoreError as error:
        said = f"refused: {error}"
    os.write(pipe, said.encode())


def forked(job: list[Any]) -> tuple[int, int]:
    """Process id, and the pipe to read what it says from."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(job, write)
            os._exit(0)
        except BaseException as error:
            os.write(write, repr(error).encode())
            os._exit(1)
    os.close(write)
    return pid, read


def main() -> None:
    """The first job is done here, so that a fork finds everything imported; then the jobs of a line run at once."""
    *warm_up, _ = json.loads(sys.stdin.readline())[0]
    do(*warm_up)
    print("ready", flush=True)
    for line in sys.stdin:
        running = [forked(job) for job in json.loads(line)]
        answers = []
        for pid, read in running:
            with os.fdopen(read, "rb") as pipe:
                said = pipe.read().decode()
            answers.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said])
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
