"""One loader for every way in: defaults, a params file, overrides."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from iterative_ppo.config.whole import Config
from iterative_ppo.errors import ConfigError, did_you_mean

NAMED = (("gate", "guardrails"), ("labels", "rules"))
"""Sections in which users name entries of their own."""
WHOLE = (("outcomes",), ("data", "outcome_ranges"), ("exploration", "personas"))
"""Tables of users' own that are replaced whole."""
RETIRED = (("simulator", "copying_share"),)
"""Keys that a copy of older defaults still holds."""
MERGE = "tag:yaml.org,2002:merge"
DEFAULTS = Path(__file__).resolve().parents[2] / "params.yaml"

_LOG = logging.getLogger(__name__)


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Config:
    """Defaults, then the user's params file, then overrides, each with its own profile of the source laid over it.

    So a copy of the defaults (`ippo init`) means what the defaults mean, and a file without profiles wins over theirs.

    Args:
        path: a params.yaml that may hold any subset of the keys; None means the defaults alone.
        overrides: `{"a.b": value}` or strings `"a.b=value"`, the value read as YAML.

    Raises ConfigError with the file, the key, what was expected and, for an unknown key, the nearest known one.
    """
    defaults = _read_yaml(DEFAULTS)
    users = [] if path is None else [(_read_yaml(path), str(path))]
    users += [(_nested(key, value), f"override {key!r}") for key, value in read_overrides(overrides)]
    for layer, where in users:
        _drop_retired(layer, where)
    names = list(defaults["profiles"])
    profiles = [_profiles_of(layer, where, defaults, names) for layer, where in [(defaults, "defaults"), *users]]
    kind = _laid_over(defaults, users)["source"]["kind"]
    layers: list[tuple[dict[str, Any], str]] = []
    for (layer, where), own in zip([({}, "defaults"), *users], profiles, strict=True):
        profile = own.get(kind, {}) if isinstance(kind, str) else {}
        layers += [(layer, where), (profile, f"{where}: profile {kind!r}")]
    try:
        return Config.model_validate(_laid_over(defaults, layers))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        where = _blamed(defaults, layers, _fault(first)) or str(path or DEFAULTS.name)
        given = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(": ".join(filter(None, (where, key, f"{said}{given}")))) from None


def _drop_retired(layer: dict[str, Any], where: str) -> None:
    for section, key in RETIRED:
        if isinstance(layer.get(section), dict) and key in layer[section]:
            del layer[section][key]
            _LOG.warning("%s: %s.%s has no meaning any more, and may be taken out", where, section, key)


def _blamed(defaults: dict[str, Any], layers: Sequence[tuple[dict[str, Any], str]], fault: str) -> str | None:
    """The layer since which a fault has been there; None where the defaults alone have it."""
    for count in range(len(layers), 0, -1):
        if fault not in _faults(_laid_over(defaults, layers[: count - 1])):
            return layers[count - 1][1]
    return None


def _faults(values: dict[str, Any]) -> list[str]:
    try:
        Config.model_validate(values)
    except ValidationError as error:
        return [_fault(one) for one in error.errors()]
    return []


def _fault(error: Mapping[str, Any]) -> str:
    return repr((error["loc"], error["msg"], error["input"] if error["type"] != "value_error" else None))


def _profiles_of(
    layer: dict[str, Any], where: str, defaults: dict[str, Any], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Take a layer's profiles out of it, by source. Raises ConfigError for an unknown source or key."""
    found = layer.pop("profiles", {})
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: profiles is a section, expected keys below it, got {found!r}")
    for name, profile in found.items():
        if not isinstance(profile, dict):
            raise ConfigError(f"{where}: profiles.{name} is a section, expected keys below it, got {profile!r}")
        if name not in names:
            raise ConfigError(f"{where}: unknown key 'profiles.{name}'{did_you_mean(str(name), names)}")
        _merge(defaults, profile, defaults, f"{where}: profile {name!r}", ())
    return found


def _laid_over(defaults: dict[str, Any], layers: Iterable[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    values = defaults
    for layer, where in layers:
        values = _merge(values, layer, defaults, where, ())
    return values


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def read_overrides(overrides: Mapping[str, Any] | Iterable[str]) -> Iterable[tuple[str, Any]]:
    """Key and value of each override. Raises ConfigError for a string that is not `key=value`, its value YAML."""
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {text!r}: expected section.key=value")
        try:
            yield key.strip(), yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"override {text!r}: the value is not YAML ({' '.join(str(error).split())})") from None


class _Once(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML's readers take the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for name, _ in node.value:
            if name.tag == MERGE:
                continue
            key = self.construct_object(name, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} is given twice", problem_mark=name.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such params file; `ippo init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    return values


def _merge(
    base: Mapping[str, Any], new: Mapping[str, Any], known: Any, where: str, at: tuple[str, ...]
) -> dict[str, Any]:
    """`base` with `new` laid over it. The names of outcomes and personas are the user's own: replaced whole.

    Guardrails and rules of the user's own stand beside the known ones; null takes one away.
    """
    merged = dict(base)
    for key, value in new.items():
        path = (*at, str(key))
        if at in NAMED and key in merged and value is None:
            del merged[key]
            continue
        if at in NAMED and key not in known and isinstance(value, Mapping):
            merged[key] = {**merged.get(key, {}), **value}
            continue
        if key not in known:
            raise ConfigError(f"{where}: unknown key {'.'.join(path)!r}{did_you_mean(str(key), known)}")
        if path in WHOLE or not isinstance(known[key], dict):
            merged[key] = value
        elif isinstance(value, Mapping):
            merged[key] = _merge(merged[key], value, known[key], where, path)
        else:
            raise ConfigError(f"{where}: {'.'.join(path)} is a section, expected keys below it, got {value!r}")
    return merged
