"""Sentences that tests follow are sentences that fastcoop says."""

from __future__ import annotations

from tests.advice.sentences import CANNOT_FOLLOW, advising, followed


def test_tests_name_sentences_that_exist() -> None:
    sentences = [one.text for one in advising()]
    stale = {part: test for part, test in followed().items() if not any(part in text for text in sentences)}
    assert not stale
    assert not [part for part in CANNOT_FOLLOW if not any(part in text for text in sentences)]
