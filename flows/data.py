"""A round's dataset back from the DVC remote, its pointer from MLflow where it is not at hand."""

from __future__ import annotations

from pathlib import Path

from iterative_ppo.config import Config
from tasks import tracking, versioning
from tasks.datasets import turns_folder


def checkout(config: Config, round_number: int) -> Path:
    """Bring the dataset back. Raises StoreError where neither the pointer nor the remote knows it."""
    target = turns_folder(config, round_number)
    pointer = target.with_name(f"{target.name}.dvc")
    if pointer.exists():
        return versioning.checkout(round_number, config)
    store = tracking.open_tracking(config)
    return versioning.checkout(round_number, config, store.artifact(round_number, pointer.name))
