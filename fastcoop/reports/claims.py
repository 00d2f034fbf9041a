"""Claims that are judged on results: what a claim is, its verdict on every slice, and the table of verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastcoop.reports import paired
from fastcoop.reports.frames import Missing
from fastcoop.reports.study import Slice, Study
from fastcoop.reports.table import Cell, Table

NOTES = (
    "Differences are between runs with the same dataset, seed and number of shots, in percentage points (in percent for"
    f" claims about shares), with {paired.CONFIDENCE:.0%} intervals by Student's t. “Holds”: significant at"
    f" p < {paired.LEVEL}, one-sided. “Does not hold”: the opposite is significant. “Not enough runs”: neither is"
    " significant. A claim with several parts holds if every part is significant; it does not hold if the opposite of"
    " one is, by Simes' correction for several tests. P-values are not corrected for the number of claims.",
    f"The unit is what counts as independent. With {paired.FEWEST_DATASETS} datasets or more it is the dataset:"
    " Wilcoxon's exact signed-rank test on one mean per dataset asks whether the claim holds on datasets like these."
    " With fewer it is the seed: a paired t test with a variance for each dataset asks whether the claim holds on these"
    " datasets. More seeds do not replace more datasets. All targets of one source count as one dataset, because they"
    " test the same contexts. The variance from the choice of test images is not included.",
)
COLUMNS = (
    "verdict", "numbers here", "difference", "interval", "unit", "datasets", "pairs", "p over datasets",
    "p over seeds",
)  # fmt: skip


class Finding(NamedTuple):
    """What the results say about a claim: verdict, the test behind it (None if there is none), and numbers."""

    verdict: str
    test: paired.PairedDifference | None
    numbers: str


Check = Callable[[Slice, Study], Finding]


class Claim(NamedTuple):
    """A claim, where the paper makes it, when it holds here, and its check, which raises Missing for lack of runs."""

    text: str
    where: str
    holds_if: str
    check: Check


class Judged(NamedTuple):
    """A claim and its finding on one slice of the results."""

    claim: Claim
    results: str
    finding: Finding


def judge(study: Study, claims: Sequence[Claim]) -> list[Judged]:
    """Judge every claim on every slice; "not enough runs", with what is missing, if it cannot be checked."""
    judged: list[Judged] = []
    slices = study.slices()
    for claim in claims:
        found = []
        for piece in slices:
            try:
                finding = claim.check(piece, study)
            except Missing as missing:
                finding = Finding(paired.UNKNOWN, None, str(missing))
            found.append(Judged(claim, piece.short_title, finding))
        # A finding that all slices share, such as a comparison of backbones, is shown once.
        is_shared = len({(one.finding.verdict, one.finding.numbers) for one in found}) == 1 and len(found) > 1
        judged += [Judged(claim, "all", found[0].finding)] if is_shared else found
    return judged


def texts_of(test: paired.PairedDifference | None) -> dict[str, str]:
    """Return a test's results as text, by column of `COLUMNS`; empty without a test."""
    if test is None:
        return {}
    ps = {f"p over {paired.DATASETS}": test.p_datasets, f"p over {paired.SEEDS}": test.p_seeds}
    return {
        "difference": "" if math.isnan(test.mean) else f"{test.mean:+.2f}",
        "interval": "" if math.isnan(test.low) else f"[{test.low:+.2f}, {test.high:+.2f}]",
        "unit": test.unit,
        "datasets": str(test.datasets),
        "pairs": str(test.pairs),
        **{name: "" if math.isnan(p) else "<0.0001" if p < 1e-4 else f"{p:.2g}" for name, p in ps.items()},
    }


def claims_table(judged: list[Judged]) -> Table:
    """Return the claims and findings as a table of text."""
    heads = ("claim", "in the paper", "holds here if", "results")
    table = Table("The paper's claims on these results", heads, COLUMNS, "item", unit="", notes=list(NOTES))
    for claim, results, finding in judged:
        texts = {"numbers here": finding.numbers, "verdict": finding.verdict, **texts_of(finding.test)}
        table.add((claim.text, claim.where, claim.holds_if, results), dict[str, Cell | str](texts))
    return table
