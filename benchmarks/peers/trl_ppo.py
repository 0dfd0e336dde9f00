"""One run of TRL 1.12.0's PPOTrainer, in its own virtual environment: `python -m benchmarks.peers.trl_ppo JOB.json`.

Standalone: it knows of the product only the saved models, prompts and numbers that the job names. The reward model is
read at the response's last token (`get_reward`), and the value model starts from it, as in TRL's own examples. The
optimizer is the one of the product: AdamW and the same fall of the rate, a step an update, which is where TRL steps it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer would import it within the measured time
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.peers.measure import training_cost


def arguments(job: dict[str, Any], output: Path) -> PPOConfig:
    """TRL's settings for the job's; what is not named keeps TRL's default."""
    return PPOConfig(
        output_dir=str(output),
        seed=job["seed"],
        total_episodes=job["updates"] * job["batch_size"],
        per_device_train_batch_size=job["batch_size"],
        num_mini_batches=job["batch_size"] // job["minibatch_size"],
        local_rollout_forward_batch_size=job["batch_size"],
        num_ppo_epochs=job["epochs"],
        learning_rate=job["learning_rate"],
        cliprange=job["clip"],
        kl_coef=job["kl_coefficient"],
        lam=job["gae_lambda"],
        gamma=1.0,
        missing_eos_penalty=job["missing_eos_penalty"],
        response_length=job["response_tokens"],
        stop_token="eos",
        temperature=1.0,
        gradient_checkpointing=False,  # TRL's default would be slower
        bf16=False,
        use_cpu=True,
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def trainer_of(job: dict[str, Any], output: Path) -> PPOTrainer:
    """Everything loaded and built, so that only training is measured."""
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32) for _ in range(2))
    reward, value = (AutoModelForTokenClassification.from_pretrained(job["q"], dtype=torch.float32) for _ in range(2))
    prompts = json.loads(Path(job["prompts"]).read_text(encoding="utf-8"))["train"]
    parameters = [*policy.parameters(), *value.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=job["learning_rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(0.1, 1.0 - 0.9 * k / job["updates"]))
    return PPOTrainer(
        args=arguments(job, output),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:1]}),
        optimizers=(optimizer, schedule),
    )


def main() -> None:
    """Train as the job says, save the policy, and write what training cost."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    output = Path(job["output"])
    trainer = trainer_of(job, output)
    with training_cost() as cost:
        trainer.train()
    trainer.policy_model.save_pretrained(output / "model")
    trainer.processing_class.save_pretrained(output / "model")
    (output / "cost.json").write_text(json.dumps(cost), encoding="utf-8")


if __name__ == "__main__":
    main()
