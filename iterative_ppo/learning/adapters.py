"""LoRA adapters by peft on one shared base: several policies, one copy of the weights (arXiv 2106.09685).

The layers are injected by transformers' own peft integration, so that a model stays the class that it was.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from iterative_ppo.config import LoRAConfig
from iterative_ppo.errors import ModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOG = logging.getLogger(__name__)
ALL_LINEAR = "all-linear"
OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""First weights of adapters that peft takes out of the weights below them, each time that it loads them."""
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
    """Put an adapter into a copy without weights, before there is anything to train.

    Raises ModelError where the model has no layer of any name in `policy.lora.target_modules`, where peft refuses a
    layer, or where `check_apart` does; a name that it lacks beside others is told.
    """
    trial, how = _without_weights(model), _peft_config(model, config)
    refusal = None
    try:
        _inject(trial, how, "trial")
    except ModelError as error:
        refusal = error
    if absent := _absent(model, how) if config.target_modules else []:
        linear = sorted({_last(name) for name, part in model.named_modules() if isinstance(part, LINEAR)})
        hint = "" if isinstance(config.target_modules, str) else did_you_mean(absent[0], linear)
        said = (
            f"policy.lora.target_modules: {_name(model)} has no layer named {' or '.join(absent)}{hint}; "
            f"it has {', '.join(linear)}"
        )
        if refusal:
            raise ModelError(said)
        _LOG.warning("%s; the other names carry adapters", said)
    if refusal:
        raise refusal
    check_apart(trial, _name(model))


def check_loaded(model: PreTrainedModel, name: str) -> None:
    """Raise ModelError where what came with a directory of adapters cannot be copied or merged into the weights."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    for how in model.peft_config.values() if has_adapters(model) else ():
        _check_kind(model, how, name)
    whole = sorted({_last(n) for n, part in model.named_modules() if isinstance(part, AuxiliaryTrainingWrapper)})
    if whole:
        raise ModelError(
            f"{name}: its adapters replace {', '.join(whole)} too (modules_to_save or trainable tokens), which "
            "is not kept here; merge them by peft's merge_and_unload, and name what that saves"
        )
    check_apart(model, name)


def _check_kind(model: PreTrainedModel, how: Any, name: str) -> None:
    from peft import LoraConfig

    merge = "merge them by peft's merge_and_unload, and name what that saves"
    if not isinstance(how, LoraConfig):
        raise ModelError(f"{name}: its adapters are {how.peft_type.value}, and only LoRA's can be trained on; {merge}")
    if isinstance(how.init_lora_weights, str) and how.init_lora_weights.startswith(OF_THE_BASE):
        raise ModelError(
            f"{name}: its adapters were made by {how.init_lora_weights}, which changes the weights below them as they "
            f"are loaded, so that a copy would be another policy; {merge}"
        )
    if how.lora_bias and any(getattr(layer.get_base_layer(), "bias", None) is None for layer in _layers(model)):
        raise ModelError(f"{name}: its adapters add a bias (lora_bias) to layers that have none; {merge}")


def check_apart(model: PreTrainedModel, name: str) -> None:
    """Raise ModelError where an adapter's layer shares its weights with another, as a tied vocabulary head does.

    The adapter changes what that layer alone says; merged into the weights, it would change both.
    """
    owners: dict[torch.nn.Parameter, set[torch.nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    layers = set(_layers(model))
    adapted = {layer.get_base_layer(): place for place, layer in model.named_modules() if layer in layers}
    shared = sorted({_last(adapted[m]) for some in owners.values() if len(some) > 1 for m in some if m in adapted})
    if shared:
        raise ModelError(
            f"{name}: an adapter of {', '.join(shared)} cannot be merged, since the layer shares its weights with "
            "another (tied embeddings); leave it out of policy.lora.target_modules, or untie the weights"
        )


def add(model: PreTrainedModel, config: LoRAConfig, start: str | None) -> str:
    """Put a new adapter into the model and switch it on: a copy of the adapter `start`, or one that changes nothing.

    Raises ModelError where peft refuses a layer; what `check` says of it first is plainer.
    """
    name = f"adapter{len(model.peft_config) if has_adapters(model) else 0}"
    before = set(model.parameters())
    _inject(model, _copied(model, start) if start else _peft_config(model, config), name)
    for parameter in set(model.parameters()) - before:
        parameter.data = parameter.data.float()
    if start:
        _copy_weights(model, start, name)
    switch(model, name)
    return name


def _inject(model: PreTrainedModel, how: Any, name: str) -> None:
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a second adapter, which is what we want
            warnings.filterwarnings("ignore", ".*_pattern keys did not match", RuntimeWarning)  # of experts, untrue
            torch.manual_seed(0)
            model.add_adapter(how, name)
    except ValueError as error:
        raise ModelError(
            f"policy.lora: {_name(model)} cannot carry it ({' '.join(str(error).split())[:300]})"
        ) from None


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the layers, on the meta device, sharing what the model shares."""
    memo: dict[int, Any] = {id(p): torch.nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): b.to("meta") for b in model.buffers()})


def _absent(model: PreTrainedModel, how: Any) -> list[str]:
    """Targets that no layer has; peft keeps as targets what it has not made parameters of experts."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if isinstance(how.target_modules, str):
        every = how.target_modules.lower() == ALL_LINEAR
        found = every or any(check_target_module_exists(how, name) for name, _ in model.named_modules())
        return [] if found else [how.target_modules]
    names = {f".{name}" for name, _ in model.named_modules()}
    return [t for t in sorted(how.target_modules) if not any(name.endswith(f".{t}") for name in names)]


def _name(model: PreTrainedModel) -> str:
    return model.name_or_path or str(model.config.model_type)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


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


def check_same(model: PreTrainedModel, adapter: str, config: LoRAConfig, path: Path | str) -> None:
    """Raise ModelError where an adapter is not what `policy.lora` says, or peft makes no copy of it to train on."""
    how: Any = model.peft_config[adapter]
    for name, found, wanted in (("rank", how.r, config.rank), ("alpha", how.lora_alpha, config.alpha)):
        if found != wanted:
            raise ModelError(
                f"{path}: holds adapters of {name} {found}, policy.lora.{name} is {wanted}; "
                f"set it to {found}, or merge the adapters into their base first"
            )
    _inject(_without_weights(model), _copied(model, adapter), "trial")


def _copied(model: PreTrainedModel, adapter: str) -> Any:
    """The configuration of a copy of an adapter, whose first weights change nothing: its own come after."""
    how: Any = copy.deepcopy(model.peft_config[adapter])
    how.init_lora_weights = True
    return how


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
        target_modules=config.target_modules or ALL_LINEAR,
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
