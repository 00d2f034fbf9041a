"""Trees hold each distinct prefix once, and their intervals are their ancestors."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcoop.datasets.official import paper_class_names
from fastcoop.prompts import PromptLayout, build_tree, class_prompts
from fastcoop.prompts.layout import Slot

TOKENIZER = open_clip.get_tokenizer("RN50")
CLASS_NAMES = paper_class_names()

SATELLITE = (
    "Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road", "Industrial Buildings",
    "Pasture Land", "Permanent Crop Land", "Residential Buildings", "River", "Sea or Lake",
)  # fmt: skip
TABLE = {  # distinct nodes at M = 16: end, mid, class-specific end
    "eurosat": (61, 133, 205),
    "oxford_pets": (169, 457, 747),
    "dtd": (203, 571, 939),
    "fgvc_aircraft": (572, 1364, 2325),
    "caltech101": (361, 1153, 1948),
    "food101": (427, 1227, 2038),
    "ucf101": (415, 1215, 2031),
    "oxford_flowers": (475, 1283, 2096),
    "stanford_cars": (1147, 2707, 5202),
    "sun397": (1481, 4649, 7933),
    "imagenet": (4020, 11996, 20166),
}


def counts(names) -> tuple[int, ...]:
    layouts = (PromptLayout(16), PromptLayout(16, "mid"), PromptLayout(16, "end", True))
    return tuple(build_tree(class_prompts(TOKENIZER, names, layout)).nodes for layout in layouts)


def test_node_counts_of_ten_land_use_classes():
    assert counts(SATELLITE) == TABLE["eurosat"]


def test_node_counts_counted_by_hand():
    """The drawing in docs/engine.md: one-token names with "." and end are 3 nodes, "maine coon" 4."""
    names = ("boxer", "maine coon", "pug")
    expected = {
        ("end", False): 1 + 4 + 3 + 4 + 3,
        ("mid", False): 1 + 2 + (1 + 2 + 2) + (2 + 2 + 2) + (1 + 2 + 2),
        ("front", False): 1 + (1 + 4 + 2) + (2 + 4 + 2) + (1 + 4 + 2),
        ("end", True): 1 + (4 + 3) + (4 + 4) + (4 + 3),
    }
    for (position, class_specific), nodes in expected.items():
        prompts = class_prompts(TOKENIZER, names, PromptLayout(4, position, class_specific))
        assert build_tree(prompts).nodes == nodes


@pytest.mark.parametrize("dataset", TABLE)
def test_node_counts_of_the_paper_s_datasets(dataset):
    assert counts(CLASS_NAMES[dataset]) == TABLE[dataset]


slots = st.builds(Slot, st.booleans(), st.integers(0, 2))
prompt_lists = st.lists(st.lists(slots, max_size=5), min_size=1, max_size=8)


@settings(deadline=None)
@given(bodies=prompt_lists)
def test_a_tree_is_its_prompts(bodies):
    start, end = Slot(False, 100), Slot(False, 101)
    prompts = [(start, *body, end) for body in bodies]
    tree = build_tree(prompts)
    prefixes = {prompt[:n] for prompt in prompts for n in range(1, len(prompt) + 1)}
    assert tree.nodes == len(prefixes)
    nodes = np.arange(tree.nodes)
    attends = (nodes <= nodes[:, None]) & (nodes[:, None] < tree.subtree_end)
    for prompt, leaf in zip(prompts, tree.leaf, strict=True):
        path = tree.path(leaf)
        assert [Slot(bool(tree.learned[n]), int(tree.index[n])) for n in path] == list(prompt)
        assert [int(tree.depth[n]) for n in path] == list(range(len(path)))
        assert np.flatnonzero(attends[leaf]).tolist() == path
        seen = np.logical_or.accumulate(tree.learned[path])
        assert (tree.live[path] == seen).all()
