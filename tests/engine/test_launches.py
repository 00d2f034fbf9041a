"""A step with kernels, counted over fake CUDA tensors: its launches, its memory traffic, and what Triton compiles."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch on Linux")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fastcoop.backbones import Backbone
from fastcoop.datasets.official import paper_class_names
from fastcoop.engine.kernels.attention import TILE
from fastcoop.engine.kernels.forest_pass import KernelPass
from fastcoop.engine.kernels.step import MAX_BATCH
from fastcoop.engine.kernels.tiles import plan_tiles
from fastcoop.prompts import PromptLayout
from tests.engine.step_counting import Case, Launch, fake_step
from tests.engine.test_gpu import fakes_want_a_driver

pytestmark = pytest.mark.skipif(
    fakes_want_a_driver(), reason="this torch's fake tensors want a CUDA driver; there is none"
)
NAMES = {name: tuple(names) for name, names in paper_class_names().items()}
END, MIDDLE, OWN = PromptLayout(16), PromptLayout(16, "mid"), PromptLayout(16, "end", True)
FOUR = [
    Case(NAMES[dataset], layout, 15)
    for dataset in ("eurosat", "oxford_pets")
    for layout in (END, MIDDLE, OWN, PromptLayout(16, "mid", True))
]
FORESTS = {
    "four layouts": FOUR,
    "imagenet end": [Case(NAMES["imagenet"], END, 1)],
    "imagenet class-specific": [Case(NAMES["imagenet"], OWN, 1)],
    "eurosat end": [Case(NAMES["eurosat"], END, 64)],
}
VIT_B = {"width": 512, "heads": 8, "layers": 12, "dim": 1024, "dtype": torch.bfloat16}


@pytest.mark.parametrize("forest", FORESTS)
def test_launches_and_memory_traffic_of_a_step(forest: str, backbone32: Backbone) -> None:
    """As many launches for a hundred trees as for one; traffic in units of the bytes of one row, per row and layer."""
    with fake_step(FORESTS[forest], backbone32.tokenizer, **VIT_B) as (batch, launches):
        assert isinstance(batch.forest_pass, KernelPass)
        unit = batch.forest_pass.forest.rows * VIT_B["layers"] * VIT_B["width"] * VIT_B["dtype"].itemsize
        by_name = Counter(launch.name for launch in launches)
        assert by_name["mm"] == 100
        assert by_name["forward_kernel"] == by_name["backward_kernel"] == 12
        assert by_name["cross_entropy_kernel"] == by_name["note_losses_kernel"] == by_name["sgd_kernel"] == 1
        assert len(launches) <= 220
        assert sum(launch.bytes for launch in launches) <= 85 * unit
        trees = [(group.tree_layout.tree, group.runs) for group in batch.forest_pass.forest.groups]
    # The count takes each chain as one block, which backward keeps.
    assert plan_tiles(trees, "cpu", TILE).tiles[:, 3].max() <= TILE // 2


def test_large_batches_train_with_the_plain_loss(backbone32: Backbone) -> None:
    sizes = {"width": 32, "heads": 4, "layers": 2, "dim": 24, "dtype": torch.bfloat16}
    with fake_step(FORESTS["eurosat end"], backbone32.tokenizer, **sizes, batch_size=MAX_BATCH + 1) as (
        _,
        launches,
    ):
        by_name = Counter(launch.name for launch in launches)
    assert by_name["forward_kernel"] == by_name["backward_kernel"] == 2
    assert by_name["cross_entropy_kernel"] == by_name["sgd_kernel"] == 0


WIDTHS = {  # of open_clip's text towers, and of a small model: width, heads, dim, activation
    "small": (32, 4, 24, "gelu"),
    "ViT-B": (512, 8, 512, "silu"),
    "ViT-L": (768, 12, 768, "silu"),
    "ViT-H": (1024, 16, 1024, "gelu"),
    "ViT-bigG": (1280, 20, 1280, "gelu_tanh"),
}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
compiled: set[str] = set()
version = tuple(int(part) for part in triton.__version__.split(".")[:2])


@pytest.mark.slow
@pytest.mark.skipif(version < (3, 3), reason="this Triton compiles ahead of time by other names")
@pytest.mark.parametrize(
    ("tower", "dtype", "capabilities"),
    [
        ("small", torch.bfloat16, (80,)),
        *((tower, torch.bfloat16, (80, 90)) for tower in ("ViT-B", "ViT-L", "ViT-H", "ViT-bigG")),
        ("ViT-B", torch.float32, (90,)),  # in float32 both have the same instructions
    ],
)
def test_every_kernel_compiles_for_gpus(
    tower, dtype, capabilities, backbone32, tmp_path, monkeypatch
) -> None:
    """For A100 (80) and H100 (90), without a GPU: Triton's interpreter runs what its compiler refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    width, heads, dim, activation = WIDTHS[tower]
    cases = [Case(("cat", "cat fish"), layout, 2) for layout in (END, PromptLayout(4, "front"))]
    sizes = {"width": width, "heads": heads, "layers": 2, "dim": dim, "dtype": dtype}
    with fake_step(cases, backbone32.tokenizer, **sizes, activation=activation) as (_, launches):
        kernels = [source_of(launch) for launch in launches if launch.kernel is not None]
    sources = {f"{source.hash()} {warps}": (source, warps) for source, warps in kernels}
    assert sources
    for key in sorted(set(sources) - compiled):
        source, warps = sources[key]
        for capability in capabilities:
            done = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
            assert len(done.asm["cubin"]) > 0
            assert done.metadata.shared <= 99 * 1024, "more shared memory than small GPUs have"
        compiled.add(key)


def source_of(launch: Launch) -> tuple[Any, int]:
    """Return what Triton's JIT would compile for a launch, and its warps."""
    names, signature, constants, divisible = launch.kernel.arg_names, {}, {}, {}
    options = dict(launch.options)
    warps = options.pop("num_warps")
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[i,] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            divisible[i,] = [["tt.divisibility", 16]]
    for name, value in options.items():
        signature[name], constants[names.index(name),] = "constexpr", value
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=divisible), warps
