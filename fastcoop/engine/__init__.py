"""Encode prompts through the frozen text tower, exactly, and train many runs together: docs/engine.md."""

from typing import TYPE_CHECKING

from fastcoop.memo import late_names

if TYPE_CHECKING:
    from fastcoop.engine.encoder import PromptEncoder, PromptLearner, encode_prompts
    from fastcoop.engine.fit import RunShape, TrainingPlan, plan_training
    from fastcoop.engine.objectives import CrossEntropy, Images, Objective, PullToPrompt
    from fastcoop.engine.runs import Run, Trained
    from fastcoop.engine.schedule import FastSchedule
    from fastcoop.engine.training import train
else:
    __getattr__ = late_names(__name__)

__all__ = [
    "CrossEntropy", "FastSchedule", "Images", "Objective", "PromptEncoder", "PromptLearner",
    "PullToPrompt", "Run", "RunShape", "Trained", "TrainingPlan", "encode_prompts", "plan_training", "train",
]  # fmt: skip
