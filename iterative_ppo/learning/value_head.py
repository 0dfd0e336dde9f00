"""A network with a head a token, on the backbone of any causal LM."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForTokenClassification

from iterative_ppo.errors import ModelError
from iterative_ppo.learning.forward import backbone, holds


def value_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """A head a token on every causal LM: transformers has one for half of the families (none for Gemma 3, OPT)."""
    kind = type(config)
    known: Any = AutoModelForTokenClassification._model_mapping
    causal_lms: Any = AutoModelForCausalLM._model_mapping
    if kind in known:
        head: type[PreTrainedModel] = known[kind]
        return head
    if kind not in causal_lms:
        raise ModelError(f"{config.model_type}: not a causal language model, so it can carry no Q")
    causal = causal_lms[kind]
    with torch.device("meta"):
        width = causal(config).get_output_embeddings().weight.shape[1]
    family = next(base for base in causal.__mro__ if base.__name__.endswith("PreTrainedModel"))
    parts = {"config_class": kind, "__module__": causal.__module__, "width": width}
    return type(f"{causal.__name__}WithValue", (_WithValue, family), parts)


class _WithValue(GenericForTokenClassification):
    """A head as wide as the vocabulary's; OPT-350m's backbone returns less than its hidden size."""

    width: int

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        own: Any = self
        if own.score.in_features != self.width:
            own.score = torch.nn.Linear(self.width, config.num_labels, bias=own.score.bias is not None)
            own._init_weights(own.score)


def check_backbone(model: PreTrainedModel, name: str) -> None:
    """Raise ModelError where a value network of the family has another backbone, so that no Q could start from this.

    BART's is an encoder with its decoder, of which the causal language model is the decoder alone.
    """

    def same() -> bool:
        with torch.device("meta"):
            network = value_class(model.config)(model.config)
        own, theirs = (backbone(one).state_dict() for one in (model, network))
        return {key: weight.shape for key, weight in own.items()} == {key: w.shape for key, w in theirs.items()}

    if not holds(same):
        raise ModelError(
            f"{name}: Q cannot start from its backbone, for transformers knows none of {model.config.model_type} that "
            "is a decoder alone; expected a decoder-only language model"
        )
