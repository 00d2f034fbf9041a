"""In from the official code, and out: checkpoints, contexts, and finished classifiers that need no fastcoop."""

from fastcoop.exchange.classifier import Classifier, make_classifier
from fastcoop.exchange.exported import FORMATS, export_run
from fastcoop.exchange.imported import Imported, import_coop
from fastcoop.exchange.predict import Prediction, image_files, predict
from fastcoop.exchange.runs import LearnedRun, find_run

__all__ = [
    "FORMATS",
    "Classifier",
    "Imported",
    "LearnedRun",
    "Prediction",
    "export_run",
    "find_run",
    "image_files",
    "import_coop",
    "make_classifier",
    "predict",
]
