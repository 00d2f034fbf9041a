"""Claims hold in a world made so, fail in one made otherwise, and are left open for lack of runs."""

from __future__ import annotations

import pandas as pd
import pytest

from fastcoop.reports.claims import CLAIMS, claims_table, judge
from fastcoop.reports.paired import FAILS, HOLDS, UNKNOWN
from fastcoop.reports.study import study_of
from tests.reports.made_up_results import BASE, coop, results, store_words, whole_study


def verdicts(frame: pd.DataFrame, folder) -> dict[str, str]:
    judged = judge(study_of(frame, folder))
    assert {one.claim for one in judged} == set(CLAIMS)
    return {one.claim.check.__name__: one.finding.verdict for one in judged}


def test_what_is_true_of_a_world_holds(tmp_path):
    found = verdicts(whole_study(), tmp_path)
    true = (
        "beats_prompts large_gain beats_probe lead_shrinks end_like_mid specific_needs_data longer_is_better"
    )
    true += (
        " shorter_is_robust robust probe_is_not_robust better_backbone beats_ensemble init_does_not_matter"
    )
    assert {name: found[name] for name in true.split()} == dict.fromkeys(true.split(), HOLDS)
    assert found["table5_order"] == FAILS  # there the linear probe is above zero-shot


def test_what_is_false_of_a_world_does_not_hold(tmp_path):
    frame = whole_study()
    learned = (frame.method == "coop") & (frame.source == frame.dataset)
    frame.loc[learned, "accuracy"] -= 30
    frame.loc[learned & (frame.class_position == "mid"), "accuracy"] -= 5
    frame.loc[learned & frame.class_specific.eq(True), "accuracy"] += 20
    found = verdicts(frame, tmp_path)
    false = "beats_prompts large_gain beats_probe end_like_mid specific_needs_data beats_ensemble"
    assert {name: found[name] for name in false.split()} == dict.fromkeys(false.split(), FAILS)
    assert found["specific_wins_some"] == HOLDS


def test_one_seed_decides_nothing(tmp_path):
    found = verdicts(results(datasets=("objects",), seeds=(1,)), tmp_path)
    assert set(found.values()) == {UNKNOWN}


def test_two_shots_are_needed_to_speak_of_two_shots(tmp_path):
    found = verdicts(results(shots=(16,)), tmp_path)
    assert found["beats_prompts"] == UNKNOWN
    assert found["large_gain"] == HOLDS


@pytest.mark.parametrize(
    ("words", "verdict"), [(("a", "photo", "of", "a"), HOLDS), (("x", "y", "z", "w"), FAILS)]
)
def test_contexts_that_stay_at_their_words_are_told_from_those_that_left(tmp_path, words, verdict):
    common = {"backbone": "b", "shots": 16, "accuracy": 60.0, "context_length": 4, "init": "a photo of a"}
    rows = [coop(**common, dataset=dataset, seed=seed) for dataset in BASE for seed in (1, 2)]
    frame = pd.DataFrame(rows)
    store_words(tmp_path, frame, words)
    assert verdicts(frame, tmp_path)["words_stay"] == verdict


@pytest.mark.parametrize(("by_chance", "verdict"), [(1.0, HOLDS), (3.0, FAILS)])
def test_words_much_nearer_than_by_chance_do_say_something(tmp_path, by_chance, verdict):
    frame = results(shots=(16,))
    store_words(tmp_path, frame, by_chance=by_chance)
    assert verdicts(frame, tmp_path)["words_say_little"] == verdict


def test_numbers_and_tests_are_shown(tmp_path):
    text = claims_table(judge(study_of(results(), tmp_path))).to_csv()
    assert "+16.4 at 16 shots" in text
    assert "not enough runs" in text
