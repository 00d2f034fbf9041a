"""Products whose rows do not depend on which other rows stand beside them.

A BLAS chooses its kernels by the number of rows, and another kernel sums in another order. So that a run gives the
same bits alone and among others, products on a CPU get numbers of rows that this machine's BLAS treats alike (spare
rows fill up), and few rows are summed in the pieces in which the BLAS sums many. Which numbers and pieces these are is
measured once in a process, on products of the tower's own shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastcoop.engine.weights import FoldedTower

CPU_CHUNK = (
    1920  # rows of a product at most: 512-wide towers' MLP activations (15 MB) stay in the last-level cache
)
WHOLE = 512  # terms; shorter sums are left whole
FEW = CPU_CHUNK // 2  # rows of a product that is summed in pieces, where there is need
GRAIN = 32768  # numbers; torch does an element-wise operation on fewer in one thread
VECTOR = 32  # numbers; torch's element-wise loops take the rest behind a multiple of them by other means


class RowRule(NamedTuple):
    """Products that a BLAS treats alike.

    Attributes:
        least, step: numbers of rows: ``least`` and more of them, in multiples of ``step``.
        terms: of each piece of a sum, where there are fewer than ``FEW`` rows; None: sums are left whole.
    """

    least: int
    step: int
    terms: int | None = None

    def mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """``a @ b`` of (rows, n) and (n, m)."""
        terms = self._terms_of(a)
        if terms == a.shape[1]:
            return torch.mm(a, b, out=out)
        return self.addmm_(torch.mm(a[:, :terms], b[:terms], out=out), a[:, terms:], b[terms:])

    def addmm_(self, onto: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Add ``a @ b`` to ``onto``, in place."""
        terms = self._terms_of(a)
        for start in range(0, a.shape[1], terms):
            part = slice(start, start + terms)
            torch.addmm(onto, a[:, part], b[part], out=onto)
        return onto

    def _terms_of(self, a: Tensor) -> int:
        rows, terms = a.shape
        return terms if self.terms is None or rows >= FEW or terms <= WHOLE else self.terms

    def padded(self, rows: int) -> int:
        """The next allowed number, where products take ``CPU_CHUNK`` rows at a time; ``step`` divides that."""
        full, rest = divmod(rows, CPU_CHUNK)
        rest = max(self.least, -(-rest // self.step) * self.step) if rest else 0
        return full * CPU_CHUNK + rest


ANY = RowRule(1, 1)
# The first that holds is taken: it wastes least. Kernels of today's BLAS work on 4 to 48 rows, MKL's on 384 terms.
RULES = (
    RowRule(16, 1),
    RowRule(16, 1, 384),
    *(RowRule(least, 48, terms) for least in (48, 96, 192, 384, 576) for terms in (None, 384)),
)


def row_rule(tower: FoldedTower) -> RowRule:
    """The rule for training over ``tower`` with the present number of threads; ``ANY`` on a GPU.

    A GPU's libraries choose by rows, too, in ways that cannot be measured as cheaply: there runs agree to rounding.
    """
    if tower.device.type != "cpu":
        return ANY
    return _measured(tower.width, tower.hidden, tower.dim, tower.dtype, torch.get_num_threads())


@lru_cache(maxsize=32)
def _measured(width: int, hidden: int, dim: int, dtype: torch.dtype, threads: int) -> RowRule:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float32).to(dtype)

    shapes = ((hidden, width), (width, 3 * width), (width, width), (width, dim))
    forward = [random(*shape) for shape in shapes]
    products = []
    for matrix in [*forward, *(matrix.t() for matrix in forward)]:
        rows = random(CPU_CHUNK, len(matrix))
        products.append((rows, matrix, rows @ matrix))
    return next((rule for rule in RULES if all(_holds(rule, *product) for product in products)), ANY)


def _holds(rule: RowRule, rows: Tensor, matrix: Tensor, whole: Tensor) -> bool:
    """Whether products of allowed numbers of ``rows``, and of rows in other places, are those of all of them."""
    sizes = [rule.least + step * rule.step for step in (0, 1, 2, 3, 5, 8, 21, 55, 144)]
    for number, size in enumerate([*(size for size in sizes if size < FEW), FEW]):
        start = rule.step * (number % 3)
        part = slice(start, start + size)
        if not torch.equal(rule.mm(rows[part], matrix), whole[part]):
            return False
    return True


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm``, each product of which is the same however many there are.

    On a CPU a few products are each shared out among threads, many are not: there are always as many as threads.
    """
    missing = torch.get_num_threads() - len(a) if a.device.type == "cpu" else 0
    if missing <= 0:
        return torch.bmm(a, b)
    a, b = (torch.cat([x, x[:1].expand(missing, -1, -1)]) for x in (a, b))
    return torch.bmm(a, b)[:-missing]


@contextmanager
def threads_at_most(number: int) -> Iterator[None]:
    """Compute with no more threads than there are products in the smallest batch of them, an attention's heads."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, number))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def even_pieces(numbers: Tensor) -> Iterator[slice]:
    """Cut ``numbers`` (rows, width) for an element-wise operation, so that each is computed by the same means always.

    Torch gives every thread an equal share of the numbers. From three threads on such a share may end within a
    vector, whose numbers are then rounded otherwise; where it does depends on the number of rows.
    """
    rows, width = numbers.shape
    threads = torch.get_num_threads() if numbers.device.type == "cpu" else 1
    if threads < 3:
        yield slice(0, rows)
        return
    share = -(-GRAIN // width)  # rows, of each thread
    even = rows // (share * threads) * share * threads
    if even:
        yield slice(0, even)
    alone = max(1, (GRAIN - 1) // width)
    yield from (slice(at, min(at + alone, rows)) for at in range(even, rows, alone))
