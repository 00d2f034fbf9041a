"""Text features of hand-written prompts, and checks of such prompts."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from string import punctuation
from textwrap import shorten
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator

from fastcoop.backbones.planned import count_tokens
from fastcoop.datasets.files import in_prompt
from fastcoop.errors import UserError, abbreviate
from fastcoop.memo import memoize
from fastcoop.methods.data import Data
from fastcoop.methods.late import Backbone, torch
from fastcoop.methods.scores import unit
from fastcoop.methods.spec import RunSpec
from fastcoop.prompts.plain import check_class_prompts, drops_full_stop

log = logging.getLogger("fastcoop")

AT_ONCE = 256  # prompts encoded


def _has_one_place(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError('a prompt needs one "{}" where the class name goes')
    return template


Template = Annotated[str, AfterValidator(_has_one_place)]  # a setting


def fill(template: str, class_names: Sequence[str]) -> list[str]:
    """Return the prompts of a template with one "{}" for the class name. Underscores in names become spaces."""
    return [template.replace("{}", name.replace("_", " ")) for name in class_names]


def check_texts(runs: Iterable[RunSpec[Any]], checked: set[tuple[Any, ...]] | None = None) -> None:
    """Check the class names and prompts of runs, before features are computed.

    Args:
        runs: The runs, with their datasets and targets.
        checked: Prompts that are known to fit; those of these runs are added.

    Raises:
        UserError: A class name reads as nothing, or its prompt is longer than the text tower takes.
    """
    from fastcoop.methods import METHODS

    checked = set() if checked is None else checked
    for run in runs:
        method, backbone = METHODS[run.method], run.model
        for data in run.tests:
            layout = method.layout(run.settings, backbone, data)
            for form in (*method.prompts(run.settings, data), *((layout,) if layout else ())):
                what = (id(backbone), data.class_names, form)
                if what in checked:
                    continue
                check_class_names(backbone, data)
                if isinstance(form, str):
                    check_prompts(backbone, data, form)
                else:
                    check_class_prompts(backbone, data.class_names, form)
                checked.add(what)


def check_prompts(backbone: Backbone, data: Data, template: str) -> None:
    """Raise UserError for a class whose prompt is longer than the text tower reads."""
    limit = backbone.text.context_length
    for name, prompt in zip(data.class_names, fill(template, data.class_names), strict=True):
        if prompt.isascii() and len(prompt) + 4 <= limit:  # a character is one token at most
            continue
        if (tokens := count_tokens(backbone.tokenizer, prompt)) > limit:
            raise UserError(
                f'The prompt "{shorten(template, 60)}" of class "{shorten(name, 60)}" of {data.name} has {tokens} '
                f"tokens with its start and end, but the text tower of {backbone.name} reads at most {limit}; shorten "
                "the prompt, or give the class a shorter name (class_names in the dataset's YAML)."
            )


def check_class_names(backbone: Backbone, data: Data) -> None:
    """Raise UserError for a class name that the backbone's tokenizer reads as nothing; warn of names read alike."""
    _warn_of_names_read_alike(backbone, data.class_names, data.name)
    nothing = backbone.tokenizer([""], context_length=8)
    for name in data.class_names:
        if re.search("[A-Za-z0-9]", name):
            continue
        if bool((backbone.tokenizer([name.replace("_", " ")], context_length=8) == nothing).all()):
            raise UserError(
                f"The class name {name!r} of {data.name} reads as nothing in a prompt of {backbone.name}; give the "
                "class another name (class_names in the dataset's YAML)."
            )


@memoize(64)  # once
def _warn_of_names_read_alike(backbone: Backbone, class_names: tuple[str, ...], dataset: str) -> None:
    """Warn of names that differ by punctuation only, where the tokenizer drops it."""
    if not drops_full_stop(backbone.tokenizer):
        return
    read = defaultdict[str, dict[str, str]](dict)
    for name in class_names:
        spelled = in_prompt(name)  # of equal ones the dataset's own notes warn
        read[" ".join(spelled.translate(str.maketrans("", "", punctuation)).split())][spelled] = name
    for alike in (list(names.values()) for names in read.values() if len(names) > 1):
        log.warning(
            f"The classes {abbreviate(alike)} of {dataset} have the same prompt with {backbone.name}, whose tokenizer "
            "drops punctuation; name them differently (class_names in the dataset's YAML)."
        )


def prompt_features(backbone: Backbone, class_names: tuple[str, ...], template: str) -> np.ndarray:
    """Return text features float32 (classes, dim), of length 1, of class names in a template."""
    return unit(raw_prompt_features(backbone, class_names, template))


@memoize(512)
def raw_prompt_features(backbone: Backbone, class_names: tuple[str, ...], template: str) -> np.ndarray:
    """Return text features float32 (classes, dim), as the text tower gives them, of class names in a template."""
    with torch.no_grad():
        parts = [backbone.encode_text(prompts) for prompts in _prompts_at_once(class_names, template)]
    features = torch.cat(parts).float().cpu().numpy()
    if not np.isfinite(unit(features)).all():
        raise UserError(
            f'{backbone.name} gives text features of the prompt "{template}" that are not finite numbers; check its '
            "weights, and load them in float32."
        )
    return np.asarray(features)


def _prompts_at_once(class_names: Sequence[str], template: str) -> Iterator[list[str]]:
    """Yield the prompts of a template, in the parts that are encoded at once."""
    prompts = fill(template, class_names)
    yield from (prompts[start : start + AT_ONCE] for start in range(0, len(prompts), AT_ONCE))


def encoded_prompts(runs: Iterable[RunSpec[Any]]) -> dict[str, dict[tuple[str, ...], np.ndarray]]:
    """Return what ``Backbone.encode_text`` gives for all prompts of runs that use their backbone for nothing else.

    Returns:
        By name of backbone, the features float32 (n, dim) of each n prompts that are encoded at once.
    """
    from fastcoop.methods import METHODS

    used: dict[tuple[Backbone, tuple[str, ...], str], None] = {}  # a set in order
    for run in runs:
        method, tuning = METHODS[run.method], (run.tuning,) if run.tuning else ()
        for data in () if method.needs_backbone else (run.data, *run.tests, *tuning):
            for template in method.prompts(run.settings, data):
                used[run.model, data.class_names, template] = None
    found: dict[str, dict[tuple[str, ...], np.ndarray]] = {}
    for backbone, class_names, template in used:
        for prompts in _prompts_at_once(class_names, template):
            features = backbone.encode_text(prompts).float().cpu().numpy()
            found.setdefault(backbone.name, {})[tuple(prompts)] = features
    return found


def class_texts(backbone: Backbone, data: Data, template: str | None = None) -> np.ndarray:
    """Return text features float32 (classes, dim), of length 1, of the classes in a template or the dataset's own."""
    return unit(raw_class_texts(backbone, data, template))


def raw_class_texts(backbone: Backbone, data: Data, template: str | None = None) -> np.ndarray:
    """Return the same as the text tower gives them, of any length."""
    if data.text_features is not None:
        return data.text_features
    return raw_prompt_features(backbone, data.class_names, template or data.dataset.template)
