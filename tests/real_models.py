"""Small models as their owners would save them: a family's own tokenizer habits, with and without a chat template."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from iterative_ppo.learning.language_model import PolicySettings

SETTINGS = PolicySettings(0.9, 600, 8, "<|abstain|>")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 640,
    "initializer_range": 0.2,
}
GEMMA = SIZES | {"query_pre_attn_scalar": 8, "sliding_window": 16, "tie_word_embeddings": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"tie_word_embeddings": False},
    "qwen2": SIZES | {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 640, "initializer_range": 0.2},
    "gemma2": GEMMA | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
}
ENDS = {"llama": "<|end|>", "qwen2": "<|im_end|>", "gpt2": "<|endoftext|>", "gemma2": "<eos>"}
TEMPLATES = {
    "llama": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "qwen2": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "gpt2": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}<|endoftext|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "gemma2": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
}
SPECIAL = {
    "llama": {"bos_token": "<|begin|>"},
    "qwen2": {"pad_token": "<|endoftext|>"},
    "gpt2": {"bos_token": "<|endoftext|>"},
    "gemma2": {"bos_token": "<bos>", "pad_token": "<pad>"},
}
MORE = {
    "llama": ["<|reserved|>"],
    "qwen2": ["<|im_start|>"],
    "gpt2": [],
    "gemma2": ["<start_of_turn>", "<end_of_turn>"],
}
ADD_FIRST = ("llama", "gemma2")


def build_tokenizer(family: str, texts: Iterable[str], chat: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE; Llama and Gemma put a first token before every text, Llama and GPT-2 have no padding token."""
    named = {"eos_token": ENDS[family], **SPECIAL[family]}
    special = sorted({*named.values(), *MORE[family]})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if family in ADD_FIRST:
        first = named["bos_token"]
        known = [(first, tokenizer.token_to_id(first))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=known)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=MORE[family], clean_up_tokenization_spaces=False, **named
    )
    if chat:
        made.chat_template = TEMPLATES[family]
    return made


def save_model(path: Path, family: str, texts: Iterable[str], chat: bool = False, **changes: Any) -> Path:
    """A causal LM of a family with fresh weights and its tokenizer, with more rows than tokens, as many have."""
    tokenizer = build_tokenizer(family, texts, chat)
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    ids = {f"{name}_id": value for name, value in ids.items()}
    sizes = {"vocab_size": len(tokenizer) + 6, **FAMILIES[family], **ids, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
