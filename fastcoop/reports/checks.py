"""How each finding of the paper on accuracies is checked on a slice of the results; words are in `word_checks`.

What is compared is paired: same dataset, same seed (so the same training images), same number of shots. What
several checks hold in common:

- shots that not every dataset has stay out of averages over shots (`balanced`);
- a claim about several things at once holds if every one of them is significant, and fails if
  contraries are, corrected for looking at several (`every`);
- targets of one source are tests of the same learned contexts, so under shift it is sources that count as
  datasets (`_moved`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pandas as pd

from fastcoop.reports.items.figure5b import across_backbones, by_strength
from fastcoop.reports.items.table1 import shifted
from fastcoop.reports.paired import (
    FAILS,
    HOLDS,
    LEVEL,
    SEEDS,
    UNKNOWN,
    Paired,
    alike,
    every,
    greater,
    paired_test,
)
from fastcoop.reports.study import (
    Missing,
    Slice,
    Study,
    in_shots,
    main_runs,
    main_setting,
    most_shots,
    shots_text,
)

MARGIN = 1.0  # percentage points within which two means count as alike
GAIN, GAIN_MARGIN = 15.0, 5.0  # the paper's average gain at 16 shots, and how near to it counts as "around"


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
    """Accuracy indexed by (dataset, seed, shots); runs that share these three count once, as their mean.

    Raises Missing for an empty table."""
    runs = runs.dropna(subset=["accuracy"])
    if runs.empty:
        raise Missing("runs to compare are missing")
    return runs.groupby(["dataset", "seed", "shots"]).accuracy.mean()


def over_shots(differences: pd.Series) -> pd.Series:
    """Differences by (dataset, seed, shots) averaged over the shots that all datasets have. Raises Missing where
    nothing could be paired."""
    return balanced(differences).groupby(level=[0, 1]).mean()


def balanced(differences: pd.Series) -> pd.Series:
    """Only the shots that every dataset has, and of a dataset only the seeds that have them all, so that averages
    over shots compare like with like. Raises Missing where nothing is left."""
    wide = differences.dropna().unstack(level=2)
    if wide.empty:
        raise Missing("no runs on the same dataset, shots and seed to pair")
    shared = wide.columns[wide.groupby(level=0).count().gt(0).all()]
    if shared.empty:
        raise Missing("no number of shots was run on all datasets")
    kept = wide[shared].dropna()
    return pd.Series(kept.stack())


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
    differences = differences.dropna()
    kept = differences[[wanted(shots) for shots in differences.index.get_level_values(2)]]
    if kept.empty:
        raise Missing(f"there are no runs at {what}")
    return kept


def by_shots(differences: pd.Series) -> str:
    """The mean over datasets of the mean difference at each number of shots, as text."""
    means = differences.groupby(level=[2, 0]).mean().groupby(level=0).mean()
    names = [*map(shots_text, means.index[:-1]), in_shots(means.index[-1])]
    return ", ".join(f"{mean:+.1f} at {name}" for name, mean in zip(names, means, strict=True))


def beats_prompts(piece: Slice, study: Study) -> Finding:
    gains = balanced(above_zero_shot(main_runs(piece.runs), "coop end"))
    at(gains, lambda shots: shots == 2, "2 shots")
    later = at(gains, lambda shots: shots >= 2, "2 shots or more")
    shots = sorted(later.index.unique(level=2))
    tests = [greater(later.xs(count, level=2)) for count in shots]
    verdict, test = every(tests)
    numbers = f"gain over zero-shot {by_shots(gains)}; the test is that at {_where(test, tests, shots)}"
    return Finding(verdict, numbers, test)


def _where(test: Paired, tests: Sequence[tuple[str, Paired]], shots: Sequence[float]) -> str:
    """At which number of shots ``test`` was made."""
    return next(shots_text(n) for n, (_, one) in zip(shots, tests, strict=True) if one is test)


def large_gain(piece: Slice, study: Study) -> Finding:
    runs = main_runs(piece.runs)
    top = most_shots(runs)
    gains = at(above_zero_shot(runs, "coop end"), lambda n: n == top, in_shots(top))
    # The mean of these datasets is what the paper speaks of, however unlike they are: seeds are the unit.
    verdict, test = alike(gains.droplevel(2), GAIN_MARGIN, centre=GAIN, unit=SEEDS)
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


def beats_probe(piece: Slice, study: Study) -> Finding:
    lead = _over_probe(piece)
    verdict, test = greater(over_shots(lead))
    return Finding(verdict, f"lead over the probe {by_shots(lead)}", test)


def lead_shrinks(piece: Slice, study: Study) -> Finding:
    lead = _over_probe(piece)
    few = over_shots(at(lead, lambda shots: shots <= 2, "1 or 2 shots"))
    many = over_shots(at(lead, lambda shots: shots >= 8, "8 shots or more"))
    verdict, test = greater((few - many).dropna())
    return Finding(verdict, f"lead over the probe {by_shots(lead)}", test)


def end_like_mid(piece: Slice, study: Study) -> Finding:
    runs = main_runs(piece.runs)
    difference = balanced(scores(runs[runs.series == "coop mid"]) - scores(runs[runs.series == "coop end"]))
    # Not on the average over shots, in which mid ahead at many and behind at few would read as alike.
    shots = sorted(difference.index.unique(level=2))
    tests = [alike(difference.xs(count, level=2), MARGIN) for count in shots]
    verdict, test = every(tests)
    numbers = f"mid minus end {by_shots(difference)}; the test is that at {_where(test, tests, shots)}"
    return Finding(verdict, numbers, test)


def _specific(piece: Slice) -> pd.Series:
    runs = main_runs(piece.runs)
    return scores(runs[runs.series == "coop end csc"]) - scores(runs[runs.series == "coop end"])


def specific_needs_data(piece: Slice, study: Study) -> Finding:
    difference = balanced(_specific(piece))
    few = at(difference, lambda shots: shots < 8, "fewer than 8 shots")
    verdict, test = greater(-over_shots(few))
    return Finding(verdict, f"class-specific minus unified {by_shots(difference)}", test)


def specific_wins_some(piece: Slice, study: Study) -> Finding:
    top = most_shots(main_runs(piece.runs))
    last = at(_specific(piece), lambda shots: shots == top, in_shots(top)).droplevel(2)
    tests = {str(name): paired_test(values) for name, values in last.groupby(level=0)}
    tests = {name: test for name, test in tests.items() if not math.isnan(test.p)}
    if not tests:
        return Finding(UNKNOWN, "takes three seeds of a dataset")
    won = [f"{name} {t.mean:+.1f}" for name, t in tests.items() if t.mean > 0 and t.p < LEVEL / len(tests)]
    ahead = sum(test.mean > 0 for test in tests.values())
    numbers = f"ahead on {ahead} of {len(tests)} at {in_shots(top)}"
    numbers += f"; beyond chance on {', '.join(won) or 'none'}"
    nowhere = all(test.against < LEVEL for test in tests.values())
    name, best = min(tests.items(), key=lambda pair: pair[1].p)
    numbers += f"; the test is that on {name}" + (f", its p times {len(tests)}" if len(tests) > 1 else "")
    corrected = replace(best, p_seeds=min(1.0, best.p_seeds * len(tests)))
    return Finding(HOLDS if won else FAILS if nowhere else UNKNOWN, numbers, corrected)


def _lengths(runs: pd.DataFrame, init: str) -> tuple[pd.Series, str]:
    """Accuracy of the longest context minus that of the shortest at the most shots, class at the end, and the
    mean at each length."""
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


def longer_is_better(piece: Slice, study: Study) -> Finding:
    difference, means = _lengths(piece.runs, main_setting(piece.runs)[1])
    verdict, test = greater(difference)
    return Finding(verdict, means, test)


def _moved(piece: Slice) -> pd.DataFrame:
    """Runs tested under shift: the mean over a source's targets as ``accuracy``, the source as ``dataset``.

    Only what was tested on all of a source's targets counts."""
    found = []
    for source, (targets, runs) in shifted(piece).items():
        away = runs[runs.dataset.isin(targets)].fillna({"context_length": 0.0, "init": "random"})
        kinds = ["method", "series", "context_length", "init", "shots", "seed"]
        wide = away.pivot_table(index=kinds, columns="dataset", values="accuracy")
        whole = wide.reindex(columns=targets).dropna().mean(axis=1)
        found.append(whole.rename("accuracy").reset_index().assign(dataset=source))
    return pd.concat(found)


def shorter_is_robust(piece: Slice, study: Study) -> Finding:
    difference, means = _lengths(_moved(piece), main_setting(piece.everything)[1])
    verdict, test = greater(-difference)
    return Finding(verdict, f"mean of targets: {means}", test)


def robust(piece: Slice, study: Study) -> Finding:
    runs = _moved(piece)
    shortest = runs.context_length[runs.series == "coop end"].min()
    runs = runs[(runs.series != "coop end") | (runs.context_length == shortest)]
    verdict, test = greater(above_zero_shot(runs, "coop end").droplevel(2))
    numbers = f"mean of targets: CoOp (M={int(shortest)}) minus zero-shot {test.mean:+.2f}"
    return Finding(verdict, numbers, test)


def probe_is_not_robust(piece: Slice, study: Study) -> Finding:
    verdict, test = greater(-above_zero_shot(_moved(piece), "linear_probe").droplevel(2))
    return Finding(verdict, f"mean of targets: linear probe minus zero-shot {-test.mean:+.2f}", test)


def better_backbone(piece: Slice, study: Study) -> Finding:
    shots = most_shots(study.runs)
    joined = dict(across_backbones(study, shots, ("zero_shot", "coop end")))
    if piece.schedule not in joined:
        raise Missing("CoOp was run on one backbone only")
    order = by_strength(joined[piece.schedule])
    coop = joined[piece.schedule]
    coop = coop[coop.series == "coop end"]
    each = [scores(coop[coop.backbone == name]).droplevel(2) for name in order]
    verdict, test = every([greater((more - less).dropna()) for less, more in pairwise(each)])
    means = (f"{one.groupby(level=0).mean().mean():.1f} on {n}" for one, n in zip(each, order, strict=True))
    return Finding(verdict, f"CoOp {', '.join(means)}", test)


def beats_ensemble(piece: Slice, study: Study) -> Finding:
    runs = main_runs(piece.runs)
    top = most_shots(runs)
    series = "ensemble" if (runs.series == "ensemble").any() else "ensemble all"
    ensemble = runs[runs.series == series].groupby("dataset").accuracy.mean()
    if ensemble.empty:
        raise Missing("there is no run of ensemble")
    coop = scores(runs[(runs.series == "coop end") & (runs.shots == top) & runs.dataset.isin(ensemble.index)])
    verdict, test = greater((coop - on_datasets(ensemble, coop)).droplevel(2))
    return Finding(verdict, f"CoOp at {in_shots(top)} minus ensembling {test.mean:+.2f}", test)


def init_does_not_matter(piece: Slice, study: Study) -> Finding:
    runs = piece.runs[(piece.runs.series == "coop end") & (piece.runs.shots == most_shots(piece.runs))]
    worded = runs.init.fillna("random") != "random"
    keys = ["dataset", "seed", "context_length"]
    words, random = (runs[kind].groupby(keys).accuracy.mean() for kind in (worded, ~worded))
    difference = (words - random).dropna()
    if difference.empty:
        raise Missing("no context length has CoOp runs with both random and word initialisation")
    verdict, test = alike(difference.groupby(level=[0, 1]).mean(), MARGIN)
    return Finding(verdict, f"words minus random {test.mean:+.2f}", test)


ORDER = ("finetune_image_encoder", "linear_probe", "zero_shot", "text_transform", "text_bias", "coop end")


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
    verdict, test = every([greater((learned[b] - learned[a]).dropna()) for a, b in pairwise(found)])
    means = learned.groupby(level=0).mean().mean()
    numbers = " < ".join(f"{s.split()[0]} {means[s]:.1f}" for s in found)
    lacking = [series.split()[0] for series in ORDER if series not in found]
    if lacking:
        numbers += f"; without {', '.join(lacking)}"
        verdict = UNKNOWN if verdict == HOLDS else verdict
    return Finding(verdict, f"claimed: {numbers}", test)
