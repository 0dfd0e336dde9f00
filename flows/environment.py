"""What a process stands on: variables that the platform's libraries read, Prefect's server, room on the disk."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

from iterative_ppo.errors import IterativePPOError, StoreError

QUIET = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_ENABLE_TELEMETRY": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "iterative_ppo",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
REACH_SECONDS = 5.0
NO_ROOM = re.compile(
    "No space left on device|Disk quota exceeded|Read-only file system|database or disk is full"
    "|No usable temporary directory"
)
NO_SERVER = re.compile(r"Failed to reach API at (\S+?)\.?$")
NO_TEMPORARY_SERVER = "attempting to connect to ephemeral Prefect API server"


def prepare() -> None:
    """Set what the user has not set, and find modules of the working folder.

    Call before importing Prefect, MLflow, DVC or transformers.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_traceback)
    if "" not in sys.path:
        sys.path.append("")  # modules of the user's own, named in a setting, lie in the working folder
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    warnings.filterwarnings("ignore", message="Failed to create the Prefect home")  # told by `check_prefect`


def _without_traceback(record: logging.LogRecord) -> bool:
    """An error that a user can mend is told in one line; the traceback would bury it."""
    if record.exc_info and record.exc_info[1] and mendable(record.exc_info[1]):
        record.exc_info = None
    return True


def check_prefect() -> str:
    """Where flows run: the server that Prefect's settings name, or a temporary one with its home.

    Raises StoreError where that server does not answer within seconds, or the home cannot be written to.
    """
    from prefect.settings import get_current_settings

    from tasks.mlflow_store import shown

    settings = get_current_settings()
    if settings.api.url:
        _reach(settings.api.url)
        return shown(settings.api.url)
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.home):
            pass
    except OSError as error:
        raise StoreError(
            f"Prefect's home {settings.home} cannot be written to ({error.strerror}); make room or mend its "
            "permissions, or set PREFECT_HOME to a folder that can"
        ) from None
    return f"a temporary server, home {settings.home}"


def server_apart() -> None:
    """Start Prefect's temporary server, if one is started, in a session of its own.

    Ctrl-C goes to a terminal's whole process group. A server that dies of it first leaves the run to wait for an answer
    while it wants to tell of its own end, after which it stops its server itself.
    """
    from prefect.server.api import server

    if hasattr(server, "subprocess"):
        popen = partial(subprocess.Popen, start_new_session=True)
        vars(server)["subprocess"] = SimpleNamespace(**{**vars(subprocess), "Popen": popen})


def _reach(url: str) -> None:
    """A server that answers with an error is left to Prefect, which knows its own."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": REACH_SECONDS}, sync_client=True) as client,
    ):
        if isinstance(client.api_healthcheck(), httpx.TransportError):
            raise _no_server(url)


def _no_server(url: str) -> StoreError:
    from tasks.mlflow_store import shown

    return StoreError(
        f"PREFECT_API_URL is {shown(url)}, and no Prefect server answers there; start it (`prefect server start`) or "
        "unset PREFECT_API_URL"
    )


def mendable(error: BaseException) -> IterativePPOError | None:
    """The error as one that a user can mend; None for a defect. Libraries wrap what a disk or a server did."""
    if isinstance(error, IterativePPOError):
        return error
    if isinstance(error, OSError) and error.filename is not None:  # a full disk, a folder that may not be written to
        return StoreError(f"{error.filename}: {error.strerror}; make room or mend its permissions")
    for said in map(str, _chain(error)):
        if found := NO_ROOM.search(said):
            return StoreError(
                f"{found[0]}: data.root, tracking.uri, Prefect's home and the temporary folder (TMPDIR) need room that "
                "may be written to; make room and start again: what is finished is kept"
            )
        if found := NO_SERVER.search(said):
            return _no_server(found[1])
        if NO_TEMPORARY_SERVER in said:
            return StoreError(
                "Prefect's temporary server did not start in time; start again, or start one of your own (`prefect "
                "server start`, which says what is wrong) and set PREFECT_API_URL"
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what brought it about, latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
