"""Methods that can be run on a dataset's features. To add one, write a file and add the method to `_OWN` below."""

from __future__ import annotations

from typing import Any

from fastcoop.errors import unknown
from fastcoop.methods.adapters import ADAPTERS
from fastcoop.methods.base import Method, MethodSettings, Outcome, RunContext, expand
from fastcoop.methods.cocoop import CoCoOpMethod
from fastcoop.methods.coop import CoOpMethod
from fastcoop.methods.data import Data
from fastcoop.methods.finetune_image_encoder import FinetuneImageEncoderMethod
from fastcoop.methods.linear_probe import LinearProbeMethod
from fastcoop.methods.regularized import KgCoOpMethod, ProGradMethod
from fastcoop.methods.scores import Classifier, LinearClassifier, Scores, score, unit
from fastcoop.methods.spec import FeatureBank, RunSpec
from fastcoop.methods.tcp import TCPMethod
from fastcoop.methods.text_learner import TextBiasMethod, TextTransformMethod
from fastcoop.methods.zero_shot import EnsembleMethod, ZeroShotMethod
from fastcoop.plugins import Registry


def _prepare(name: str, given: Any) -> Method[Any]:
    """Return the method that an installed package provides: a subclass of `Method` or an instance of one."""
    method = given() if isinstance(given, type) else given
    if not isinstance(method, Method):
        raise TypeError(f"expected a fastcoop.methods.Method, got {type(method).__name__}")
    if method.name != name:
        raise ValueError(f'its attribute name is "{method.name}"')
    return method


_OWN: tuple[Method[Any], ...] = (  # in the order in which a sweep runs them, the fastest first
    ZeroShotMethod(), EnsembleMethod(), *ADAPTERS, LinearProbeMethod(), TextTransformMethod(), TextBiasMethod(),
    CoOpMethod(), KgCoOpMethod(), ProGradMethod(), TCPMethod(), CoCoOpMethod(), FinetuneImageEncoderMethod(),
)  # fmt: skip
METHODS = Registry[Method[Any]]("fastcoop.methods", "method", {one.name: one for one in _OWN}, _prepare)


def get_method(name: str) -> Method:
    """Return the method of this name. Raises UserError, with the nearest name, if there is none."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


__all__ = [
    "METHODS", "Classifier", "Data", "FeatureBank", "LinearClassifier", "Method", "MethodSettings", "Outcome",
    "RunContext", "RunSpec", "Scores", "expand", "get_method", "score", "unit",
]  # fmt: skip
