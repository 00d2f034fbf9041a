"""The paper's claims, and how each is checked on a slice of the results. A new one is a function below.

Compared runs are paired: equal dataset, seed (so equal training images) and number of shots. In several checks:

- numbers of shots that not every dataset has are left out of averages over shots (`balanced`);
- a claim about several things holds if each is significant, and fails if contraries are, corrected for their number
  (`judge_all`);
- targets of one source test the same contexts, so under domain shift sources count as datasets (`_on_targets`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pandas as pd

from fastcoop.reports.claims import Check, Claim, Finding
from fastcoop.reports.frames import (
    Missing,
    in_shots,
    main_runs,
    main_setting,
    most_shots,
    rows_of,
    shots_text,
)
from fastcoop.reports.items.figure5b import across_backbones, by_strength
from fastcoop.reports.items.table1 import shifted
from fastcoop.reports.paired import (
    FAILS,
    HOLDS,
    LEVEL,
    SEEDS,
    UNKNOWN,
    PairedDifference,
    compare_pairs,
    judge_all,
    judge_equal,
    judge_greater,
)  # fmt: skip
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.words import NEAR, Readings, read_words

MARGIN = 1.0  # percentage points within which two means count as equal
GAIN, GAIN_MARGIN = 15.0, 5.0  # the paper's average gain at 16 shots, and what counts as "around"
HALF = 50.0  # percent of a context's vectors
ORDER = ("finetune_image_encoder", "linear_probe", "zero_shot", "text_transform", "text_bias", "coop end")


PAPER_CLAIMS: list[Claim] = []


def claim(text: str, where: str, holds_if: str) -> Callable[[Check], Check]:
    """Add a claim whose check is the decorated function."""

    def add(check: Check) -> Check:
        PAPER_CLAIMS.append(Claim(text, where, holds_if, check))
        return check

    return add


def scores(runs: pd.DataFrame) -> pd.Series:
    """Return accuracy by (dataset, seed, shots), the mean of runs that share these. Raises Missing for no runs."""
    runs = runs.dropna(subset=["accuracy"])
    if runs.empty:
        raise Missing("runs to compare are missing")
    return runs.groupby(["dataset", "seed", "shots"]).accuracy.mean()


def over_shots(differences: pd.Series) -> pd.Series:
    """Average differences by (dataset, seed, shots) over the shots that all datasets have."""
    return balanced(differences).groupby(level=[0, 1]).mean()


def balanced(differences: pd.Series) -> pd.Series:
    """Keep the shots that every dataset has, and the seeds that have all these. Raises Missing if nothing is left."""
    wide = differences.dropna().unstack(level=2)
    if wide.empty:
        raise Missing("no runs on the same dataset, shots and seed to pair")
    shared = wide.columns[wide.groupby(level=0).count().gt(0).all()]
    if shared.empty:
        raise Missing("no number of shots was run on all datasets")
    kept = wide[shared].dropna()
    return pd.Series(kept.stack())


def above_zero_shot(runs: pd.DataFrame, series: str) -> pd.Series:
    """Return the gain of a series over zero-shot, by (dataset, seed, shots)."""
    zero = runs[runs.series == "zero_shot"].groupby("dataset").accuracy.mean()
    if zero.empty:
        raise Missing("there is no run of zero_shot")
    learned = scores(runs[(runs.series == series) & runs.dataset.isin(zero.index)])
    return learned - on_datasets(zero, learned)


def on_datasets(values: pd.Series, like: pd.Series) -> pd.Series:
    """Repeat one value per dataset for the index of ``like``, whose first level is the dataset."""
    return pd.Series(values.reindex(like.index.get_level_values(0)).to_numpy(), like.index)


def at(differences: pd.Series, wanted: Callable[[float], bool], what: str) -> pd.Series:
    """Return the differences at some numbers of shots. Raises Missing, which names ``what``, if there are none."""
    differences = differences.dropna()
    kept = differences[[wanted(shots) for shots in differences.index.get_level_values(2)]]
    if kept.empty:
        raise Missing(f"there are no runs at {what}")
    return kept


def by_shots(differences: pd.Series) -> str:
    """Return the mean over datasets of the mean difference at each number of shots, as text."""
    means = differences.groupby(level=[2, 0]).mean().groupby(level=0).mean()
    names = [*map(shots_text, means.index[:-1]), in_shots(means.index[-1])]
    return ", ".join(f"{mean:+.1f} at {name}" for name, mean in zip(names, means, strict=True))


@claim(
    "CoOp is better than hand-crafted prompts with two shots or more",
    "Section 4.1",
    "the gain is significant at 2 shots, and at each larger number of shots too",
)
def beats_prompts(piece: Slice, study: Study) -> Finding:
    gains = balanced(above_zero_shot(main_runs(piece.runs), "coop end"))
    at(gains, lambda shots: shots == 2, "2 shots")
    later = at(gains, lambda shots: shots >= 2, "2 shots or more")
    shots = sorted(later.index.unique(level=2))
    tests = [judge_greater(later.xs(count, level=2)) for count in shots]
    verdict, test = judge_all(tests)
    numbers = f"gain over zero-shot {by_shots(gains)}; the test is that at {_where(test, tests, shots)}"
    return Finding(verdict, numbers, test)


def _where(
    test: PairedDifference, tests: Sequence[tuple[str, PairedDifference]], shots: Sequence[float]
) -> str:
    """Return the number of shots of ``test``."""
    return next(shots_text(n) for n, (_, one) in zip(shots, tests, strict=True) if one is test)


@claim(
    "At 16 shots the average gain over hand-crafted prompts is around 15 points",
    "Section 4.1, Figure 4",
    f"it is significantly within {GAIN_MARGIN:g} points of {GAIN:g} on these datasets (seeds are the unit)",
)
def large_gain(piece: Slice, study: Study) -> Finding:
    runs = main_runs(piece.runs)
    top = most_shots(runs)
    gains = at(above_zero_shot(runs, "coop end"), lambda n: n == top, in_shots(top))
    # The paper's claim is about the mean of these datasets, however different they are, so seeds are the unit.
    verdict, test = judge_equal(gains.droplevel(2), GAIN_MARGIN, center=GAIN, unit=SEEDS)
    each = gains.groupby(level=0).mean().sort_values(ascending=False)
    numbers = f"mean gain {test.mean:+.1f} at {in_shots(top)}"
    if len(each) > 1:
        numbers += f", highest {each.iloc[0]:+.1f} ({each.index[0]}), lowest {each.iloc[-1]:+.1f}"
        numbers += f" ({each.index[-1]})"
    return Finding(verdict, numbers, test)


def _over_probe(piece: Slice) -> pd.Series:
    runs = main_runs(piece.runs)
    coop, probe = (scores(runs[runs.series == series]) for series in ("coop end", "linear_probe"))
    return balanced(coop - probe)


@claim(
    "CoOp is above the linear probe",
    "Section 4.1",
    "its lead, averaged over shots, is significant",
)
def beats_probe(piece: Slice, study: Study) -> Finding:
    lead = _over_probe(piece)
    verdict, test = judge_greater(over_shots(lead))
    return Finding(verdict, f"lead over the probe {by_shots(lead)}", test)


@claim(
    "The lead over the linear probe is largest with one or two shots",
    "Section 4.1",
    "the lead at 1 and 2 shots significantly exceeds that at 8 and more",
)
def lead_shrinks(piece: Slice, study: Study) -> Finding:
    lead = _over_probe(piece)
    few = over_shots(at(lead, lambda shots: shots <= 2, "1 or 2 shots"))
    many = over_shots(at(lead, lambda shots: shots >= 8, "8 shots or more"))
    verdict, test = judge_greater((few - many).dropna())
    return Finding(verdict, f"lead over the probe {by_shots(lead)}", test)


@claim(
    "The class at the end and in the middle perform similarly",
    "Section 4.1",
    f"their difference is significantly within {MARGIN:g} point at each number of shots",
)
def end_like_mid(piece: Slice, study: Study) -> Finding:
    runs = main_runs(piece.runs)
    difference = balanced(scores(runs[runs.series == "coop mid"]) - scores(runs[runs.series == "coop end"]))
    # Not on the average over shots, where mid ahead at many and behind at few shots would count as equal.
    shots = sorted(difference.index.unique(level=2))
    tests = [judge_equal(difference.xs(count, level=2), MARGIN) for count in shots]
    verdict, test = judge_all(tests)
    numbers = f"mid minus end {by_shots(difference)}; the test is that at {_where(test, tests, shots)}"
    return Finding(verdict, numbers, test)


def _specific(piece: Slice) -> pd.Series:
    runs = main_runs(piece.runs)
    return scores(runs[runs.series == "coop end csc"]) - scores(runs[runs.series == "coop end"])


@claim(
    "Class-specific contexts are worse than unified ones below 8 shots",
    "Section 4.1",
    "the difference, averaged over the numbers of shots below 8, is significant",
)
def specific_needs_data(piece: Slice, study: Study) -> Finding:
    difference = balanced(_specific(piece))
    few = at(difference, lambda shots: shots < 8, "fewer than 8 shots")
    verdict, test = judge_greater(-over_shots(few))
    return Finding(verdict, f"class-specific minus unified {by_shots(difference)}", test)


@claim(
    "At 16 shots class-specific contexts are better on some datasets",
    "Section 4.1",
    "a paired t test over seeds is significant on at least one dataset, by Bonferroni's rule; it fails if they"
    " are significantly worse on every dataset",
)
def specific_wins_some(piece: Slice, study: Study) -> Finding:
    top = most_shots(main_runs(piece.runs))
    last = at(_specific(piece), lambda shots: shots == top, in_shots(top)).droplevel(2)
    tests = {str(name): compare_pairs(values) for name, values in last.groupby(level=0)}
    tests = {name: test for name, test in tests.items() if not math.isnan(test.p)}
    if not tests:
        return Finding(UNKNOWN, "needs three seeds of a dataset")
    won = [f"{name} {t.mean:+.1f}" for name, t in tests.items() if t.mean > 0 and t.p < LEVEL / len(tests)]
    ahead = sum(test.mean > 0 for test in tests.values())
    numbers = f"ahead on {ahead} of {len(tests)} at {in_shots(top)}"
    numbers += f"; significant on {', '.join(won) or 'none'}"
    nowhere = all(test.against < LEVEL for test in tests.values())
    name, best = min(tests.items(), key=lambda pair: pair[1].p)
    numbers += f"; the test is that on {name}" + (f", its p times {len(tests)}" if len(tests) > 1 else "")
    corrected = replace(best, p_seeds=min(1.0, best.p_seeds * len(tests)))
    return Finding(HOLDS if won else FAILS if nowhere else UNKNOWN, numbers, corrected)


def _lengths(runs: pd.DataFrame, init: str) -> tuple[pd.Series, str]:
    """Return the longest context's accuracy minus the shortest's at the most shots, and the means at each length."""
    runs = runs[(runs.series == "coop end") & (runs.init.fillna("random") == init)]
    runs = runs[runs.shots == most_shots(runs)]
    lengths = sorted(runs.context_length.unique())
    if len(lengths) < 2:
        raise Missing("CoOp was run with one context length only")
    each = [scores(runs[runs.context_length == length]) for length in lengths]
    means = (
        f"{one.groupby(level=0).mean().mean():.1f} with M={int(length)}"
        for one, length in zip(each, lengths, strict=True)
    )
    return (each[-1] - each[0]).dropna().droplevel(2), ", ".join(means)


@claim(
    "More context vectors are better on the dataset itself",
    "Section 4.3, Figure 5a",
    "at the most shots the longest context is significantly above the shortest",
)
def longer_is_better(piece: Slice, study: Study) -> Finding:
    difference, means = _lengths(piece.runs, main_setting(piece.runs)[1])
    verdict, test = judge_greater(difference)
    return Finding(verdict, means, test)


def _on_targets(piece: Slice) -> pd.DataFrame:
    """Return runs under domain shift: the mean over a source's targets as ``accuracy``, the source as ``dataset``.

    Runs that were not tested on all of a source's targets are left out.
    """
    found = []
    for source, (targets, runs) in shifted(piece).items():
        away = runs[runs.dataset.isin(targets)].fillna({"context_length": 0.0, "init": "random"})
        kinds = ["method", "series", "context_length", "init", "shots", "seed"]
        wide = away.pivot_table(index=kinds, columns="dataset", values="accuracy")
        whole = wide.reindex(columns=targets).dropna().mean(axis=1)
        found.append(whole.rename("accuracy").reset_index().assign(dataset=source))
    return pd.concat(found)


@claim(
    "Fewer context vectors are better under distribution shift",
    "Section 4.2, Table 1",
    "the shortest context is significantly above the longest on the mean of targets",
)
def shorter_is_robust(piece: Slice, study: Study) -> Finding:
    difference, means = _lengths(_on_targets(piece), main_setting(piece.everything)[1])
    verdict, test = judge_greater(-difference)
    return Finding(verdict, f"mean of targets: {means}", test)


@claim(
    "CoOp is above zero-shot CLIP on shifted targets",
    "Section 4.2, Table 1",
    "the shortest context's gain on the mean of targets is significant",
)
def robust(piece: Slice, study: Study) -> Finding:
    runs = _on_targets(piece)
    shortest = runs.context_length[runs.series == "coop end"].min()
    runs = runs[(runs.series != "coop end") | (runs.context_length == shortest)]
    verdict, test = judge_greater(above_zero_shot(runs, "coop end").droplevel(2))
    numbers = f"mean of targets: CoOp (M={int(shortest)}) minus zero-shot {test.mean:+.2f}"
    return Finding(verdict, numbers, test)


@claim(
    "The linear probe falls below zero-shot CLIP on shifted targets",
    "Section 4.2, Table 1",
    "its deficit on the mean of targets is significant",
)
def probe_is_not_robust(piece: Slice, study: Study) -> Finding:
    verdict, test = judge_greater(-above_zero_shot(_on_targets(piece), "linear_probe").droplevel(2))
    return Finding(verdict, f"mean of targets: linear probe minus zero-shot {-test.mean:+.2f}", test)


@claim(
    "The better the backbone, the better CoOp",
    "Section 4.3, Figure 5b",
    "each backbone is significantly above the next weaker one by zero-shot; the p shown is the weakest",
)
def better_backbone(piece: Slice, study: Study) -> Finding:
    shots = most_shots(study.runs)
    runs = across_backbones(study, shots, ("zero_shot", "coop end")).get(piece.schedule)
    if runs is None:
        raise Missing("CoOp was run on one backbone only")
    order = by_strength(runs)
    coop = runs[runs.series == "coop end"]
    each = [scores(coop[coop.backbone == name]).droplevel(2) for name in order]
    verdict, test = judge_all([judge_greater((more - less).dropna()) for less, more in pairwise(each)])
    means = (f"{one.groupby(level=0).mean().mean():.1f} on {n}" for one, n in zip(each, order, strict=True))
    return Finding(verdict, f"CoOp {', '.join(means)}", test)


@claim(
    "CoOp is above prompt ensembling",
    "Section 4.3, Table 2",
    "the difference to the seven selected templates (else to all eighty) is significant",
)
def beats_ensemble(piece: Slice, study: Study) -> Finding:
    runs = main_runs(piece.runs)
    top = most_shots(runs)
    series = "ensemble" if (runs.series == "ensemble").any() else "ensemble all"
    ensemble = runs[runs.series == series].groupby("dataset").accuracy.mean()
    if ensemble.empty:
        raise Missing("there is no run of ensemble")
    coop = scores(runs[(runs.series == "coop end") & (runs.shots == top) & runs.dataset.isin(ensemble.index)])
    verdict, test = judge_greater((coop - on_datasets(ensemble, coop)).droplevel(2))
    return Finding(verdict, f"CoOp at {in_shots(top)} minus ensembling {test.mean:+.2f}", test)


@claim(
    "Random and word initialization perform similarly",
    "Section 4.3, Table 3",
    f"their difference is significantly within {MARGIN:g} point",
)
def init_does_not_matter(piece: Slice, study: Study) -> Finding:
    runs = piece.runs[(piece.runs.series == "coop end") & (piece.runs.shots == most_shots(piece.runs))]
    worded = runs.init.fillna("random") != "random"
    keys = ["dataset", "seed", "context_length"]
    words, random = (runs[kind].groupby(keys).accuracy.mean() for kind in (worded, ~worded))
    difference = (words - random).dropna()
    if difference.empty:
        raise Missing("no context length has CoOp runs with both random and word initialization")
    verdict, test = judge_equal(difference.groupby(level=[0, 1]).mean(), MARGIN)
    return Finding(verdict, f"words minus random {test.mean:+.2f}", test)


@claim(
    "Fine-tuning the image encoder < linear probe < zero-shot < text transform < text bias < CoOp",
    "Section 4.3, Table 5",
    "each difference between neighbors is significant; the p shown is the weakest",
)
def table5_order(piece: Slice, study: Study) -> Finding:
    runs = main_runs(piece.runs)
    runs = runs[runs.shots.isin((0.0, most_shots(runs)))]
    found = [series for series in ORDER if series in set(runs.series)]
    if not {"text_transform", "text_bias"} & set(found):
        raise Missing("there is no run of text_transform or text_bias")
    having = set.intersection(*(set(runs.dataset[runs.series == series]) for series in found))
    if not having:
        raise Missing("no dataset has runs of all the methods compared")
    runs = runs[runs.dataset.isin(having)]
    values = {series: scores(runs[runs.series == series]).droplevel(2) for series in found}
    fixed = values.pop("zero_shot").groupby(level=0).mean() if "zero_shot" in values else None
    learned = pd.concat(values, axis=1)
    if fixed is not None:
        learned["zero_shot"] = on_datasets(fixed, learned.iloc[:, 0])
    verdict, test = judge_all([judge_greater((learned[b] - learned[a]).dropna()) for a, b in pairwise(found)])
    means = learned.groupby(level=0).mean().mean()
    numbers = " < ".join(f"{s.split()[0]} {means[s]:.1f}" for s in found)
    lacking = [series.split()[0] for series in ORDER if series not in found]
    if lacking:
        numbers += f"; without {', '.join(lacking)}"
        verdict = UNKNOWN if verdict == HOLDS else verdict
    return Finding(verdict, f"claimed: {numbers}", test)


def _readings(piece: Slice, study: Study, words: bool) -> Iterator[tuple[tuple[str, int], Readings]]:
    """Yield ((dataset, seed), nearest words) of unified contexts with the class at the end.

    With ``words`` of those initialized with words, else of those of the main setting.
    """
    runs = piece.runs[piece.runs.series == "coop end"]
    worded = runs.init.fillna("random") != "random"
    if words:
        runs = runs[worded]
    else:
        length, _ = main_setting(piece.runs)
        runs = runs[~worded & (runs.context_length == length)]
    found = {(run.dataset, run.seed, run.key): read_words(study.folder, run.key) for run in rows_of(runs)}
    if not any(found.values()):
        raise Missing("no nearest words are stored for such runs; run `fastcoop interpret`")
    for (dataset, seed, _), readings in found.items():
        if readings:
            yield (dataset, seed), readings


def _by_run(found: list[tuple[tuple[str, int], float]]) -> pd.Series:
    """Average percentages of runs by (dataset, seed)."""
    index = pd.MultiIndex.from_tuples([where for where, _ in found], names=["dataset", "seed"])
    return pd.Series([value for _, value in found], index).groupby(level=[0, 1]).mean()


@claim(
    "Nearest words of learned contexts are hardly interpretable",
    "Section 4.3, Table 4",
    f"their mean distance is significantly above {NEAR:.0%} of that of random vectors of the same length",
)
def words_say_little(piece: Slice, study: Study) -> Finding:
    shares = [
        (where, 100 * readings.mean_distance / readings.mean_chance)
        for where, readings in _readings(piece, study, words=False)
        if readings.mean_chance
    ]
    if not shares:
        raise Missing("the stored nearest words have no distances of random contexts")
    verdict, test = judge_greater(_by_run(shares), above=100 * NEAR)
    return Finding(verdict, f"mean distance {test.mean:.1f}% of that of random vectors", test)


@claim(
    "Contexts that were initialized with words stay nearest to these words",
    "Section 4.3",
    "significantly more than half of the vectors of a context do",
)
def words_stay(piece: Slice, study: Study) -> Finding:
    shares, stayed, total = [], 0, 0
    for where, readings in _readings(piece, study, words=True):
        pairs = list(zip(readings.vectors, readings.start_words, strict=False))
        if pairs:
            same = sum(vector.words[0] == word for vector, word in pairs)
            shares.append((where, 100 * same / len(pairs)))
            stayed, total = stayed + same, total + len(pairs)
    if not shares:
        raise Missing(
            "the stored nearest words do not name the words of the initialization; run `fastcoop interpret` again"
        )
    verdict, test = judge_greater(_by_run(shares), above=HALF)
    return Finding(
        verdict, f"{stayed} of {total} vectors are nearest to the word that they were initialized with", test
    )
