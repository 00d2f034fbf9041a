"""Where contexts start, and the words they are near."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout, initial_contexts, nearest_words, random_distances, word_tokens


def test_random_contexts_follow_their_seed_and_spread(backbone):
    layout = PromptLayout(16, class_specific=True)
    first = initial_contexts(backbone, layout, 50, seed=1)
    assert first.shape == (50, 16, 32)
    assert first.dtype == torch.float32
    assert torch.equal(first, initial_contexts(backbone, layout, 50, seed=1))
    assert not torch.equal(first, initial_contexts(backbone, layout, 50, seed=2))
    assert float(first.std()) == pytest.approx(0.02, rel=0.02)


def test_words_become_their_embeddings_one_vector_per_token(backbone):
    tokens = word_tokens(backbone, "a photo of a")
    contexts = initial_contexts(backbone, PromptLayout(4, class_specific=True), 3, 0, "a photo of a")
    assert contexts.shape == (3, 4, 32)
    for k in range(3):
        assert torch.equal(contexts[k], backbone.model.token_embedding.weight[tokens])
    with pytest.raises(UserError, match="are 4 tokens, but the context length is 16; set"):
        initial_contexts(backbone, PromptLayout(16), 3, 0, "a photo of a")
    with pytest.raises(UserError, match="Expected words to start the context from, got none"):
        word_tokens(backbone, " ")


def test_nearest_words_are_those_of_the_full_distance_matrix(backbone):
    torch.manual_seed(0)
    embeddings = backbone.model.token_embedding.weight
    vectors = torch.cat([embeddings[[320, 1929]] + 0.001, torch.randn(3, 32)])
    found = nearest_words(backbone, vectors, k=4)
    distances = torch.cdist(vectors.double(), embeddings[:49406].double())
    expected, tokens = distances.topk(4, largest=False)
    assert torch.equal(found.tokens, tokens)
    torch.testing.assert_close(found.distances.double(), expected, rtol=1e-4, atol=1e-6)
    assert found.words[0][0] == "a"
    assert found.words[1][0] == "dog"
    assert nearest_words(backbone, vectors.numpy(), k=4).words == found.words


def test_the_distance_of_a_random_vector_depends_on_no_other_vector(backbone):
    lengths = torch.tensor([0.0, 0.05, 0.1, 0.3])
    beside_a_long_one = random_distances(backbone, torch.cat([lengths, torch.tensor([1000.0])]))[:-1]
    alone = torch.cat([random_distances(backbone, length[None]) for length in lengths])
    torch.testing.assert_close(beside_a_long_one, alone)
    directions = torch.nn.functional.normalize(
        torch.randn(200, 32, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    words = backbone.model.token_embedding.weight[:49406]  # without the two special tokens
    plain = torch.stack([torch.cdist(length * directions, words).amin(1).mean() for length in lengths])
    torch.testing.assert_close(alone, plain, rtol=0.02, atol=0.0)


def test_untrained_tokens_are_left_out_where_the_backbone_knows_them(backbone):
    trained = torch.zeros(49408, dtype=torch.bool)
    trained[[320, 1929, 2368]] = True
    knowing = replace(backbone, trained_tokens=trained)
    vectors = torch.randn(6, 32)
    assert set(nearest_words(knowing, vectors).tokens.unique().tolist()) <= {320, 1929, 2368}
    assert nearest_words(knowing, vectors, k=5).tokens.shape == (6, 3)
    everything = nearest_words(knowing, vectors, trained_only=False).tokens
    assert torch.equal(everything, nearest_words(backbone, vectors).tokens)
