"""A model under training sharded over the processes (FSDP2), where accelerate's configuration says FSDP.

transformers' parts are called one by one here, so each part is a unit of its own: the layers, what is left of the
backbone, the head; a head tied to the embedding shares its unit.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from iterative_ppo.errors import ConfigError
from iterative_ppo.learning import adapters, distributed
from iterative_ppo.learning.forward import backbone


class Owner(Protocol):
    """What holds the model that is trained: a policy or a Q."""

    model: PreTrainedModel


Trained = TypeVar("Trained", bound=Owner)
P = ParamSpec("P")
R = TypeVar("R")


def wanted() -> bool:
    """Whether the launcher was configured for FSDP."""
    return distributed.size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


@contextmanager
def sharded(owner: Owner) -> Iterator[None]:
    """For a block the owner's model is a sharded copy; its own then takes up what the copy learnt.

    Under LoRA the model is not sharded: other policies speak with it, and only its adapters have gradients.
    """
    whole = owner.model
    if not wanted() or adapters.has_adapters(whole):
        yield
        return
    device = whole.device
    whole.to("cpu")  # type: ignore[arg-type]
    owner.model = _shard(copy.deepcopy(whole), device)
    try:
        yield
        state = {name: full(value).cpu() for name, value in owner.model.state_dict().items()}
        whole.load_state_dict(state)
    finally:
        owner.model = whole
        whole.to(device)  # type: ignore[arg-type]


def in_shards(train: Callable[Concatenate[Trained, P], R]) -> Callable[Concatenate[Trained, P], R]:
    """A function that trains its first argument, which it is to do in shards."""

    @wraps(train)
    def wrapped(owner: Trained, *args: P.args, **kwargs: P.kwargs) -> R:
        with sharded(owner):
            return train(owner, *args, **kwargs)

    return wrapped


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[None]:
    """For a block each process has all weights of a sharded model, so that processes may differ in what they do."""
    units = _units(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """A whole tensor sharded as another one is."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


def _shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    how = _configured() | {"mesh": init_device_mesh(device.type, (distributed.size(),))}
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, **how)
    base = backbone(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        fully_shard([embedding, head], **how)
    for part in model.children():
        if part is not base and part is not head and any(True for _ in part.parameters()):
            fully_shard(part, **how)
    if head is not None and head.weight is not embedding.weight:
        fully_shard(head, **how)
    fully_shard(base, **how)
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)  # losses are shares of a sum
        unit.set_force_sum_reduction_for_comms(True)
    with torch.no_grad(), gathered(model):
        pass  # whole weights are made here once: made while sampling, they could not be trained
    return model


def _configured() -> dict[str, Any]:
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin: Any = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError("runtime.accelerate: its fsdp_version is not 2; see configs/accelerate/fsdp.yaml")
    return {"reshard_after_forward": bool(plugin.reshard_after_forward), "offload_policy": plugin.cpu_offload}


def _units(model: PreTrainedModel) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    if distributed.size() == 1:
        return []
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
