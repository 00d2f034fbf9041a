"""fastcoop: prompt learning for CLIP (CoOp), many runs at once, exactly.

import fastcoop as fc
backbone = fc.load_backbone("RN50", pretrained="openai")
encoder = fc.PromptEncoder(backbone, ["cat", "dog"], fc.PromptLayout(16, "end"))
weights = encoder(contexts)   # (runs, M, width) -> (runs, classes, dim), differentiable

Everything that the commands do is here by the same names: ``cache_features``, ``sweep``, ``load_results``,
``evaluate``, ``report``, ``interpret``, ``import_coop``, ``export_run``, ``predict``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone, backbone_from_spec, load_backbone
    from fastcoop.datasets import Dataset, few_shot, load_dataset
    from fastcoop.engine import PromptEncoder, PromptLearner, Run, Trained, encode_prompts, train
    from fastcoop.errors import UserError
    from fastcoop.exchange import Classifier, export_run, find_run, import_coop, make_classifier
    from fastcoop.exchange.prediction import predict
    from fastcoop.features import FeatureStore, cache_features, check_store, import_features
    from fastcoop.prompts import PromptLayout, initial_contexts, nearest_words
    from fastcoop.reports.report import report
    from fastcoop.results import load_contexts, load_predictions, load_results, merge_results, paired_test
    from fastcoop.sweeps.evaluate import evaluate
    from fastcoop.sweeps.interpret import interpret
    from fastcoop.sweeps.sweep import sweep

_HOME = {
    "backbones": ("Backbone", "backbone_from_spec", "load_backbone"),
    "datasets": ("Dataset", "few_shot", "load_dataset"),
    "features": ("FeatureStore", "cache_features", "check_store", "import_features"),
    "prompts": ("PromptLayout", "initial_contexts", "nearest_words"),
    "engine": ("PromptEncoder", "PromptLearner", "Run", "Trained", "encode_prompts", "train"),
    "results": ("load_contexts", "load_predictions", "load_results", "merge_results", "paired_test"),
    "sweeps": ("evaluate", "sweep"),
    "sweeps.interpret": ("interpret",),
    "exchange": ("Classifier", "export_run", "find_run", "import_coop", "make_classifier", "predict"),
    "reports": ("report",),
    "errors": ("UserError",),
}
_ROOM = {name: room for room, names in _HOME.items() for name in names}

__all__ = [
    "Backbone",
    "Classifier",
    "Dataset",
    "FeatureStore",
    "PromptEncoder",
    "PromptLayout",
    "PromptLearner",
    "Run",
    "Trained",
    "UserError",
    "backbone_from_spec",
    "cache_features",
    "check_store",
    "encode_prompts",
    "evaluate",
    "export_run",
    "few_shot",
    "find_run",
    "import_coop",
    "import_features",
    "initial_contexts",
    "interpret",
    "load_backbone",
    "load_contexts",
    "load_dataset",
    "load_predictions",
    "load_results",
    "make_classifier",
    "merge_results",
    "nearest_words",
    "paired_test",
    "predict",
    "report",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``fastcoop --help`` need not load torch."""
    if name not in _ROOM:
        raise AttributeError(f"module 'fastcoop' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fastcoop.{_ROOM[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
