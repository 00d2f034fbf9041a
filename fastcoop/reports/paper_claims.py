"""The paper's claims, and how each is checked on a slice of the results. A new one is a function below.

Compared runs are paired: equal dataset, seed (so equal training images) and number of shots. In several checks:

- numbers of shots that not every dataset has are left out of averages over shots (`balanced`);
- a claim about several things holds if each is significant, and fails if contraries are, corrected for their number
  (`judge_all`);
- targets of one source test the same contexts, so under domain shift sources count as datasets (`_on_targets`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pandas as pd

from fastcoop.progress import counted
from fastcoop.reports import paired
from fastcoop.reports.claims import Check, Claim, Finding
from fastcoop.reports.frames import Missing, in_shots, main_runs, main_setting, rows_of, shots_text
from fastcoop.reports.items.figure5b import by_strength, on_shared_datasets
from fastcoop.reports.items.table1 import shifted
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.words import NEAR, NearestWords, read_words

MARGIN = 1.0  # percentage points within which two means count as equal
GAIN, GAIN_MARGIN = 15.0, 5.0  # the paper's average gain at 16 shots, and what counts as "around"
ORDER = ("finetune_image_encoder", "linear_probe", "zero_shot", "text_transform", "text_bias", "coop end")
WITHOUT_TRAINING = ("zero_shot", "ensemble", "ensemble all")  # series

PAPER_CLAIMS: list[Claim] = []


def claim(where: str) -> Callable[[Check], Check]:
    """Add a claim of the paper. Its check is the decorated function, whose docstring is the claim and the criterion."""

    def add(check: Check) -> Check:
        text, _, holds_if = str(inspect.getdoc(check)).removesuffix(".").partition(".\nHolds if ")
        PAPER_CLAIMS.append(Claim(text, where, " ".join(holds_if.split()), check))
        return check

    return add


def scores(runs: pd.DataFrame) -> pd.Series:
    """Return accuracy by (dataset, seed, shots), the mean of runs that share these. Raises Missing for no runs."""
    if runs.empty:
        raise Missing("runs to compare are missing")
    return runs.groupby(["dataset", "seed", "shots"]).accuracy.mean()


def difference(runs: pd.DataFrame, first: str, second: str) -> pd.Series:
    """Return the accuracy of a series minus that of a second one, by (dataset, seed, shots).

    A series without training counts at every seed and number of shots of the other one.
    """
    if first in WITHOUT_TRAINING:
        return -difference(runs, second, first)
    if second not in WITHOUT_TRAINING:
        return scores(runs[runs.series == first]) - scores(runs[runs.series == second])
    fixed = runs[runs.series == second].groupby("dataset").accuracy.mean()
    if fixed.empty:
        raise Missing(f"there is no run of {second.split()[0]}")
    learned = scores(runs[(runs.series == first) & runs.dataset.isin(fixed.index)])
    return learned - fixed.reindex(learned.index.get_level_values("dataset")).to_numpy()


def balanced(differences: pd.Series) -> pd.Series:
    """Keep the shots that every dataset has, and the seeds that have all these. Raises Missing if nothing is left."""
    wide = differences.dropna().unstack(level=2)
    if wide.empty:
        raise Missing("no runs on the same dataset, shots and seed to pair")
    shared = wide.columns[wide.groupby(level=0).count().gt(0).all()]
    if shared.empty:
        raise Missing("no number of shots was run on all datasets")
    return pd.Series(wide[shared].dropna().stack())


def at(differences: pd.Series, wanted: Callable[[float], bool], what: str) -> pd.Series:
    """Return the differences at some numbers of shots. Raises Missing, which names ``what``, if there are none."""
    differences = differences.dropna()
    kept = differences[[wanted(shots) for shots in differences.index.get_level_values(2)]]
    if kept.empty:
        raise Missing(f"there are no runs at {what}")
    return kept


def at_top(runs: pd.DataFrame, first: str, second: str) -> tuple[pd.Series, str]:
    """Return `difference` at the number of shots of final results, by (dataset, seed), and this number as text."""
    shots = main_setting(runs).shots
    text = in_shots(shots)
    return at(difference(runs, first, second), lambda n: n == shots, text).droplevel(2), text


def over_shots(differences: pd.Series) -> pd.Series:
    """Average differences by (dataset, seed, shots) over the shots that all datasets have."""
    return balanced(differences).groupby(level=[0, 1]).mean()


def mean_of(values: pd.Series) -> float:
    """Return the mean over datasets of the means."""
    return float(values.groupby(level=0).mean().mean())


def by_shots(differences: pd.Series) -> str:
    """Return the mean over datasets of the mean difference at each number of shots, as text."""
    means = differences.groupby(level=[2, 0]).mean().groupby(level=0).mean()
    names = [*map(shots_text, means.index[:-1]), in_shots(means.index[-1])]
    return ", ".join(f"{mean:+.1f} at {name}" for name, mean in zip(names, means, strict=True))


def judge_each(
    differences: pd.Series, judge: Callable[[pd.Series], paired.Judgment], numbers: str
) -> Finding:
    """Return the finding on a statement that must hold at each number of shots."""
    shots = sorted(differences.index.unique(level=2))
    judged = [judge(differences.xs(count, level=2)) for count in shots]
    verdict, test = paired.judge_all(judged)
    of_test = next(count for count, (_, one) in zip(shots, judged, strict=True) if one is test)
    return Finding(verdict, test, f"{numbers}; the test is at {in_shots(of_test)}")


@claim("Section 4.1")
def beats_prompts(piece: Slice, study: Study) -> Finding:
    """CoOp is better than hand-crafted prompts with two shots or more.
    Holds if the gain is significant at 2 shots, and at each larger number of shots too."""
    gains = balanced(difference(main_runs(piece.runs), "coop end", "zero_shot"))
    at(gains, lambda shots: shots == 2, "2 shots")
    later = at(gains, lambda shots: shots >= 2, "2 shots or more")
    return judge_each(later, paired.judge_greater, f"gain over zero-shot {by_shots(gains)}")


@claim("Section 4.1, Figure 4")
def large_gain(piece: Slice, study: Study) -> Finding:
    """At 16 shots the average gain over hand-crafted prompts is around 15 points.
    Holds if it is significantly within 5 points of 15 on these datasets (seeds are the unit)."""
    gains, shots = at_top(main_runs(piece.runs), "coop end", "zero_shot")
    # The paper's claim is about the mean of these datasets, however different they are, so seeds are the unit.
    verdict, test = paired.judge_equal(gains, GAIN_MARGIN, center=GAIN, unit=paired.SEEDS)
    numbers = f"mean gain {test.mean:+.1f} at {shots}"
    each = gains.groupby(level=0).mean().sort_values(ascending=False)
    if len(each) > 1:
        (high, *_), (low, *_) = each.index, each.index[::-1]
        numbers += f", highest {each[high]:+.1f} ({high}), lowest {each[low]:+.1f} ({low})"
    return Finding(verdict, test, numbers)


@claim("Section 4.1")
def beats_probe(piece: Slice, study: Study) -> Finding:
    """CoOp is above the linear probe.
    Holds if its lead, averaged over shots, is significant."""
    lead = balanced(difference(main_runs(piece.runs), "coop end", "linear_probe"))
    return Finding(*paired.judge_greater(over_shots(lead)), f"lead over the probe {by_shots(lead)}")


@claim("Section 4.1")
def lead_shrinks(piece: Slice, study: Study) -> Finding:
    """The lead over the linear probe is largest with one or two shots.
    Holds if the lead at 1 and 2 shots significantly exceeds that at 8 and more."""
    lead = balanced(difference(main_runs(piece.runs), "coop end", "linear_probe"))
    few = over_shots(at(lead, lambda shots: shots <= 2, "1 or 2 shots"))
    many = over_shots(at(lead, lambda shots: shots >= 8, "8 shots or more"))
    return Finding(*paired.judge_greater(few - many), f"lead over the probe {by_shots(lead)}")


@claim("Section 4.1")
def end_like_mid(piece: Slice, study: Study) -> Finding:
    """The class at the end and in the middle perform similarly.
    Holds if their difference is significantly within 1 point at each number of shots."""
    # Not on the average over shots, where mid ahead at many and behind at few shots would count as equal.
    found = balanced(difference(main_runs(piece.runs), "coop mid", "coop end"))
    numbers = f"mid minus end {by_shots(found)}"
    return judge_each(found, lambda each: paired.judge_equal(each, MARGIN), numbers)


@claim("Section 4.1")
def specific_needs_data(piece: Slice, study: Study) -> Finding:
    """Class-specific contexts are worse than unified ones below 8 shots.
    Holds if the difference, averaged over the numbers of shots below 8, is significant."""
    found = balanced(difference(main_runs(piece.runs), "coop end csc", "coop end"))
    few = at(found, lambda shots: shots < 8, "fewer than 8 shots")
    return Finding(*paired.judge_greater(-over_shots(few)), f"class-specific minus unified {by_shots(found)}")


@claim("Section 4.1")
def specific_wins_some(piece: Slice, study: Study) -> Finding:
    """At 16 shots class-specific contexts are better on some datasets.
    Holds if a paired t test over seeds is significant on at least one dataset, by Bonferroni's rule; it fails if they
    are significantly worse on every dataset."""
    found, shots = at_top(main_runs(piece.runs), "coop end csc", "coop end")
    tests = {str(name): paired.compare_pairs(values) for name, values in found.groupby(level=0)}
    tests = {name: test for name, test in tests.items() if not math.isnan(test.p)}
    if not tests:
        return Finding(paired.UNKNOWN, None, "needs three seeds of a dataset")
    level = paired.LEVEL / len(tests)
    won = [f"{name} {test.mean:+.1f}" for name, test in tests.items() if test.mean > 0 and test.p < level]
    nowhere = all(test.against < paired.LEVEL for test in tests.values())
    name, best = min(tests.items(), key=lambda pair: pair[1].p)
    numbers = (
        f"ahead on {sum(test.mean > 0 for test in tests.values())} of {len(tests)} at {shots}; significant on"
        f" {', '.join(won) or 'none'}; the test is on {name}"
    )
    numbers += f", with p times {len(tests)}" if len(tests) > 1 else ""
    corrected = replace(best, p_seeds=min(1.0, best.p_seeds * len(tests)))
    return Finding(paired.HOLDS if won else paired.FAILS if nowhere else paired.UNKNOWN, corrected, numbers)


def _lengths(runs: pd.DataFrame, init: str) -> tuple[pd.Series, str]:
    """Return the longest context's accuracy minus the shortest's at the most shots, and the means at each length.

    The means are over the datasets and seeds of the differences. Lengths in between that lack some are left out.
    """
    runs = runs[(runs.series == "coop end") & (runs.init == init)]
    runs = runs[runs.shots == main_setting(runs).shots]
    lengths = sorted(runs.context_length.unique())
    if len(lengths) < 2:
        raise Missing("CoOp was run with one context length only")
    each = {length: scores(runs[runs.context_length == length]).droplevel(2) for length in lengths}
    found = (each[lengths[-1]] - each[lengths[0]]).dropna()
    if found.empty:
        raise Missing("no dataset and seed has CoOp runs with both the shortest and the longest context")
    shown = {length: one[found.index] for length, one in each.items() if found.index.isin(one.index).all()}
    means = (f"{mean_of(one):.1f} with M={int(length)}" for length, one in shown.items())
    return found, ", ".join(means)


@claim("Section 4.3, Figure 5a")
def longer_is_better(piece: Slice, study: Study) -> Finding:
    """More context vectors are better on the dataset itself.
    Holds if at the most shots the longest context is significantly above the shortest."""
    found, means = _lengths(piece.runs, main_setting(piece.runs).init)
    return Finding(*paired.judge_greater(found), means)


def _on_targets(piece: Slice, *series: str) -> tuple[pd.DataFrame, str]:
    """Return runs of series under domain shift: the mean over a source's targets as ``accuracy``, the source as
    ``dataset``.

    Runs that were not tested on all of a source's targets are left out; the text says how many.
    """
    found, count = [], 0
    for source, (targets, runs) in shifted(piece).items():
        away = runs[runs.dataset.isin(targets) & runs.series.isin(series)]
        kinds = ["method", "series", "context_length", "init", "shots", "seed"]
        wide = away.pivot_table(index=kinds, columns="dataset", values="accuracy")
        whole = wide.reindex(columns=targets).dropna().mean(axis=1)
        count += len(wide) - len(whole)
        found.append(whole.rename("accuracy").reset_index().assign(dataset=source))
    note = f"; left out: {counted(count, 'run')} not tested on all targets" if count else ""
    return pd.concat(found), note


@claim("Section 4.2, Table 1")
def shorter_is_robust(piece: Slice, study: Study) -> Finding:
    """Fewer context vectors are better under distribution shift.
    Holds if the shortest context is significantly above the longest on the mean of targets."""
    runs, note = _on_targets(piece, "coop end")
    found, means = _lengths(runs, main_setting(piece.everything).init)
    return Finding(*paired.judge_greater(-found), f"mean of targets: {means}{note}")


@claim("Section 4.2, Table 1")
def robust(piece: Slice, study: Study) -> Finding:
    """CoOp is above zero-shot CLIP on shifted targets.
    Holds if the shortest context's gain on the mean of targets is significant."""
    runs, note = _on_targets(piece, "coop end", "zero_shot")
    shortest = runs.context_length[runs.series == "coop end"].min()
    runs = runs[(runs.series != "coop end") | (runs.context_length == shortest)]
    verdict, test = paired.judge_greater(difference(runs, "coop end", "zero_shot").droplevel(2))
    numbers = f"mean of targets: CoOp (M={int(shortest)}) minus zero-shot {test.mean:+.2f}{note}"
    return Finding(verdict, test, numbers)


@claim("Section 4.2, Table 1")
def probe_is_not_robust(piece: Slice, study: Study) -> Finding:
    """The linear probe falls below zero-shot CLIP on shifted targets.
    Holds if its deficit on the mean of targets is significant."""
    runs, note = _on_targets(piece, "linear_probe", "zero_shot")
    found = difference(runs, "linear_probe", "zero_shot").droplevel(2)
    verdict, test = paired.judge_greater(-found)
    return Finding(verdict, test, f"mean of targets: linear probe minus zero-shot {-test.mean:+.2f}{note}")


@claim("Section 4.3, Figure 5b")
def better_backbone(piece: Slice, study: Study) -> Finding:
    """The better the backbone, the better CoOp.
    Holds if each backbone is significantly above the next weaker one by zero-shot; the p shown is the weakest."""
    found = on_shared_datasets(study, main_setting(study.runs).shots)
    if piece.schedule not in found:
        raise Missing("CoOp was run on one backbone only")
    _, runs = found[piece.schedule]
    order, coop = by_strength(runs), runs[runs.series == "coop end"]
    each = [scores(coop[coop.backbone == name]).droplevel(2) for name in order]
    judged = paired.judge_all([paired.judge_greater(more - less) for less, more in pairwise(each)])
    means = (f"{mean_of(one):.1f} on {name}" for one, name in zip(each, order, strict=True))
    return Finding(*judged, f"CoOp {', '.join(means)}")


@claim("Section 4.3, Table 2")
def beats_ensemble(piece: Slice, study: Study) -> Finding:
    """CoOp is above prompt ensembling.
    Holds if the difference to the seven selected templates (else to all eighty) is significant."""
    runs = main_runs(piece.runs)
    series = "ensemble" if (runs.series == "ensemble").any() else "ensemble all"
    found, shots = at_top(runs, "coop end", series)
    verdict, test = paired.judge_greater(found)
    return Finding(verdict, test, f"CoOp at {shots} minus ensembling {test.mean:+.2f}")


@claim("Section 4.3, Table 3")
def init_does_not_matter(piece: Slice, study: Study) -> Finding:
    """Random and word initialization perform similarly.
    Holds if their difference is significantly within 1 point."""
    runs = piece.runs[piece.runs.series == "coop end"]
    runs = runs[runs.shots == main_setting(piece.runs).shots]
    keys = ["dataset", "seed", "context_length"]
    is_random = runs.init == "random"
    words, random = (runs[kind].groupby(keys).accuracy.mean() for kind in (~is_random, is_random))
    found = (words - random).dropna()
    if found.empty:
        raise Missing("no context length has CoOp runs with both random and word initialization")
    verdict, test = paired.judge_equal(found.groupby(level=[0, 1]).mean(), MARGIN)
    return Finding(verdict, test, f"words minus random {test.mean:+.2f}")


@claim("Section 4.3, Table 5")
def table5_order(piece: Slice, study: Study) -> Finding:
    """Fine-tuning the image encoder < linear probe < zero-shot < text transform < text bias < CoOp.
    Holds if each difference between neighbors is significant; the p shown is the weakest."""
    runs = main_runs(piece.runs)
    runs = runs[runs.shots.isin((0.0, main_setting(runs).shots))]
    found = [series for series in ORDER if series in set(runs.series)]
    if not {"text_transform", "text_bias"} & set(found):
        raise Missing("there is no run of text_transform or text_bias")
    having = set.intersection(*(set(runs.dataset[runs.series == series]) for series in found))
    if not having:
        raise Missing("no dataset has runs of all the methods compared")
    runs = runs[runs.dataset.isin(having)]
    pairs = [difference(runs, more, less).droplevel(2) for less, more in pairwise(found)]
    verdict, test = paired.judge_all(list(map(paired.judge_greater, pairs)))
    means = {series: mean_of(scores(runs[runs.series == series])) for series in found}
    numbers = " < ".join(f"{series.split()[0]} {mean:.1f}" for series, mean in means.items())
    lacking = [series.split()[0] for series in ORDER if series not in found]
    if lacking:
        numbers += f"; without {', '.join(lacking)}"
        verdict = paired.UNKNOWN if verdict == paired.HOLDS else verdict
    return Finding(verdict, test, f"claimed: {numbers}")


def _words(runs: pd.DataFrame, study: Study) -> list[tuple[tuple[str, int], NearestWords]]:
    """Return ((dataset, seed), nearest words) of unified contexts with the class at the end."""
    runs = runs[runs.series == "coop end"]
    found = [((run.dataset, run.seed), study.read(read_words, run.key)) for run in rows_of(runs)]
    stored = [(where, words) for where, words in found if words]
    if not stored:
        raise Missing("no nearest words are stored for such runs; run `fastcoop interpret`")
    return stored


def _judge_shares(shares: Sequence[tuple[tuple[str, int], float]], above: float) -> paired.Judgment:
    """Return the verdict on "greater than ``above``" about percentages of runs, by (dataset, seed)."""
    index = pd.MultiIndex.from_tuples([where for where, _ in shares])
    return paired.judge_greater(pd.Series([value for _, value in shares], index), above=above)


@claim("Section 4.3, Table 4")
def words_say_little(piece: Slice, study: Study) -> Finding:
    """Nearest words of learned contexts are hardly interpretable.
    Holds if their mean distance is significantly above 90% of that of random vectors of the same length."""
    length = main_setting(piece.runs).length
    runs = piece.runs[(piece.runs.init == "random") & (piece.runs.context_length == length)]
    shares = [
        (where, 100 * words.vectors.distance.mean() / words.vectors.chance.mean())
        for where, words in _words(runs, study)
    ]
    verdict, test = _judge_shares(shares, 100 * NEAR)
    return Finding(verdict, test, f"mean distance {test.mean:.1f}% of that of random vectors")


@claim("Section 4.3")
def words_stay(piece: Slice, study: Study) -> Finding:
    """Contexts that were initialized with words stay nearest to these words.
    Holds if significantly more than half of the vectors of a context do."""
    shares, stayed, total = [], 0, 0
    for where, words in _words(piece.runs[piece.runs.init != "random"], study):
        if pairs := list(zip(words.vectors.token, words.start_words, strict=False)):
            same = sum(token == word for token, word in pairs)
            shares.append((where, 100 * same / len(pairs)))
            stayed, total = stayed + same, total + len(pairs)
    if not shares:
        raise Missing(
            "the stored nearest words do not name the words of the initialization; run `fastcoop interpret` again"
        )
    numbers = f"{stayed} of {total} vectors are nearest to the word that they were initialized with"
    return Finding(*_judge_shares(shares, 50.0), numbers)
