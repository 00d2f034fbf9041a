"""Tests that follow the advice in fastcoop's messages. Each names the sentences that it follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])


def follows(*sentences: str) -> Callable[[Test], Test]:
    """Name the advising sentences, or unmistakable parts of them, that a test produces and follows.

    The names are read from the source by ``sentences.py``, so they must be string literals. A part matches where
    it is contained in the sentence as ``python -m tests.advice.sentences`` prints it: ``{}`` stands for a value.
    """
    return lambda test: test
