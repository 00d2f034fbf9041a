"""The paper's findings, judged on any results. A new one is an entry below and a function in `checks`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastcoop.reports import checks
from fastcoop.reports.checks import MARGIN, NEAR, Finding, p_text
from fastcoop.reports.paired import LEVEL, UNKNOWN
from fastcoop.reports.study import Missing, Slice, Study
from fastcoop.reports.table import Cell, Table


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


def claims_table(judged: list[Judged]) -> Table:
    """The claims as a table of text: claim, results, numbers, tests, verdict."""
    columns = ("verdict", "numbers here", "datasets", "pairs", "p over datasets", "p over seeds")
    table = Table(
        "The paper's claims on these results",
        ("claim", "in the paper", "holds here if", "results"),
        columns,
        "item",
        unit="",
    )
    for one in judged:
        cells: dict[str, Cell | str] = {"numbers here": one.finding.numbers, "verdict": one.finding.verdict}
        if test := one.finding.test:
            cells |= {"datasets": str(test.datasets), "pairs": str(test.pairs)}
            cells |= {"p over datasets": p_text(test.p_datasets), "p over seeds": p_text(test.p_seeds)}
        table.add((one.claim.text, one.claim.where, one.claim.holds_if, one.results), cells)
    table.notes = [
        f"Differences are in percentage points. Verdicts at p < {LEVEL}, one-sided, without correction for"
        f" the number of"
        " claims: by Wilcoxon's signed-rank test over dataset means where there are five datasets or more,"
        " else by a paired"
        " t test over seeds, which speaks of these datasets only. A claim whose difference has the claimed"
        " sign without"
        " being significant is “not enough runs”; one whose difference has the other sign does not hold."
    ]
    return table


CLAIMS = (
    Claim(
        "CoOp beats hand-crafted prompts with as few as two shots, and from there on",
        "Section 4.1",
        "the gain at 2 shots is significant and no larger training set has a mean gain below 0",
        checks.beats_prompts,
    ),
    Claim(
        "At 16 shots the average gain over hand-crafted prompts is around 15 points",
        "Section 4.1, Figure 4",
        "the gain is significantly above 10 points",
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
        f"their difference is significantly within {MARGIN:g} point",
        checks.end_like_mid,
    ),
    Claim(
        "Class-specific contexts are worse than unified ones below 8 shots",
        "Section 4.1",
        "the difference below 8 shots is significant",
        checks.specific_needs_data,
    ),
    Claim(
        "At 16 shots class-specific contexts are better on some datasets",
        "Section 4.1",
        "a paired t test over seeds is significant on at least one dataset, by Bonferroni's rule",
        checks.specific_wins_some,
    ),
    Claim(
        "More context vectors are better on the dataset itself",
        "Section 4.3, Figure 5a",
        "the longest context is significantly above the shortest",
        checks.longer_is_better,
    ),
    Claim(
        "Fewer context vectors are better under distribution shift",
        "Section 4.2, Table 1",
        "the shortest context is significantly above the longest on targets",
        checks.shorter_is_robust,
    ),
    Claim(
        "CoOp is above zero-shot CLIP on shifted targets",
        "Section 4.2, Table 1",
        "the shortest context's gain on targets is significant",
        checks.robust,
    ),
    Claim(
        "The linear probe falls below zero-shot CLIP on shifted targets",
        "Section 4.2, Table 1",
        "its loss on targets is significant",
        checks.probe_is_not_robust,
    ),
    Claim(
        "The better the backbone, the better CoOp",
        "Section 4.3, Figure 5b",
        "the strongest backbone by zero-shot is significantly above the weakest, and all are in order",
        checks.better_backbone,
    ),
    Claim(
        "CoOp is above prompt ensembling",
        "Section 4.3, Table 2",
        "the difference is significant",
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
        f"vectors are significantly not nearer to a word than {NEAR:.0%} of a random context's distance",
        checks.words_say_little,
    ),
    Claim(
        "Contexts started from words stay nearest to these words",
        "Section 4.3",
        "significantly more than half of the vectors do",
        checks.words_stay,
    ),
)
