"""Import and export checkpoints of the official code, export contexts and standalone classifiers, and predict."""

from fastcoop.exchange.classifier import Classifier, Prediction, image_files, predict
from fastcoop.exchange.runs import (
    FORMATS,
    ImportedRun,
    LearnedRun,
    export_run,
    export_text_features,
    find_run,
    import_coop,
    make_classifier,
)

__all__ = [
    "FORMATS", "Classifier", "ImportedRun", "LearnedRun", "Prediction", "export_run", "export_text_features",
    "find_run", "image_files", "import_coop", "make_classifier", "predict",
]  # fmt: skip
