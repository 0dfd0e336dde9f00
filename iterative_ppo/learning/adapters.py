"""LoRA adapters by peft on one shared base: several policies, one copy of the weights (arXiv 2106.09685).

The layers are injected by transformers' own peft integration, so that a model stays the class that it was.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from iterative_ppo.config import LoRAConfig
from iterative_ppo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LINEAR = (torch.nn.Linear, Conv1D)


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether adapters were ever put into this model."""
    return bool(model._hf_peft_config_loaded)


def current(model: PreTrainedModel) -> str | None:
    """The adapter that is switched on, or None where the base speaks alone."""
    layer = next(iter(_layers(model)), None)
    return None if layer is None or layer.disable_adapters else str(layer.active_adapters[0])


def switch(model: PreTrainedModel, adapter: str | None) -> None:
    """Switch an adapter on, and all others off; None leaves the base alone. Only what is on may be trained."""
    if not has_adapters(model) or current(model) == adapter:
        return
    if adapter is None:
        model.disable_adapters()
    else:
        model.enable_adapters()
        model.set_adapter(adapter)


@contextmanager
def switched(model: PreTrainedModel, adapter: str | None) -> Iterator[PreTrainedModel]:
    """The model with an adapter on, for a block.

    Afterwards whoever spoke before speaks again, unless gradients are recorded: the backward pass, which may compute
    the forward pass anew, has to meet the same adapter.
    """
    before = current(model)
    switch(model, adapter)
    try:
        yield model
    finally:
        if not torch.is_grad_enabled():
            switch(model, before)


def check(model: PreTrainedModel, config: LoRAConfig) -> None:
    """Raise `add`'s ModelError before there is anything to train."""
    from peft.tuners.tuners_utils import check_target_module_exists

    how = _peft_config(model, config)
    if config.target_modules and not any(check_target_module_exists(how, name) for name, _ in model.named_modules()):
        names = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, LINEAR)})
        raise ModelError(
            f"policy.lora.target_modules: {model.name_or_path or model.config.model_type} has no layer named "
            f"{' or '.join(config.target_modules)}; it has {', '.join(names)}"
        )


def add(model: PreTrainedModel, config: LoRAConfig, start: str | None) -> str:
    """Put a new adapter into the model and switch it on: a copy of the adapter `start`, or one that changes nothing.

    Raises ModelError where the model has no layer of the names in `policy.lora.target_modules`.
    """
    name = f"adapter{len(model.peft_config) if has_adapters(model) else 0}"
    how = copy.deepcopy(model.peft_config[start]) if start else _peft_config(model, config)
    before = set(model.parameters())
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a second adapter, which is what we want
            torch.manual_seed(0)
            model.add_adapter(how, name)
    except ValueError as error:
        raise ModelError(f"policy.lora.target_modules: {' '.join(str(error).split())[:300]}") from None
    for parameter in set(model.parameters()) - before:
        parameter.data = parameter.data.float()
    if start:
        _copy_weights(model, start, name)
    switch(model, name)
    return name


def as_float32(model: PreTrainedModel) -> None:
    """Adapters in float32 whatever the base is in: small steps would vanish in bfloat16."""
    for layer in _layers(model):
        for part in layer.adapter_layer_names:
            getattr(layer, part).float()


def merged(model: PreTrainedModel, adapter: str | None) -> PreTrainedModel:
    """A float32 copy without adapters whose weights hold what the adapter adds."""
    plain: Any = copy.deepcopy(model).float()
    if not has_adapters(model):
        return plain
    layers = set(_layers(plain))
    inner_last = [(name, module) for name, module in plain.named_modules() if module in layers]
    for name, layer in reversed(inner_last):  # experts carry one layer around another
        if adapter:
            layer.merge(safe_merge=True, adapter_names=[adapter])
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    plain._hf_peft_config_loaded = False
    del plain.peft_config
    vars(plain).pop("_weight_conversions", None)  # names that loaded adapters had, which saving would write again
    return plain.requires_grad_(True)


def rank_of(model: PreTrainedModel, adapter: str) -> int:
    config: Any = model.peft_config[adapter]
    return int(config.r)


def _layers(model: PreTrainedModel) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not has_adapters(model):
        return []
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _peft_config(model: PreTrainedModel, config: LoRAConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def _copy_weights(model: PreTrainedModel, source: str, target: str) -> None:
    for layer in _layers(model):
        for part in layer.adapter_layer_names:
            weights = getattr(layer, part)
            if source in weights:
                with torch.no_grad():
                    _assign(weights[target], weights[source])


def _assign(target: Any, source: Any) -> None:
    if isinstance(target, torch.nn.Parameter):
        target.copy_(source)
    else:
        target.load_state_dict(source.state_dict())
