"""An improvement to be killed: `python killed_improvement.py FOLDER` tells each rollout and keeps checkpoints there."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from bandit import build_bandit, leans_to, prompt

from iterative_ppo.config import load_config
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.improve.ppo import improve
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.training import Curve, Progress

SETTINGS = {
    "improve.ppo.episodes": 1536,
    "improve.ppo.rollout": 128,
    "improve.ppo.epochs": 4,
    "improve.ppo.minibatch_size": 16,
    "improve.ppo.learning_rate": 0.003,
}


def improved(kept: Path | None, progress: Progress | None = None) -> tuple[LanguagePolicy, Curve]:
    """The same improvement each time; from where it was left, if it was."""
    torch.set_num_threads(1)
    config = load_config(None, SETTINGS)
    bandit = build_bandit(config)
    checkpoint = Checkpoint(kept, "key") if kept else None
    given = (bandit, leans_to(bandit, "maybe"), [prompt(bandit)], config.improve.ppo, 0)
    return improve(*given, progress=progress, checkpoint=checkpoint)


if __name__ == "__main__":
    improved(Path(sys.argv[1]), lambda done, total: print(done, flush=True))
