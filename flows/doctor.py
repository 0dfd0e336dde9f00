"""`ippo doctor`: is everything here, and does the store answer?"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import typer

from flows.environment import check_prefect, mendable
from iterative_ppo.config import Config
from iterative_ppo.errors import IterativePPOError, StoreError

NEEDED = ("torch", "transformers", "trl", "prefect", "mlflow", "dvc", "great_expectations", "pandas", "statsmodels")
FREE_GIGABYTES = 2


def examine(config: Config) -> bool:
    """Print a line a check; True where all hold."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("packages", _packages),
        ("disk", lambda: _disk(config)),
        ("Prefect", check_prefect),
        ("MLflow store", lambda: _store(config)),
        ("champion", lambda: _champion(config)),
        ("state", lambda: _state(config)),
        ("audit trail", lambda: _audit_trail(config)),
        ("arrived", lambda: _arrived(config)),
        ("datasets", lambda: _datasets(config)),
    ]
    results = [_checked(name, check) for name, check in checks]
    _warn_of_the_test(config)
    return all(results)


def _warn_of_the_test(config: Config) -> None:
    """A line for whatever speaks against the A/B test as it is configured; a damaged state has its own."""
    from iterative_ppo.evaluation.plan import misgivings
    from tasks.state import load_state

    with suppress(IterativePPOError, OSError):
        for told in misgivings(config, load_state(config.data.root).champion_rate):
            typer.echo(f"warn  A/B test: {told}")


def _checked(name: str, check: Callable[[], str]) -> bool:
    try:
        typer.echo(f"ok    {name}: {check()}")
        return True
    except (IterativePPOError, OSError) as error:
        typer.echo(f"wrong {name}: {mendable(error) or error}")
        return False


def _packages() -> str:
    missing = []
    for name in NEEDED:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise IterativePPOError(f"{', '.join(missing)} not installed; run `make install`")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in NEEDED)


def _disk(config: Config) -> str:
    root = config.data.root if config.data.root.exists() else Path()
    free = shutil.disk_usage(root).free / 2**30
    if free < FREE_GIGABYTES:
        raise IterativePPOError(f"{free:.1f} GiB free at {root.resolve()}; free some space")
    return f"{free:.0f} GiB free"


def _store(config: Config) -> str:
    from tasks import tracking
    from tasks.mlflow_store import shown

    return shown(tracking.open_tracking(config).uri)


def _champion(config: Config) -> str:
    from tasks import registry, tracking
    from tasks.model_versions import check_version
    from tasks.outside_moves import told_of

    store = tracking.open_tracking(config)
    version = registry.champion(store)
    if version is None:
        told_of(store, config.data.root)  # raises where it is another store
        return "none yet; `ippo run` makes the first"
    try:
        check_version(store, version)
    except StoreError as error:
        way_out = 'restore them, or let the champion before it speak by `ippo rollback --reason "..."`'
        raise StoreError(f"{error}; {way_out}") from error
    return f"policy version {version} loads"


def _state(config: Config) -> str:
    from tasks.state import load_state

    state = load_state(config.data.root)
    return f"round {state.round}, phase {state.phase}"


def _audit_trail(config: Config) -> str:
    from tasks.audit import history

    return f"{len(history(config.data.root))} records"


def _arrived(config: Config) -> str:
    """Files that a night reads, or will read, as turn tables; named besides: what no night takes out of the inbox."""
    from tasks.datasets import inbox, tables_in

    folders = [*sorted((config.data.root / "rounds").glob("*/arrived")), inbox(config)]
    tables = [file for folder in folders for file in tables_in(folder)]
    if wrong := [said for file in tables if (said := _unreadable(file, config))]:
        raise StoreError(f"{'; '.join(wrong)}; move away, for example to {config.data.root / 'quarantine'}")
    left = sorted(place.name for place in {*inbox(config).glob("*")} - {*tables})
    told = f"; no night takes {', '.join(left)} in {inbox(config)}, only visible *.parquet files" if left else ""
    return f"{len(tables)} files readable{told}"


def _unreadable(file: Path, config: Config) -> str | None:
    """What is wrong with a file as a turn table, if anything is; read in blocks, it may be larger than memory."""
    from iterative_ppo.mdp.turn_table import blocks

    try:
        for _ in blocks(file, config.outcomes):
            pass
    except (IterativePPOError, OSError) as error:
        return " ".join(str(error).split())
    return None


def _datasets(config: Config) -> str:
    from tasks import versioning

    return f"{len(versioning.rounds(config))} versioned"
