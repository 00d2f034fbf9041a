"""Every sentence that tells people to do something is followed by a test, or says why it cannot be."""

from __future__ import annotations

from tests.advice.sentences import CANNOT_FOLLOW, advising, followed, open_sentences


def test_every_advising_sentence_is_followed_by_a_test() -> None:
    assert not [f"{one.path}:{one.line}: {one.text}" for one in open_sentences()]


def test_tests_name_sentences_that_exist() -> None:
    sentences = [one.text for one in advising()]
    stale = {part: test for part, test in followed().items() if not any(part in text for text in sentences)}
    assert not stale
    assert not [part for part in CANNOT_FOLLOW if not any(part in text for text in sentences)]
