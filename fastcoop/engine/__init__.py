"""The token forest through the frozen text tower, and many-run training. Sees tensors, never datasets."""

from fastcoop.engine.encoder import PromptEncoder, encode_prompts
from fastcoop.engine.run import Run, Trained
from fastcoop.engine.training import run_costs, train

__all__ = ["PromptEncoder", "Run", "Trained", "encode_prompts", "run_costs", "train"]
