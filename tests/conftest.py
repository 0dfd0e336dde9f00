"""What many tests share, made once a session: scripted conversations, and tiny policies that speak their language."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import flows  # noqa: F401 (sets the environment that Prefect and transformers read when they are imported)
from iterative_ppo.config import Config, load_config

if TYPE_CHECKING:
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.mdp.conversation import Conversation

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")

TINY = {
    "policy.hidden_size": 32,
    "policy.heads": 2,
    "policy.layers": 2,
    "policy.max_prompt_tokens": 256,
    "policy.max_response_tokens": 16,
    "supervised.epochs": 14.0,
    "supervised.learning_rate": 0.01,
}


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    return load_config(overrides=TINY)


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """A Prefect server of the module's own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny policies `policy0`... and a Q `q`, saved, beside a fresh MLflow store. Tests copy what they change."""
    from policy_store import save_models

    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def scripted() -> list[Conversation]:
    """60 conversations of the scripted agent with simulated customers."""
    from iterative_ppo.environments.renovation import Renovation, Script
    from iterative_ppo.environments.rollout import collect

    return collect(Script(0.6), Renovation(), 60, seed=1, policy_version="script")


@pytest.fixture(scope="session")
def untrained_policy(tiny_config: Config, scripted: list[Conversation]) -> LanguagePolicy:
    """Fresh weights, a word tokenizer that knows the scripted conversations. Tests leave its weights alone."""
    import torch

    from iterative_ppo.learning.tiny import build_policy

    torch.set_num_threads(1)
    return build_policy(scripted, tiny_config.policy, seed=0)


@pytest.fixture(scope="session")
def tiny_policy(tiny_config: Config, scripted: list[Conversation], untrained_policy: LanguagePolicy) -> LanguagePolicy:
    """Briefly fine-tuned: most of its responses are short, ended and made of known words. Tests leave it alone."""
    from iterative_ppo.learning.supervised import fine_tune

    sequences = [s for talk in scripted for s in untrained_policy.renderer.encode(talk)[0]]
    policy, _ = fine_tune(untrained_policy, sequences, tiny_config.supervised, seed=0)
    return policy
