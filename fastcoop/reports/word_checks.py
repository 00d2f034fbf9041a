"""How the paper's findings on nearest words (Section 4.3) are checked on a slice of the results."""

from __future__ import annotations

import pandas as pd

from fastcoop.reports.checks import Finding
from fastcoop.reports.paired import greater
from fastcoop.reports.study import Missing, Slice, Study, main_setting, rows_of
from fastcoop.reports.words import NEAR, Readings, read_words

HALF = 50.0  # percent of a context's vectors


def _readings(piece: Slice, study: Study, words: bool) -> list[tuple[tuple[str, int], Readings]]:
    """((dataset, seed), readings) of the runs with a unified context and the class at the end: started from
    words, of any length; else those of the main setting."""
    runs = piece.runs[piece.runs.series == "coop end"]
    worded = runs.init.fillna("random") != "random"
    if words:
        runs = runs[worded]
    else:
        length, _ = main_setting(piece.runs)
        runs = runs[~worded & (runs.context_length == length)]
    found = [((run.dataset, run.seed), read_words(study.folder, run.key)) for run in rows_of(runs)]
    if not any(readings for _, readings in found):
        raise Missing("no nearest words are stored for such runs; run `fastcoop interpret`")
    return [(where, readings) for where, readings in found if readings]


def _by_run(found: list[tuple[tuple[str, int], float]]) -> pd.Series:
    """Percentages by (dataset, seed), the mean over shots and lengths where there are several."""
    index = pd.MultiIndex.from_tuples([where for where, _ in found], names=["dataset", "seed"])
    return pd.Series([value for _, value in found], index).groupby(level=[0, 1]).mean()


def words_say_little(piece: Slice, study: Study) -> Finding:
    shares = [
        (where, 100 * readings.mean_distance / readings.mean_chance)
        for where, readings in _readings(piece, study, words=False)
        if readings.mean_chance
    ]
    if not shares:
        raise Missing("the stored nearest words do not say how near a random context would be")
    verdict, test = greater(_by_run(shares), above=100 * NEAR)
    return Finding(verdict, f"mean distance {test.mean:.1f}% of what chance gives", test)


def words_stay(piece: Slice, study: Study) -> Finding:
    shares, stayed, total = [], 0, 0
    for where, readings in _readings(piece, study, words=True):
        pairs = list(zip(readings.vectors, readings.start_words, strict=False))
        if pairs:
            same = sum(vector.words[0] == word for vector, word in pairs)
            shares.append((where, 100 * same / len(pairs)))
            stayed, total = stayed + same, total + len(pairs)
    if not shares:
        raise Missing("no stored vector is known to have started from a word; run `fastcoop interpret` again")
    verdict, test = greater(_by_run(shares), above=HALF)
    return Finding(verdict, f"{stayed} of {total} vectors are nearest to the word they started from", test)
