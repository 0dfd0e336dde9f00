"""A bridge from a transformers trainer to our progress report."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from tasks.progress import Report


class TrainingBar(TrainerCallback):
    """Reports each optimiser step."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(state.global_step, state.max_steps)
