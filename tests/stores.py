"""Where a test's run keeps its data and its MLflow store: settings below one folder."""

from __future__ import annotations

from pathlib import Path


def stores(root: Path) -> dict[str, str]:
    return {
        "data.root": str(root / "data"),
        "tracking.uri": f"sqlite:///{root}/mlruns/mlflow.db",
        "tracking.artifacts": str(root / "mlruns" / "artifacts"),
    }
