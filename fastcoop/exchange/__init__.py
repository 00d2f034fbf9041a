"""Import checkpoints of the official code; export them, contexts, and classifiers that need no fastcoop."""

from fastcoop.exchange.classifier import Classifier, make_classifier
from fastcoop.exchange.imported import ImportedRun, import_coop
from fastcoop.exchange.prediction import Prediction, image_files, predict
from fastcoop.exchange.runs import FORMATS, LearnedRun, export_run, find_run

__all__ = [
    "FORMATS",
    "Classifier",
    "ImportedRun",
    "LearnedRun",
    "Prediction",
    "export_run",
    "find_run",
    "image_files",
    "import_coop",
    "make_classifier",
    "predict",
]
