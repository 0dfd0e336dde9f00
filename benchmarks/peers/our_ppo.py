"""One run of our PPO: `python -m benchmarks.peers.our_ppo JOB.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 (the first optimizer would import it within the measured time)

from benchmarks.peers.measure import training_cost
from iterative_ppo.config import Config, load_config
from iterative_ppo.files import read_json, write_json
from iterative_ppo.learning import runtime
from iterative_ppo.learning.improve.ppo import improve
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.q_model import QModel

SAME_NAME = (
    "epochs",
    "minibatch_size",
    "learning_rate",
    "clip",
    "kl_coefficient",
    "gae_lambda",
    "missing_eos_penalty",
)


def configuration(job: dict[str, Any]) -> Config:
    """Our settings for the job's; `overrides` in the job are settings that TRL does not know."""
    ppo = {f"improve.ppo.{name}": job[name] for name in SAME_NAME}
    ppo |= {"improve.ppo.rollout": job["batch_size"], "improve.ppo.episodes": job["updates"] * job["batch_size"]}
    return load_config(None, {**ppo, **job["overrides"]})


def main() -> None:
    """Train as the job says, save the policy, and write what training cost."""
    job = read_json(Path(sys.argv[1]))
    output = Path(job["output"])
    config = configuration(job)
    policy, q = LanguagePolicy.load(job["policy"]), QModel.load(Path(job["q"]))
    prompts = [tuple(prompt) for prompt in json.loads(Path(job["prompts"]).read_text(encoding="utf-8"))["train"]]
    with runtime.computing(config.runtime), training_cost() as cost:
        improved, _ = improve(policy, q, prompts, config.improve.ppo, job["seed"])
    improved.save(output / "model")
    write_json(output / "cost.json", cost)


if __name__ == "__main__":
    main()
