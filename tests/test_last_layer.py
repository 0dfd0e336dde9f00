"""The last layer at the positions that are read: the same values and gradients as a whole pass, whatever the family."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from iterative_ppo.learning import last_layer
from iterative_ppo.learning.forward import last_hidden
from iterative_ppo.learning.sampling import CachedReader
from tests.real_models import FAMILIES, SIZES

MORE: dict[str, dict[str, Any]] = {
    "mixtral": SIZES | {"num_local_experts": 4},
    "mistral": SIZES | {"sliding_window": 4},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "phi3": SIZES | {"pad_token_id": 0},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2},
    "opt": {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "init_std": 0.2}
    | {"word_embed_proj_dim": 16},
    "gemma3_text": SIZES | {"sliding_window": 16},
    "glm_moe_dsa": SIZES
    | {"num_key_value_heads": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
    | {"qk_nope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16},
}
LEFT_OUT = {
    "llama": {"self_attn.o_proj", "mlp", "post_attention_layernorm"},
    "gpt2": {"attn.c_proj", "attn.resid_dropout", "mlp", "ln_2"},
    "opt": {"self_attn.out_proj"},
    "glm_moe_dsa": {"self_attn.o_proj", "mlp", "post_attention_layernorm"},
    "gemma2": set(),
    "bloom": set(),
    "mamba": set(),
}
"""Of those whose attention is their own, nothing."""


def model_of(family: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=60, **(FAMILIES | MORE)[family])
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are read at their end, here and there, at their first position, and once."""
    tokens = torch.randint(60, (4, 30), generator=torch.Generator().manual_seed(1))
    wanted = torch.zeros(4, 30, dtype=torch.bool)
    wanted[0, 24:] = wanted[1, [3, 11, 12]] = wanted[2, [0, 7]] = wanted[3, 29] = True
    return tokens, wanted


def gradients(model: PreTrainedModel, read: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (read * torch.linspace(-1, 1, read.numel()).reshape(read.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def hooked(model: PreTrainedModel) -> set[str]:
    """Parts of the last layer that are given some positions alone."""
    layer = last_layer._last(model)
    assert layer is not None
    return {name for name, part in layer.named_modules() if name and part._forward_pre_hooks}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_what_is_read_is_that_of_a_whole_pass(family: str) -> None:
    """A position that is read twice, as Q's at the end of a turn may be, counts twice.

    One family attends to the 16 tokens of 30 that parts before its attention choose.
    """
    model, (tokens, wanted) = model_of(family), batch()
    row, at = (torch.cat([x, x[:2]]) for x in wanted.nonzero(as_tuple=True))
    expected = last_hidden(model, tokens)[row, at]
    aim = {name: value.clone() for name, value in gradients(model, expected).items()}
    last_layer.prepare(model)
    assert LEFT_OUT.get(family, hooked(model)) == hooked(model)
    assert bool(hooked(model)) == bool(LEFT_OUT.get(family, True))
    read = last_layer.hidden_at(model, tokens, row, at)
    assert torch.allclose(read, expected, atol=1e-5)
    for name, value in gradients(model, read).items():
        assert torch.allclose(value, aim[name], atol=1e-5 * float(1 + aim[name].abs().max())), name
    assert torch.allclose(last_hidden(model, tokens)[row, at], expected, atol=1e-6), "a whole pass is as before"


class Queries(TorchFunctionMode):
    """Counts the queries of each attention."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.counts.append(args[0].shape[2])
        return func(*args, **kwargs or {})


def test_attention_has_the_queries_that_are_read() -> None:
    model, (tokens, wanted) = model_of("llama"), batch()
    last_layer.prepare(model)
    with Queries() as seen:
        last_layer.hidden_at(model, tokens, *wanted.nonzero(as_tuple=True))
        last_layer.hidden_at(model, tokens, *torch.ones_like(wanted).nonzero(as_tuple=True))
    assert seen.counts == [30, 6, 30, 30], "where all are read, none is left out"


OUTPUTS = {"llama": "self_attn.o_proj", "gpt2": "attn.c_proj", "opt": "self_attn.out_proj"}


@pytest.mark.parametrize("family", OUTPUTS)
def test_weights_that_are_zero_now_hide_nothing(family: str) -> None:
    """A layer that begins as the identity gives the same whatever its keys and values are, until it has learnt."""
    model, (tokens, wanted) = model_of(family), batch()
    layer: Any = last_layer._last(model)
    weight = layer.get_submodule(OUTPUTS[family]).weight
    learnt = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    last_layer.prepare(model)
    assert hooked(model) == LEFT_OUT[family]
    with torch.no_grad():
        weight.copy_(learnt)
        found = last_layer.hidden_at(model, tokens, *wanted.nonzero(as_tuple=True))
        assert torch.allclose(found, last_hidden(model, tokens)[wanted], atol=1e-5)


def test_bfloat16_hides_nothing() -> None:
    """The deeper a model, the less its last layer changes, and bfloat16 is compared with a wide tolerance."""
    sizes = {"hidden_size": 128, "ffn_dim": 512, "num_hidden_layers": 24, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model("opt", vocab_size=500, word_embed_proj_dim=128, **sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().bfloat16()
    last_layer.prepare(model)
    assert hooked(model) == LEFT_OUT["opt"]


def test_parts_that_do_not_serve_together_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (tokens, wanted) = model_of("llama"), batch()
    layer: Any = last_layer._last(model)
    leave_out, asked = last_layer._leave_out, list[torch.nn.Module]()

    def spoiled(part: torch.nn.Module) -> list[Any]:
        asked.append(part)
        if asked.count(layer.mlp) == 2:  # the first was the trial
            part.register_forward_hook(lambda *args: args[-1] + 1.0 if last_layer._READ.get() else None)
        return leave_out(part)

    expected = last_hidden(model, tokens)[wanted]
    monkeypatch.setattr(last_layer, "_leave_out", spoiled)
    last_layer.prepare(model)
    assert hooked(model) == set() and not layer._forward_pre_hooks
    assert torch.equal(last_hidden(model, tokens)[wanted], expected)


def test_a_model_of_a_short_context_is_left_whole() -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=60, **FAMILIES["gpt2"] | {"n_positions": 10})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    last_layer.prepare(model)
    assert hooked(model) == set()


def test_a_copy_needs_no_preparation() -> None:
    model, (tokens, wanted) = model_of("llama"), batch()
    last_layer.prepare(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        found = last_layer.hidden_at(other, tokens, *wanted.nonzero(as_tuple=True))
        assert torch.allclose(found, last_hidden(other, tokens)[wanted], atol=1e-5)
        assert not torch.allclose(found, last_hidden(model, tokens)[wanted], atol=1e-2)
    assert pickle.loads(pickle.dumps(other)).num_parameters() == other.num_parameters()
    last_layer.prepare(other)
    assert hooked(other) == LEFT_OUT["llama"]
    assert all(
        len(part._forward_pre_hooks) == 1 for part in last_layer._last(other).children() if part._forward_pre_hooks
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_the_first_token_after_prompts_of_any_length(family: str) -> None:
    """Padded on the left, with a cache that the response goes on from, and windows shorter than the prompts."""
    model = model_of(family)
    last_layer.prepare(model)
    tokens = torch.randint(10, 40, (24,), generator=torch.Generator().manual_seed(2)).tolist()
    prompts = [tuple(tokens), tuple(tokens[:5]), tuple(tokens[3:4])]
    with torch.no_grad(), Queries() as seen:
        reader = CachedReader(model, prompts, 0)
        first = reader.last()
        reader.write(torch.tensor([7, 8, 9]))
        second = reader.last()
    assert seen.counts[:2] == [24, 1]
    with torch.no_grad():
        for k, prompt in enumerate(prompts):
            expected = last_hidden(model, torch.tensor([[*prompt, 7 + k]]))[0, -2:]
            assert torch.allclose(torch.stack([first[k], second[k]]), expected, atol=1e-5)
