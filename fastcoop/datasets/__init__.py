"""Which images exist, what their classes are called, how they are split, and which few are drawn."""

from fastcoop.datasets.dataset import Dataset, Split
from fastcoop.datasets.fewshot import FewShot, few_shot
from fastcoop.datasets.load import load_dataset

__all__ = ["Dataset", "FewShot", "Split", "few_shot", "load_dataset"]
