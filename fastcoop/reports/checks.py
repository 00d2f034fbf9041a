"""How each finding of the paper is checked on a slice of the results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd

from fastcoop.reports.items.figure5b import across_backbones, by_strength
from fastcoop.reports.items.table1 import shifted
from fastcoop.reports.paired import FAILS, HOLDS, LEVEL, UNKNOWN, Paired, alike, greater
from fastcoop.reports.study import Missing, Slice, Study, main_runs, main_setting, most_shots, shots_text
from fastcoop.reports.words import Reading, read_words

MARGIN = 1.0  # percentage points within which two means count as alike
NEAR = 0.9  # a mean distance below this share of the one by chance makes nearest words informative


@dataclass(frozen=True)
class Finding:
    """What the results say of a claim: the verdict, the numbers, the test behind it (None where none
    applies)."""

    verdict: str
    numbers: str
    test: Paired | None = None


def p_text(p: float) -> str:
    """A p-value to two digits; empty where there is none."""
    return "" if math.isnan(p) else "<0.0001" if p < 1e-4 else f"{p:.2g}"


def scores(runs: pd.DataFrame) -> pd.Series:
    """Accuracy indexed by (dataset, seed, shots). Raises Missing for an empty table."""
    if runs.empty:
        raise Missing("runs to compare are missing")
    return runs.groupby(["dataset", "seed", "shots"]).accuracy.mean()


def over_seeds(differences: pd.Series) -> pd.Series:
    """Differences by (dataset, seed, shots) averaged over shots. Raises Missing where nothing could be
    paired."""
    differences = differences.dropna()
    if differences.empty:
        raise Missing("no runs on the same dataset, shots and seed to pair")
    return differences.groupby(level=[0, 1]).mean()


def above_zero_shot(runs: pd.DataFrame, series: str) -> pd.Series:
    """Gain of a series over zero-shot, by (dataset, seed, shots)."""
    zero = runs[runs.series == "zero_shot"].groupby("dataset").accuracy.mean()
    if zero.empty:
        raise Missing("there is no run of zero_shot")
    learned = scores(runs[(runs.series == series) & runs.dataset.isin(zero.index)])
    return learned - on_datasets(zero, learned)


def on_datasets(values: pd.Series, like: pd.Series) -> pd.Series:
    """One value per dataset, repeated for the index of ``like``, whose first level is the dataset."""
    return pd.Series(values.reindex(like.index.get_level_values(0)).to_numpy(), like.index)


def at(differences: pd.Series, wanted: Callable[[float], bool], what: str) -> pd.Series:
    """The differences at the numbers of shots ``wanted``. Raises Missing, saying ``what``, where there is
    none."""
    kept = differences[[wanted(shots) for shots in differences.index.get_level_values(2)]]
    if kept.empty:
        raise Missing(f"there are no runs at {what}")
    return kept


def by_shots(differences: pd.Series) -> str:
    """The mean difference at each number of shots, as text."""
    means = differences.groupby(level=[2, 0]).mean().groupby(level=0).mean()
    return (
        ", ".join(
            f"{mean:+.1f} at {shots_text(shots)}" for shots, mean in zip(means.index, means, strict=True)
        )
        + " shots"
    )


def beats_prompts(piece: Slice, study: Study) -> Finding:
    gains = above_zero_shot(main_runs(piece.runs), "coop end")
    later = at(gains, lambda shots: shots >= 2, "2 shots or more")
    least = later.groupby(level=2).mean().min()
    verdict, test = greater(over_seeds(at(later, lambda shots: shots == 2, "2 shots")))
    if verdict == HOLDS and least <= 0:
        verdict = FAILS
    return Finding(verdict, f"gain over zero-shot {by_shots(gains)}", test)


def large_gain(piece: Slice, study: Study) -> Finding:
    runs = main_runs(piece.runs)
    top = most_shots(runs)
    gains = at(above_zero_shot(runs, "coop end"), lambda shots: shots == top, "16 shots")
    verdict, test = greater(over_seeds(gains), above=10.0)
    each = gains.groupby(level=0).mean().sort_values(ascending=False)
    numbers = f"mean gain {test.mean:+.1f} at {shots_text(top)} shots, highest {each.iloc[0]:+.1f}"
    return Finding(
        verdict, f"{numbers} ({each.index[0]}), lowest {each.iloc[-1]:+.1f} ({each.index[-1]})", test
    )


def _over_probe(piece: Slice) -> pd.Series:
    runs = main_runs(piece.runs)
    return (scores(runs[runs.series == "coop end"]) - scores(runs[runs.series == "linear_probe"])).dropna()


def beats_probe(piece: Slice, study: Study) -> Finding:
    lead = _over_probe(piece)
    verdict, test = greater(over_seeds(lead))
    return Finding(verdict, f"lead over the probe {by_shots(lead)}", test)


def lead_shrinks(piece: Slice, study: Study) -> Finding:
    lead = _over_probe(piece)
    few = over_seeds(at(lead, lambda shots: shots <= 2, "1 or 2 shots"))
    many = over_seeds(at(lead, lambda shots: shots >= 8, "8 shots or more"))
    verdict, test = greater((few - many).dropna())
    return Finding(verdict, f"lead over the probe {by_shots(lead)}", test)


def end_like_mid(piece: Slice, study: Study) -> Finding:
    runs = main_runs(piece.runs)
    difference = scores(runs[runs.series == "coop mid"]) - scores(runs[runs.series == "coop end"])
    verdict, test = alike(over_seeds(difference), MARGIN)
    return Finding(verdict, f"mid minus end {test.mean:+.2f} on average over shots", test)


def _specific(piece: Slice) -> pd.Series:
    runs = main_runs(piece.runs)
    return (scores(runs[runs.series == "coop end csc"]) - scores(runs[runs.series == "coop end"])).dropna()


def specific_needs_data(piece: Slice, study: Study) -> Finding:
    difference = _specific(piece)
    few = at(difference, lambda shots: shots < 8, "fewer than 8 shots")
    verdict, test = greater(-over_seeds(few))
    return Finding(verdict, f"class-specific minus unified {by_shots(difference)}", test)


def specific_wins_some(piece: Slice, study: Study) -> Finding:
    from scipy.stats import ttest_1samp

    top = most_shots(main_runs(piece.runs))
    last = over_seeds(at(_specific(piece), lambda shots: shots == top, f"{shots_text(top)} shots"))
    groups = [(str(name), values) for name, values in last.groupby(level=0) if len(values) > 2]
    if not groups:
        return Finding(UNKNOWN, "takes three seeds of a dataset")
    won = []
    for name, values in groups:
        p = 0.0 if values.std() == 0 else ttest_1samp(values, 0.0, alternative="greater").pvalue
        if values.mean() > 0 and p < LEVEL / len(groups):
            won.append(f"{name} {values.mean():+.1f}")
    ahead = sum(values.mean() > 0 for _, values in groups)
    numbers = f"ahead on {ahead} of {len(groups)} at {shots_text(top)} shots"
    numbers += f"; beyond chance on {', '.join(won) or 'none'}"
    return Finding(HOLDS if won else UNKNOWN if ahead else FAILS, numbers)


def _lengths(runs: pd.DataFrame, init: str) -> tuple[pd.Series, str]:
    """Accuracy of the longest context minus that of the shortest, class at the end, and which two they
    are."""
    runs = runs[(runs.series == "coop end") & (runs.init.fillna("random") == init)]
    lengths = sorted(runs.context_length.unique())
    if len(lengths) < 2:
        raise Missing("CoOp was run with one context length only")
    short, long = lengths[0], lengths[-1]
    difference = scores(runs[runs.context_length == long]) - scores(runs[runs.context_length == short])
    return difference, f"M={int(long)} minus M={int(short)}"


def longer_is_better(piece: Slice, study: Study) -> Finding:
    difference, which = _lengths(piece.runs, main_setting(piece.runs)[1])
    verdict, test = greater(over_seeds(difference))
    return Finding(verdict, f"{which}: {test.mean:+.2f}", test)


def _away(piece: Slice) -> pd.DataFrame:
    return pd.concat([runs[runs.dataset.isin(targets)] for targets, runs in shifted(piece).values()])


def shorter_is_robust(piece: Slice, study: Study) -> Finding:
    difference, which = _lengths(_away(piece), main_setting(piece.everything)[1])
    verdict, test = greater(-over_seeds(difference))
    return Finding(verdict, f"on targets {which}: {-test.mean:+.2f}", test)


def robust(piece: Slice, study: Study) -> Finding:
    runs = _away(piece)
    runs = runs[(runs.series != "coop end") | (runs.context_length == runs.context_length.min())]
    gains = above_zero_shot(runs, "coop end")
    verdict, test = greater(over_seeds(gains))
    return Finding(
        verdict,
        f"on targets CoOp (M={int(runs.context_length.min())}) minus zero-shot {test.mean:+.2f}",
        test,
    )


def probe_is_not_robust(piece: Slice, study: Study) -> Finding:
    losses = above_zero_shot(_away(piece), "linear_probe")
    verdict, test = greater(-over_seeds(losses))
    return Finding(verdict, f"on targets linear probe minus zero-shot {-test.mean:+.2f}", test)


def better_backbone(piece: Slice, study: Study) -> Finding:
    shots = most_shots(study.runs)
    joined = [
        runs
        for schedule, runs in across_backbones(study, shots, ("zero_shot", "coop end"))
        if schedule == piece.schedule
    ]
    if not joined:
        raise Missing("CoOp was run on one backbone only")
    runs, order = joined[0], by_strength(joined[0])
    coop = runs[runs.series == "coop end"]
    means = [coop[coop.backbone == name].groupby("dataset").accuracy.mean().mean() for name in order]
    best, worst = coop[coop.backbone == order[-1]], coop[coop.backbone == order[0]]
    verdict, test = greater(over_seeds(scores(best) - scores(worst)))
    if verdict == HOLDS and means != sorted(means):
        verdict = FAILS
    return Finding(
        verdict, "CoOp " + ", ".join(f"{m:.1f} on {name}" for name, m in zip(order, means, strict=True)), test
    )


def beats_ensemble(piece: Slice, study: Study) -> Finding:
    runs = main_runs(piece.runs)
    top = most_shots(runs)
    ensemble = runs[runs.method == "ensemble"].groupby("dataset").accuracy.mean()
    if ensemble.empty:
        raise Missing("there is no run of ensemble")
    coop = scores(runs[(runs.series == "coop end") & (runs.shots == top) & runs.dataset.isin(ensemble.index)])
    verdict, test = greater(over_seeds(coop - on_datasets(ensemble, coop)))
    return Finding(verdict, f"CoOp at {shots_text(top)} shots minus ensembling {test.mean:+.2f}", test)


def init_does_not_matter(piece: Slice, study: Study) -> Finding:
    runs = piece.runs[piece.runs.series == "coop end"]
    worded = runs[runs.init.fillna("random") != "random"]
    random = runs[(runs.init.fillna("random") == "random") & runs.context_length.isin(worded.context_length)]
    if worded.empty or random.empty:
        raise Missing("no context length has CoOp runs with both random and word initialisation")
    verdict, test = alike(over_seeds(scores(worded) - scores(random)), MARGIN)
    return Finding(verdict, f"words minus random {test.mean:+.2f}", test)


def table5_order(piece: Slice, study: Study) -> Finding:
    runs = main_runs(piece.runs)
    top = most_shots(runs)
    order = ["finetune_image_encoder", "linear_probe", "zero_shot", "text_transform", "text_bias", "coop end"]
    found = [series for series in order if series in set(runs.series)]
    if not {"text_transform", "text_bias"} & set(found):
        raise Missing("there is no run of text_transform or text_bias")
    values = {s: over_seeds(scores(runs[(runs.series == s) & runs.shots.isin((0.0, top))])) for s in found}
    zero = values["zero_shot"].groupby(level=0).mean() if "zero_shot" in values else None
    tests = []
    for worse, better in pairwise(found):
        a, b = values[better], values[worse]
        if zero is not None and "zero_shot" in (worse, better):
            learned = a if worse == "zero_shot" else b
            fixed = on_datasets(zero, learned)
            a, b = (a, fixed) if worse == "zero_shot" else (fixed, b)
        tests.append(greater((a - b).dropna()))
    weakest = max(tests, key=lambda pair: -1.0 if math.isnan(pair[1].p) else pair[1].p)
    verdicts = {verdict for verdict, _ in tests}
    verdict = FAILS if FAILS in verdicts else UNKNOWN if UNKNOWN in verdicts else HOLDS
    means = {series: value.groupby(level=0).mean().mean() for series, value in values.items()}
    return Finding(
        verdict, " < ".join(f"{series.split()[0]} {means[series]:.1f}" for series in found), weakest[1]
    )


def _readings(
    piece: Slice, study: Study, worded: bool
) -> list[tuple[pd.Series, list[Reading], float | None]]:
    runs = piece.runs[
        (piece.runs.series == "coop end") & ((piece.runs.init.fillna("random") != "random") == worded)
    ]
    found = []
    for _, run in runs.iterrows():
        if readings := read_words(study.folder, run.key):
            found.append((run, list(readings.vectors), readings.by_chance))
    if not found:
        raise Missing("no nearest words are stored for such runs; run `fastcoop interpret`")
    return found


def words_say_little(piece: Slice, study: Study) -> Finding:
    shares = {}
    for run, vectors, chance in _readings(piece, study, worded=False):
        if chance:
            mean = sum(vector.distances[0] for vector in vectors) / len(vectors)
            shares[run.dataset, run.seed, run.shots] = 100 * mean / chance
    if not shares:
        raise Missing("the stored nearest words do not say how near a random context would be")
    verdict, test = greater(over_seeds(pd.Series(shares)), above=100 * NEAR)
    return Finding(verdict, f"mean distance {test.mean:.0f}% of that of a random context", test)


def words_stay(piece: Slice, study: Study) -> Finding:
    from scipy.stats import binomtest

    stayed = total = 0
    for run, vectors, _ in _readings(piece, study, worded=True):
        words = str(run.init).split()
        for vector in vectors:
            if vector.position <= len(words):
                stayed, total = stayed + (vector.word == words[vector.position - 1].lower()), total + 1
    if not total:
        raise Missing("no stored vector started from a word")
    p = binomtest(stayed, total, 0.5, alternative="greater").pvalue
    verdict = HOLDS if p < LEVEL else FAILS if stayed <= total / 2 else UNKNOWN
    return Finding(
        verdict,
        f"{stayed} of {total} vectors are nearest to the word they started from (binomial p = {p_text(p)})",
    )
