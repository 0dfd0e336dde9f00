"""A tiny policy made from a corpus: a tokenizer trained on its messages and a small model with fresh weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from iterative_ppo.config import PolicyConfig
from iterative_ppo.learning.language_model import LanguagePolicy, PolicySettings
from iterative_ppo.mdp.conversation import Conversation
from iterative_ppo.mdp.rendering import MARKERS

# The usual .02 leaves attention of so narrow a model flat: copying a word from the prompt was then not learnt in time.
INITIALIZER_RANGE = 0.1
PAD, EOS, UNKNOWN = "<|pad|>", "<|eos|>", "<|unk|>"


def messages(conversations: Iterable[Conversation]) -> Iterable[str]:
    """Every text in some conversations that a tokenizer should know."""
    for talk in conversations:
        if talk.context:
            yield talk.context
        for turn in talk.turns:
            suggested = turn.suggestion.text if turn.suggestion else None
            yield from (text for text in (turn.customer_message, suggested, turn.business_message) if text)


def train_tokenizer(texts: Iterable[str], config: PolicyConfig) -> PreTrainedTokenizerBase:
    """A word tokenizer (unknown words share a token) or a byte-level BPE that knows every text."""
    special = [PAD, EOS, UNKNOWN, config.abstain, *MARKERS.values()]
    if config.tokenizer == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation(behavior="isolated")]
        )
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        how: dict[str, Any] = {"vocab_size": config.vocabulary, "special_tokens": special, "show_progress": False}
        trainer: Any = trainers.WordLevelTrainer(**how)
    else:
        tokenizer = Tokenizer(models.BPE())
        # The space before a message makes its first word the same token as within one, so that it can be copied.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[config.abstain, *MARKERS.values()],
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, config: PolicyConfig, seed: int) -> PreTrainedModel:
    """A small causal LM with fresh weights. Its positions cover a whole prompt and response."""
    positions = config.max_prompt_tokens + config.max_response_tokens
    families: dict[str, dict[str, Any]] = {
        "gpt2": {
            "n_embd": config.hidden_size,
            "n_inner": 2 * config.hidden_size,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_positions": positions,
            "activation_function": "relu",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "llama": {
            "hidden_size": config.hidden_size,
            "intermediate_size": 2 * config.hidden_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.heads,
            "max_position_embeddings": positions,
            "tie_word_embeddings": True,
        },
    }
    sizes = families[config.architecture]
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model_config = AutoConfig.for_model(
        config.architecture, vocab_size=len(tokenizer), initializer_range=INITIALIZER_RANGE, **sizes, **ids
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config)
        if config.copying_start:
            begin_by_copying(model)
    return model


def begin_by_copying(model: Any) -> None:
    """Let the last layer's attention say again the tokens that it looks at: its output undoes its values.

    Copying a customer's word is then a matter of looking at it; from weights at random it was not learnt in time.
    Products of attention's weights near the identity as a start are of Trockman and Kolter (2023, arXiv 2305.09828).
    """
    size = model.config.hidden_size
    rotation = torch.linalg.qr(torch.randn(size, size))[0]
    with torch.no_grad():
        if model.config.model_type == "gpt2":  # whose layers multiply from the right
            last = model.transformer.h[-1].attn
            last.c_attn.weight[:, 2 * size :] = rotation.T
            last.c_proj.weight.copy_(rotation)
        else:
            last = model.model.layers[-1].self_attn
            last.v_proj.weight.copy_(rotation)
            last.o_proj.weight.copy_(rotation.T)


def build_policy(
    conversations: Iterable[Conversation], config: PolicyConfig, seed: int, device: str = "cpu"
) -> LanguagePolicy:
    """An untrained tiny policy whose tokenizer knows the corpus."""
    tokenizer = train_tokenizer(messages(conversations), config)
    model: Any = build_model(tokenizer, config, seed)
    return LanguagePolicy(model.to(device), tokenizer, PolicySettings.of(config))
