"""fastcoop: prompt learning for CLIP (CoOp), many runs at once, exactly.

import fastcoop as fc
backbone = fc.load_backbone("RN50", pretrained="openai")
classifier = fc.CoOpClassifier(backbone, context_length=16).fit(features, labels, class_names=["cat", "dog"])
encoder = fc.PromptEncoder(backbone, ["cat", "dog"], fc.PromptLayout(16, "end"))
weights = encoder(contexts)   # (runs, M, width) -> (runs, classes, dim), differentiable

Functions have the names of the commands: ``cache_features``, ``sweep``, ``evaluate``, ``report``, ``interpret``,
``import_coop``, ``export_run``, ``predict``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fastcoop.memo import late_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone, backbone_from_spec, load_backbone
    from fastcoop.datasets import Dataset, few_shot, load_dataset, write_class_names
    from fastcoop.engine import (
        CrossEntropy,
        FastSchedule,
        Images,
        Objective,
        PromptEncoder,
        PromptLearner,
        PullToPrompt,
        Run,
        Trained,
        encode_prompts,
        train,
    )
    from fastcoop.errors import FastcoopError, MissingFile, UserError
    from fastcoop.exchange import Classifier, export_run, find_run, import_coop, make_classifier, predict
    from fastcoop.features import FeatureStore, PictureFinder, cache_features, check_store, import_features
    from fastcoop.methods.estimators import (
        CLAP,
        GDA,
        TCP,
        CLIPAdapter,
        CoCoOp,
        CoOpClassifier,
        CrossModalLinearProbe,
        KgCoOp,
        LinearProbe,
        LPPlusPlus,
        MethodClassifier,
        ProGrad,
        ProKeR,
        ProLIP,
        PromptEnsemble,
        TaskRes,
        TextBias,
        TextTransform,
        TipAdapter,
        TipAdapterF,
        ZeroShot,
        ZeroShotLinearProbe,
    )
    from fastcoop.prompts import PromptLayout, initial_contexts, nearest_words
    from fastcoop.reports.report import report
    from fastcoop.results import (
        confusion,
        load_contexts,
        load_predictions,
        load_results,
        merge_results,
        mistakes,
        paired_test,
    )
    from fastcoop.sweeps.evaluation import evaluate
    from fastcoop.sweeps.grid_sweep import sweep
    from fastcoop.sweeps.interpretation import interpret
else:  # so that ``fastcoop --help`` loads no torch
    __getattr__ = late_names(__name__)

__all__ = [
    "CLAP", "GDA", "TCP", "Backbone", "CLIPAdapter", "Classifier", "CoCoOp", "CoOpClassifier",
    "CrossEntropy", "CrossModalLinearProbe", "Dataset", "FastSchedule", "FastcoopError", "FeatureStore",
    "Images", "KgCoOp", "LPPlusPlus", "LinearProbe", "MethodClassifier", "MissingFile", "Objective",
    "PictureFinder", "ProGrad", "ProKeR", "ProLIP", "PromptEncoder", "PromptEnsemble", "PromptLayout", "PromptLearner",
    "PullToPrompt", "Run", "TaskRes", "TextBias", "TextTransform", "TipAdapter", "TipAdapterF", "Trained",
    "UserError", "ZeroShot", "ZeroShotLinearProbe", "backbone_from_spec", "cache_features", "check_store",
    "confusion", "encode_prompts", "evaluate", "export_run", "few_shot", "find_run", "import_coop", "import_features",
    "initial_contexts", "interpret", "load_backbone", "load_contexts", "load_dataset", "load_predictions",
    "load_results", "make_classifier", "merge_results", "mistakes", "nearest_words", "paired_test", "predict", "report",
    "sweep", "train", "write_class_names",
]  # fmt: skip

logging.getLogger("fastcoop").addHandler(logging.NullHandler())


def __dir__() -> list[str]:
    return [*globals(), *__all__]
