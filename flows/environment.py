"""The process environment that the platform's libraries read when they are imported: quiet, offline, patient."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from iterative_ppo.errors import IterativePPOError

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


def _without_traceback(record: logging.LogRecord) -> bool:
    """An error that a user can mend is told in one line; the traceback would bury it."""
    if record.exc_info and isinstance(record.exc_info[1], IterativePPOError):
        record.exc_info = None
    return True
