"""The paper's findings, judged on any results. A new one is an entry below and a function in `checks`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastcoop.reports import checks, word_checks
from fastcoop.reports.checks import GAIN, GAIN_MARGIN, MARGIN, Finding, p_text
from fastcoop.reports.paired import CONFIDENCE, FEWEST_DATASETS, LEVEL, UNKNOWN, Paired
from fastcoop.reports.study import Missing, Slice, Study
from fastcoop.reports.table import Cell, Table
from fastcoop.reports.words import NEAR


@dataclass(frozen=True)
class Claim:
    """A finding of the paper. ``holds_if`` says what makes it hold here; ``check`` raises Missing for lack
    of runs."""

    text: str
    where: str
    holds_if: str
    check: Callable[[Slice, Study], Finding]


@dataclass(frozen=True)
class Judged:
    """A claim and what one slice of the results says of it."""

    claim: Claim
    results: str
    finding: Finding


def judge(study: Study) -> list[Judged]:
    """Every claim on every slice; "not enough runs", with what is missing, where it cannot be checked."""
    judged: list[Judged] = []
    slices = study.slices()
    for claim in CLAIMS:
        found = [Judged(claim, piece.short, _check(claim, piece, study)) for piece in slices]
        # What no slice can check is said once, and so is what joins them all (backbones against each other).
        same = len({(one.finding.verdict, one.finding.numbers) for one in found}) == 1 and len(found) > 1
        judged += [Judged(claim, "all", found[0].finding)] if same else found
    return judged


def _check(claim: Claim, piece: Slice, study: Study) -> Finding:
    try:
        return claim.check(piece, study)
    except Missing as why:
        return Finding(UNKNOWN, str(why))


COLUMNS = (
    "verdict", "numbers here", "difference", "interval", "unit", "datasets", "pairs", "p over datasets",
    "p over seeds",
)  # fmt: skip


def texts_of(test: Paired | None) -> dict[str, str]:
    """What a test found, by column of `COLUMNS`, as it is read; empty where there is none."""
    if test is None:
        return {}
    return {
        "difference": "" if math.isnan(test.mean) else f"{test.mean:+.2f}",
        "interval": "" if math.isnan(test.low) else f"[{test.low:+.2f}, {test.high:+.2f}]",
        "unit": test.unit,
        "datasets": str(test.datasets),
        "pairs": str(test.pairs),
        "p over datasets": p_text(test.p_datasets),
        "p over seeds": p_text(test.p_seeds),
    }


def claims_table(judged: list[Judged]) -> Table:
    """The claims as a table of text: claim, results, numbers, tests, verdict."""
    table = Table(
        "The paper's claims on these results",
        ("claim", "in the paper", "holds here if", "results"),
        COLUMNS,
        "item",
        unit="",
    )
    for one in judged:
        cells: dict[str, Cell | str] = {"numbers here": one.finding.numbers, "verdict": one.finding.verdict}
        cells |= texts_of(one.finding.test)
        table.add((one.claim.text, one.claim.where, one.claim.holds_if, one.results), cells)
    table.notes = list(NOTES)
    return table


NOTES = (
    "A difference is measured between runs of the same dataset, seed and number of shots; it and its"
    f" {CONFIDENCE:.0%} interval (Student's t, so over datasets it can differ a little from the verdict by ranks) are"
    " in percentage points, or in percent where the claim speaks of shares. “Holds”: significant at"
    f" p < {LEVEL}, one-sided. “Does not hold”: the contrary is significant. “Not enough runs”: neither is, so these"
    " results cannot tell. Where a claim says several things at once, it holds if each is significant, and does not if"
    " contraries are, by Simes' rule for several tests. No correction is made for the number of claims.",
    f"The unit says what counted as independent. With {FEWEST_DATASETS} datasets or more it is datasets, one mean"
    " each: Wilcoxon's signed-rank test, exact; it asks whether the claim holds on datasets like these. With fewer"
    " it is seeds: a paired t test with each dataset's own variance, which speaks of these datasets only; more seeds"
    " never stand in for more datasets. Targets of one source are one dataset, since they test the same contexts."
    " Drawing other test images is not accounted for.",
)


CLAIMS = (
    Claim(
        "CoOp beats hand-crafted prompts with as few as two shots, and from there on",
        "Section 4.1",
        "the gain is significant at 2 shots, and at each larger number of shots too",
        checks.beats_prompts,
    ),
    Claim(
        "At 16 shots the average gain over hand-crafted prompts is around 15 points",
        "Section 4.1, Figure 4",
        f"it is significantly within {GAIN_MARGIN:g} points of {GAIN:g} on these datasets (seeds are the unit)",
        checks.large_gain,
    ),
    Claim(
        "CoOp is above the linear probe",
        "Section 4.1",
        "its lead, averaged over shots, is significant",
        checks.beats_probe,
    ),
    Claim(
        "The lead over the linear probe is largest with one or two shots",
        "Section 4.1",
        "the lead at 1 and 2 shots significantly exceeds that at 8 and more",
        checks.lead_shrinks,
    ),
    Claim(
        "The class at the end and in the middle perform alike",
        "Section 4.1",
        f"their difference is significantly within {MARGIN:g} point at each number of shots",
        checks.end_like_mid,
    ),
    Claim(
        "Class-specific contexts are worse than unified ones below 8 shots",
        "Section 4.1",
        "the difference, averaged over the numbers of shots below 8, is significant",
        checks.specific_needs_data,
    ),
    Claim(
        "At 16 shots class-specific contexts are better on some datasets",
        "Section 4.1",
        "a paired t test over seeds is significant on at least one dataset, by Bonferroni's rule; it fails if they"
        " are significantly worse on every dataset",
        checks.specific_wins_some,
    ),
    Claim(
        "More context vectors are better on the dataset itself",
        "Section 4.3, Figure 5a",
        "at the most shots the longest context is significantly above the shortest",
        checks.longer_is_better,
    ),
    Claim(
        "Fewer context vectors are better under distribution shift",
        "Section 4.2, Table 1",
        "the shortest context is significantly above the longest on the mean of targets",
        checks.shorter_is_robust,
    ),
    Claim(
        "CoOp is above zero-shot CLIP on shifted targets",
        "Section 4.2, Table 1",
        "the shortest context's gain on the mean of targets is significant",
        checks.robust,
    ),
    Claim(
        "The linear probe falls below zero-shot CLIP on shifted targets",
        "Section 4.2, Table 1",
        "its loss on the mean of targets is significant",
        checks.probe_is_not_robust,
    ),
    Claim(
        "The better the backbone, the better CoOp",
        "Section 4.3, Figure 5b",
        "each backbone is significantly above the next weaker one by zero-shot; the p shown is the weakest",
        checks.better_backbone,
    ),
    Claim(
        "CoOp is above prompt ensembling",
        "Section 4.3, Table 2",
        "the difference to the seven selected templates (else to all eighty) is significant",
        checks.beats_ensemble,
    ),
    Claim(
        "Random and word initialisation perform alike",
        "Section 4.3, Table 3",
        f"their difference is significantly within {MARGIN:g} point",
        checks.init_does_not_matter,
    ),
    Claim(
        "Fine-tuning the image encoder < linear probe < zero-shot < text transform < text bias < CoOp",
        "Section 4.3, Table 5",
        "each neighbouring difference is significant; the p shown is the weakest",
        checks.table5_order,
    ),
    Claim(
        "Nearest words of learned contexts say little",
        "Section 4.3, Table 4",
        f"the mean distance to the nearest word is significantly above {NEAR:.0%} of that of random vectors as long",
        word_checks.words_say_little,
    ),
    Claim(
        "Contexts started from words stay nearest to these words",
        "Section 4.3",
        "significantly more than half of a context's vectors do",
        word_checks.words_stay,
    ),
)
