"""A run has the same bits alone and in the company of other runs, for any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastcoop.engine import Run, train
from fastcoop.engine.weights import ANY_ROWS, CPU_CHUNK, RULES, RowRule, bmm, even_slices, fold, row_rule
from fastcoop.prompts import PromptLayout
from tests.engine.conftest import tiny_backbone

WIDTH = 128  # wide enough for a BLAS's kernels to differ from one another
ANIMALS = ("cat", "cat fish", "dog", "a big lion", "lynx", "small grey owl", "bee")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wide():
    return tiny_backbone(torch.float32, width=WIDTH, layers=2)


def run_of(number, layout, names=ANIMALS, images=12, **options):
    draw = torch.Generator().manual_seed(number)
    contexts = 0.1 * torch.randn(layout.shape(len(names), WIDTH), generator=draw)
    features = torch.randn(images, 2, 24, generator=draw)
    labels = torch.randint(len(names), (images,), generator=draw)
    options = {"epochs": 3, "learning_rate": 0.05, **options}
    return Run(names, layout, contexts, features, labels, seed=number, **options)


def company():
    """Runs of every layout, of several lengths, class counts and batch sizes."""
    layouts = [
        PromptLayout(length, position, specific)
        for length, position in ((1, "end"), (4, "mid"), (5, "front"))
        for specific in (False, True)
    ]
    runs = [run_of(n, layout, ANIMALS[: 2 + n % 6], 7 + 5 * n) for n, layout in enumerate(layouts)]
    return [*runs, run_of(50, layouts[0], batch_size=3), run_of(51, layouts[0], batch_size=40, images=64)]


def test_a_run_comes_to_the_same_bits_alone_and_in_company(wide, threads):
    if row_rule(fold(wide.text)) == ANY_ROWS:
        pytest.skip("this machine's BLAS treats no numbers of rows alike")
    runs = company()
    together = train(wide, runs)
    others = train(wide, [run_of(90, PromptLayout(3, "mid")), *runs[::-1], run_of(91, PromptLayout(8))])
    for number, run in enumerate(runs):
        (alone,) = train(wide, [run])
        for other in (together[number], others[len(runs) - number]):
            assert torch.equal(alone.contexts, other.contexts), run.layout
            assert (alone.losses == other.losses).all()


def test_in_float64_too():
    backbone = tiny_backbone(torch.float64, width=WIDTH, layers=2)
    together = train(backbone, company())
    for number in (1, 3, 6):
        (alone,) = train(backbone, [company()[number]])
        assert torch.equal(alone.contexts, together[number].contexts)


def test_many_runs_of_one_tree_do_not_change_one(wide):
    layout = PromptLayout(4, "end")
    many = train(
        wide, [run_of(n, layout) for n in range(CPU_CHUNK // 20)]
    )  # more rows than one product takes
    for number in (0, len(many) - 1):
        (alone,) = train(wide, [run_of(number, layout)])
        assert torch.equal(alone.contexts, many[number].contexts)


def test_leaving_and_joining_do_not_change_a_run(wide):
    runs = [run_of(n, PromptLayout(4, "mid"), epochs=2 + 3 * (n % 4)) for n in range(9)]
    few = train(wide, runs, memory_budget=1)  # one after the other
    for alone, together in zip(few, train(wide, runs), strict=True):
        assert torch.equal(alone.contexts, together.contexts)


def test_spare_rows_are_as_few_as_the_rule_allows():
    rule = RowRule(96, 48)
    assert [rule.padded(rows) for rows in (1, 96, 97, 144)] == [96, 96, 144, 144]
    assert [rule.padded(CPU_CHUNK + rows) - CPU_CHUNK for rows in (0, 1, 100)] == [0, 96, 144]
    assert [ANY_ROWS.padded(rows) for rows in (1, 77, CPU_CHUNK, CPU_CHUNK + 1)] == [
        1,
        77,
        CPU_CHUNK,
        CPU_CHUNK + 1,
    ]
    for rule in RULES:
        assert CPU_CHUNK % rule.step == 0
        for rows in (1, 100, CPU_CHUNK - 1, CPU_CHUNK, 3 * CPU_CHUNK + 5):
            assert rule.padded(rows) >= rows


class ProductTypes(TorchDispatchMode):
    """Notes the types of products."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.add(result.dtype)
        return result


def test_the_rule_of_rows_is_measured_without_the_callers_autocast():
    tower = fold(tiny_backbone(torch.float32, width=40, layers=1).text)  # sizes that nothing else measures
    with torch.autocast("cpu", torch.bfloat16), ProductTypes() as products:
        row_rule(tower)
    assert products.seen == {torch.float32}


def test_products_of_batches_are_the_plain_ones(threads):
    draw = torch.Generator().manual_seed(0)
    for runs in (1, 2, 5):
        a, b = torch.randn(runs, 6, 900, generator=draw), torch.randn(runs, 900, 11, generator=draw)
        assert torch.allclose(bmm(a, b), torch.bmm(a, b), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 512), (700, 512), (1919, 3072), (3, 70000)])
def test_pieces_cover_all_rows_once(threads, rows, width):
    pieces = list(even_slices(torch.empty(rows, width)))
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(rows))
