"""Importers of logged conversations, by name. Each keeps the good conversations and says why it set others aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from iterative_ppo.config import Config
from iterative_ppo.errors import ConfigError, SourceError, did_you_mean
from iterative_ppo.sources.log import ImportedLog, SetAside

__all__ = ["SOURCES", "ImportedLog", "Importer", "SetAside", "import_log", "importer"]

Importer = Callable[[Path, Config], ImportedLog]


def _star(path: Path, config: Config) -> ImportedLog:
    from iterative_ppo.sources.star import import_star

    _one_outcome("star", config)
    return import_star(path)


def _craigslist(path: Path, config: Config) -> ImportedLog:
    from iterative_ppo.sources.craigslist import import_craigslist

    _one_outcome("craigslist", config)
    return import_craigslist(path)


def _table(path: Path, config: Config) -> ImportedLog:
    from iterative_ppo.sources.table import import_table

    return import_table(path, config.outcomes, config.data)


SOURCES: Mapping[str, Importer] = {"star": _star, "craigslist": _craigslist, "table": _table}


def importer(name: str) -> Importer:
    """The importer of a source. Raises SourceError, with the nearest name, where there is none."""
    if name not in SOURCES:
        raise SourceError(f"unknown source {name!r}{did_you_mean(name, SOURCES)}; known are {', '.join(SOURCES)}")
    return SOURCES[name]


def import_log(config: Config) -> ImportedLog:
    """Import what `source.kind` and `source.path` name. Raises SourceError, or ConfigError where there is no path."""
    convert = importer(config.source.kind)
    if config.source.path is None:
        raise ConfigError(f"source.path: source.kind {config.source.kind!r} needs a file or a folder of logs, got null")
    return convert(config.source.path, config)


def _one_outcome(name: str, config: Config) -> None:
    if len(config.outcomes) != 1:
        named = ", ".join(config.outcomes)
        raise ConfigError(f"outcomes: source {name!r} has one outcome, name exactly one (got {named})")
