"""Where and how models compute, for a block: threads, precision, memory. Rounding and speed depend on it alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from iterative_ppo.config import RuntimeConfig
from iterative_ppo.errors import ModelError


@dataclass(frozen=True)
class Runtime:
    """What training loops and forward passes ask for; as it stands, float32 and nothing saved."""

    bfloat16: bool = False
    gradient_checkpointing: bool = False
    micro_batch_tokens: int | None = None


_PLAIN = Runtime()
_CURRENT: ContextVar[Runtime] = ContextVar("runtime", default=_PLAIN)


def current() -> Runtime:
    """The runtime of the block that we are in."""
    return _CURRENT.get()


@contextlib.contextmanager
def computing(config: RuntimeConfig) -> Iterator[Runtime]:
    """Compute as configured within the block. Raises ModelError where the device is not there or has no bfloat16.

    Full weights stay float32 and matrix products run in bfloat16 (autocast); its cache of cast weights is off, because
    an optimizer changes weights within the block.
    """
    device = _device(config.device)
    chosen = Runtime(_bfloat16(config.precision, device), config.gradient_checkpointing, config.micro_batch_tokens)
    token = _CURRENT.set(chosen)
    try:
        with threads(config.threads), torch.autocast(device.type, torch.bfloat16, chosen.bfloat16, cache_enabled=False):
            yield chosen
    finally:
        _CURRENT.reset(token)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"runtime.device: {name!r} cannot be used on this machine ({reason})") from None
    return device


def _bfloat16(precision: str, device: torch.device) -> bool:
    if precision == "float32" or (precision == "auto" and device.type == "cpu"):
        return False
    able = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    if precision == "bfloat16" and not able:
        raise ModelError(f"runtime.precision: {device} does not compute in bfloat16; use auto or float32")
    return able


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch threads for a block; more than the free cores makes it slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
