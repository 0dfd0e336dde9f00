"""What a training loop needs to go on after a kill: written whole or not at all, read back to the last bit."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from iterative_ppo.errors import StoreError
from iterative_ppo.files import read_json, whole_directory, write_json
from iterative_ppo.learning import distributed
from iterative_ppo.learning.sharding import full, like

TENSORS, STATE, BEGUN = "tensors.safetensors", "state.json", "begun.json"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A place for the state of one training loop. `key` says what is trained, on what, and how.

    Attributes:
        every: updates (or rollouts) between two writes.
    """

    path: Path
    key: str
    every: int = 1

    def part(self, name: str, every: int | None = None) -> Checkpoint:
        """The place of one loop among several."""
        return replace(self, path=self.path / name, every=every or self.every)

    def beside(self, name: str) -> Checkpoint:
        """A place next to this one, for what its loop learns from."""
        return replace(self, path=self.path.with_name(f"{self.path.name}-{name}"))

    def newest(self) -> int:
        """The greatest number of a place `beside` that holds something, -1 where none does."""
        held = (place.parent.name for place in self.path.parent.glob(f"{self.path.name}-*/{STATE}"))
        return max((int(name.rpartition("-")[2]) for name in held), default=-1)

    def save(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Keep tensors and JSON-able values, in place of what was kept before. The first process writes."""
        if distributed.rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_directory(self.path) as draft:
                save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, draft / TENSORS)
                write_json(draft / STATE, {"key": self.key, **values})
        distributed.wait()

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What was kept; None where nothing was. Raises StoreError where it is damaged or of another training."""
        if not (self.path / STATE).exists():
            return None
        values = read_json(self.path / STATE)
        if not isinstance(values, dict) or values.get("key") != self.key:
            raise StoreError(
                f"{self.path}: the checkpoint of a training with another configuration or other inputs; restore them, "
                "or remove that folder to begin anew"
            )
        try:
            return load_file(self.path / TENSORS), values
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{self.path}: a damaged checkpoint ({error}); remove it to begin anew") from None

    @contextmanager
    def understood(self) -> Iterator[None]:
        """For a block that takes up what `load` gave: StoreError where that is not what such a training writes."""
        try:
            yield
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and type(error) is not RuntimeError:  # memory, or another process
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise StoreError(f"{self.path}: a damaged checkpoint ({reason}); remove it to begin anew") from None

    def clear(self) -> None:
        """Forget it: the work is done."""
        if distributed.rank() == 0:
            shutil.rmtree(self.path, ignore_errors=True)


def take_up(
    path: Path, key: str, settings: Mapping[str, Any] | None = None, given: Mapping[str, Any] | None = None
) -> Checkpoint:
    """The place of a training of several loops, with what was kept there if the same training was begun in it.

    What was begun of another champion or on other data is void, whatever the settings: it makes room with a warning, so
    that no night waits for a person. Where the settings alone differ, a person changed them, and may want the work
    that was done: that is an error. A training that names no settings makes room in any case.

    Args:
        key: of everything that the result depends on.
        settings: JSON-able, the part of the configuration that it depends on. given: hashes of the champion and data.

    Raises StoreError, naming the folder and what differs.
    """
    if _begun(path).get("key") == key:
        return Checkpoint(path, key)
    settings, given = settings or {}, given or {}
    check_settings(path, settings, given)
    if _unfinished(path):
        _LOG.warning("%s: an unfinished training with other data, models or settings; it begins anew", path)
    shutil.rmtree(path, ignore_errors=True)
    write_json(path / BEGUN, {"key": key, "settings": settings, "given": given})
    return Checkpoint(path, key)


def check_settings(path: Path, settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise take_up's StoreError already before there is what its key is of."""
    kept = _begun(path)
    changed = list(_differences(kept.get("settings", {}), settings))
    if changed and kept.get("given") == given and _unfinished(path):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise StoreError(
            f"{path}: an unfinished improvement that was begun with another configuration "
            f"({', '.join(changed[:3])}{more}), or by a version with other defaults; restore that to go on, or remove "
            "the folder to begin anew"
        )


def _begun(path: Path) -> dict[str, Any]:
    begun = path / BEGUN
    kept: Any = read_json(begun) if begun.exists() else {}
    if not isinstance(kept, dict):
        raise StoreError(f"{begun}: not what a training began with; remove {path} to begin anew")
    return kept


def _unfinished(path: Path) -> bool:
    return any(path.glob(f"*/{STATE}"))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} was {old}, is {new}"


def weights_of(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies of parameters by name, whole in every process, in its main memory."""
    return {name: full(parameter.detach()).to("cpu", copy=True) for name, parameter in parameters.items()}


@torch.no_grad()
def load_weights(parameters: Mapping[str, torch.nn.Parameter], state: Mapping[str, torch.Tensor]) -> None:
    """Take up what `weights_of` the same parameters gave. Raises StoreError for another model's."""
    if {name: p.shape for name, p in parameters.items()} != {name: p.shape for name, p in state.items()}:
        raise StoreError("the checkpoint's weights are those of another model or adapter; remove it to begin anew")
    for name, parameter in parameters.items():
        parameter.copy_(like(state[name], parameter))


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "optimizer") -> dict[str, torch.Tensor]:
    """An optimizer's state as named tensors, whole in every process, in its main memory."""
    found = optimizer.state_dict()["state"].items()
    return {f"{prefix}.{k}.{name}": full(torch.as_tensor(v)).cpu() for k, one in found for name, v in one.items()}


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], prefix: str = "optimizer"
) -> None:
    """Take up what `optimizer_tensors` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}."):
            index, field = name.removeprefix(f"{prefix}.").split(".")
            state.setdefault(int(index), {})[field] = like(tensor, parameters[int(index)]) if tensor.dim() else tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def resume_schedule(schedule: torch.optim.lr_scheduler.LRScheduler, updates: int) -> None:
    """Set a schedule, and the rates of its optimizer, to where they are after so many updates."""
    schedule.last_epoch = updates
    lambdas: list[Any] = schedule.lr_lambdas  # type: ignore[attr-defined]
    for group, rate, factor in zip(schedule.optimizer.param_groups, schedule.base_lrs, lambdas, strict=True):
        group["lr"] = rate * factor(updates)


def with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Named tensors below a name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def below_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that `with_prefix` put below a name."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
