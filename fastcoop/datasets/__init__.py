"""Datasets: images, class names, splits and few-shot subsets."""

from fastcoop.datasets.dataset import Dataset, Split
from fastcoop.datasets.fewshot import FewShot, few_shot, write_draw
from fastcoop.datasets.load import load_dataset, write_class_names
from fastcoop.datasets.official import Download, OfficialDataset

__all__ = [
    "Dataset", "Download", "FewShot", "OfficialDataset", "Split", "few_shot", "load_dataset", "write_class_names",
    "write_draw",
]  # fmt: skip
