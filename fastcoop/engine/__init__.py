"""The token forest through the frozen text tower, and many-run training. Sees tensors, never datasets."""

from fastcoop.engine.encoder import PromptEncoder, encode_prompts
from fastcoop.engine.fit import RunShape, TrainingPlan, plan_training
from fastcoop.engine.run import Run, Trained
from fastcoop.engine.training import train

__all__ = [
    "PromptEncoder", "Run", "RunShape", "Trained", "TrainingPlan", "encode_prompts", "plan_training", "train",
]  # fmt: skip
