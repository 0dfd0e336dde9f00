"""Whether a configuration suits its model and corpus: a person is told of what does not.

Refused is only what would be another pipeline in the place of this one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iterative_ppo.config import Config, PolicyConfig
from iterative_ppo.errors import ConfigError, StoreError
from iterative_ppo.files import content_hash
from tasks.datasets import round_folder
from tasks.stage import inputs_of

if TYPE_CHECKING:
    from iterative_ppo.mdp.conversation import Conversation
    from iterative_ppo.mdp.rendering import Renderer

_LOG = logging.getLogger(__name__)
INITIAL = "initial_policy"
"""The folder of pi_0's stage in that of the first round."""
TINY_WEIGHTS = 20_000_000
HIGHEST_RATE = 3e-4
"""The highest learning rate that is usual for a pretrained model, of adapters; a tenth of it for all weights."""
TOLD_SHARE = 0.02
"""Of a corpus, above which a person is told that the policy's limits cut it."""


def tell_of_rates(config: Config, weights: int, trained: set[str]) -> None:
    """Tell of learning rates that are for tiny models, where the policy is none.

    Args:
        trained: sections of the configuration that hold the rates.
    """
    rates = _rates(config.model_dump(include=trained))
    high = [f"{name} = {rate:g}" for name, rate in rates if rate > HIGHEST_RATE]
    if weights > TINY_WEIGHTS and high:
        _LOG.warning(
            "the policy has %.0f million weights, and learning rates are those of tiny models, which would undo "
            "what it knows: %s; see configs/pretrained.yaml",
            weights / 1e6,
            ", ".join(high),
        )


def check_base(config: Config) -> None:
    """Raise ConfigError where policy.base_model is another model than the one whose descendants are here.

    One that lies elsewhere now is known by its content; of a name in the place of a path there is only a warning.
    """
    wanted = config.policy.base_model
    try:
        inputs = inputs_of(round_folder(config, 0) / INITIAL)
    except StoreError:  # as where the folder of the first round was cleared away
        return
    made_of = inputs.get("policy", {}).get("base_model", wanted)
    if wanted is None or wanted == made_of:
        return
    place = Path(wanted)
    if place.exists() and content_hash(place) in (inputs.get("base") or ()):
        return
    if made_of and not (place.exists() and "base" in inputs):
        _LOG.warning(
            "policy.base_model %s: the policies here were made of %s; nobody knows if it is that", wanted, made_of
        )
        return
    had = f"made of {made_of}" if made_of else "a tiny model made from the log or corpus alone"
    raise ConfigError(
        f"policy.base_model {wanted}: the policies of {config.data.root} begin with another, {had}; give this one a "
        "data.root and a tracking store of its own (tracking.uri, tracking.artifacts)"
    )


def tell_of_kept_settings(config: Config, version: int, place: Path) -> None:
    """Tell of settings under which a policy version does not speak: it keeps those that pi_0 was made with."""
    from iterative_ppo.learning.language_model import PolicySettings, read_policy_settings

    kept, today = (asdict(one) for one in (read_policy_settings(place), PolicySettings.of(config.policy)))
    changed = (name for name in today if today[name] != kept[name])
    if others := [f"policy.{name} = {today[name]!r} (its {kept[name]!r})" for name in changed]:
        _LOG.warning(
            "policy version %d keeps the settings that the first policy was made with, and does not take up %s; a "
            "data.root and a tracking store of their own begin with them",
            version,
            ", ".join(others),
        )


def _rates(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _rates(value, f"{at}{name}.")
        elif name.endswith("learning_rate"):
            yield f"{at}{name}", float(value)


def cut_by_limits(
    corpus: Sequence[Conversation], forgotten: Sequence[int], renderer: Renderer, limits: PolicyConfig
) -> dict[str, float]:
    """Shares of the corpus: suggestions it could not say whole, conversations whose beginning it forgets.

    Args:
        forgotten: of each conversation, how many turns its prompts leave out.
    """
    actions = [turn.suggestion for talk in corpus for turn in talk.turns]
    said = [len(renderer.response(action)) for action in actions if action and action.status != "missing"]
    lengths = np.array(said, dtype=np.int64)
    if not len(lengths):
        return {}
    found = {
        "longer_suggestions": float((lengths > limits.max_response_tokens).mean()),
        "longer_conversations": float(np.mean([cut > 0 for cut in forgotten])),
    }
    if found["longer_suggestions"] > TOLD_SHARE:
        _LOG.warning(
            "%.0f %% of the corpus's %d suggestions are longer than policy.max_response_tokens = %d, so the policy "
            "will be cut short where it means to say the like; 99 %% of them have at most %d tokens: set it to that",
            100 * found["longer_suggestions"],
            len(lengths),
            limits.max_response_tokens,
            int(np.quantile(lengths, 0.99, method="higher")),
        )
    if found["longer_conversations"] > TOLD_SHARE:
        _LOG.warning(
            "%.0f %% of the corpus's %d conversations are longer than policy.max_prompt_tokens = %d, so the policy "
            "does not see how they began; raise it as far as memory, time and the model's context allow",
            100 * found["longer_conversations"],
            len(corpus),
            limits.max_prompt_tokens,
        )
    return found
