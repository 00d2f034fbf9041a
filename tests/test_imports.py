"""fastcoop as a library: what it needs is declared, and neither importing nor calling it changes anything global."""

from __future__ import annotations

import ast
import json
import pkgutil
import random
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import numpy as np
import pytest
import sklearn.linear_model  # noqa: F401  (draws random numbers while it is imported for the first time)
import torch
from packaging.requirements import Requirement

import fastcoop
import fastcoop as fc
from fastcoop.backbones.precision import warn_if_dtype_is_slow
from fastcoop.methods import METHODS
from tests.methods.conftest import job, make_data, run
from tests.small_world import write_backbone, write_dataset

ROOT = Path(__file__).parents[1]
# Modules that are imported where they are used, for those who installed the extra.
# loky stands in for joblib's copy of it, where that has none.
EXTRAS = {"qtawesome": "demo", "distributed": "cluster", "pyarrow": "parquet"}
# Requirements of others, imported only where these are: of torch on Linux, and of a notebook's kernel.
OF_OTHERS = {"triton", "IPython"}

STATE = """
import json, locale, logging, os, random, sys, warnings
def state():
    import matplotlib, numpy, torch
    backends = torch.backends
    return {
        "environment": dict(os.environ),
        "warnings": [str(one) for one in warnings.filters],
        "locale": locale.setlocale(locale.LC_ALL),
        "handlers": [
            str(one) for one in logging.root.handlers + logging.getLogger("fastcoop").handlers
            if not isinstance(one, logging.NullHandler)
        ],
        "levels": [logging.root.level, logging.getLogger("fastcoop").level],
        "rcParams": {k: str(v) for k, v in matplotlib.rcParams.items()},
        "random": hash(random.getstate()), "numpy": str(numpy.random.get_state()), "errors": numpy.geterr(),
        "torch": torch.random.get_rng_state().sum().item(),
        "dtype": str(torch.get_default_dtype()), "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "flags": [backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.allow_tf32,
                  backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(), backends.mkldnn.enabled],
        "path": sys.path, "limits": [sys.getrecursionlimit(), sys.get_int_max_str_digits()],
        "excepthook": str(sys.excepthook), "streams": [str(sys.stdout), str(sys.stderr)],
    }
"""


def modules() -> list[str]:
    found = pkgutil.walk_packages(fastcoop.__path__, "fastcoop.")
    return [one.name for one in found if not one.name.endswith("__main__")]


def test_importing_any_module_changes_nothing_global() -> None:
    """Beside what the libraries that it needs do themselves."""
    others = (
        "distributed, h5py, joblib, matplotlib.pyplot, open_clip, pandas, sklearn.linear_model, timm, typer"
    )
    code = f"""{STATE}
import {others}, threadpoolctl, torch, torchvision.transforms, rich.live, scipy.stats, pydantic, importlib
before = state()
for name in {modules()!r}:
    importlib.import_module(name)
after = state()
print(json.dumps({{key: [str(before[key]), str(after[key])] for key in before if before[key] != after[key]}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, those for type checkers alone left out."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"fastcoop"}


def declared(table: str) -> list[Requirement]:
    """The list of requirements called ``table`` in pyproject.toml (Python 3.10 has no reader of TOML)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{table} = (\[[^\n]*\])$|^{table} = (\[$.*?^\]$)", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return [Requirement(one) for one in ast.literal_eval(found[1] or found[2])]


def test_what_is_imported_is_declared() -> None:
    needed = {one.name.replace("_", "-").lower() for one in declared("dependencies")}
    by_module = packages_distributions()
    for path in (ROOT / "fastcoop").rglob("*.py"):
        for name in imported(path):
            if name == "loky" or name in OF_OTHERS:
                continue
            if name in EXTRAS:
                assert name in {one.name for one in declared(EXTRAS[name])}
                continue
            owners = {owner.replace("_", "-").lower() for owner in by_module.get(name, [name])}
            assert owners & needed, (
                f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not declare"
            )


def test_everything_declared_has_a_lower_bound_and_is_used() -> None:
    used = set().union(*(imported(path) for path in (ROOT / "fastcoop").rglob("*.py")))
    by_module = packages_distributions()
    owners = {owner.replace("_", "-").lower() for name in used for owner in by_module.get(name, [])}
    for one in declared("dependencies"):
        (bound,) = one.specifier
        assert bound.operator == ">="
        assert one.specifier.contains(version(one.name), prereleases=True)
        assert one.name.replace("_", "-").lower() in owners, f"{one.name} is declared but not imported"


LIBRARIES = "torch|nn|np|numpy|pd|pandas|h5py|joblib|loky|open_clip|attn|matplotlib|plt|rich"
PRIVATE = re.compile(rf"\b(?:{LIBRARIES})(?:\.\w+)*\._[a-z]")
GUARDED = ("torch._utils._rebuild_tensor_v2",)  # a name in a file, never imported


def test_private_interfaces_of_other_libraries_are_not_used_unguarded() -> None:
    for path in (ROOT / "fastcoop").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if not any(name in line for name in GUARDED):
                assert not PRIVATE.search(line), f"{path.name}: {line}"


def test_without_torchs_private_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert (
        warn_if_dtype_is_slow.__wrapped__(torch.bfloat16, "cpu") is not torch.backends.mkldnn.is_available()
    )


def test_without_joblibs_copy_of_loky() -> None:
    code = """
import sys
import joblib
import joblib.externals.loky as own
sys.modules["loky"] = own
sys.modules["joblib.externals.loky"] = None
del joblib.externals.loky
from fastcoop.processes import ProcessPoolExecutor
assert issubclass(ProcessPoolExecutor, own.ProcessPoolExecutor)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def snapshot() -> list[object]:
    flags = torch.backends
    return [
        hash(random.getstate()), str(np.random.get_state()), torch.random.get_rng_state().tolist(), np.geterr(),
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"), flags.cudnn.benchmark, flags.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
    ]  # fmt: skip


SHORT = {"epochs": 3, "iterations": 3, "layer": 1}  # settings, of methods that have them


def study(folder: Path) -> dict[str, np.ndarray]:
    """Everything that computes, once; returns its numbers."""
    backbone = fc.backbone_from_spec(str(folder))
    random_one = fc.load_backbone("RN50", None, seed=3)
    data, found = make_data(), {"weights": random_one.model.visual.conv1.weight.numpy().copy()}
    for name in METHODS.keys() - {"finetune_image_encoder"}:
        fields = METHODS[name].Settings.model_fields
        short = {key: value for key, value in SHORT.items() if key in fields}
        (outcome,) = run(backbone, name, [job(data, name, **short)])
        for key, value in {"contexts": outcome.contexts, "losses": outcome.losses, **outcome.weights}.items():
            if value is not None:
                found[f"{name} {key}"] = np.asarray(value)
    found["initial"] = fc.initial_contexts(backbone, fc.PromptLayout(2), 3, seed=1).numpy()
    found["images"] = backbone.encode_images(
        torch.linspace(0, 1, 768, dtype=torch.float32).view(1, 3, 16, 16)
    ).numpy()
    found["texts"] = backbone.encode_text(["a cat"]).numpy()
    found["demo"] = fc.backbone_from_spec("demo-resnet").text.token_embedding[:50].numpy()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = write_backbone(tmp_path_factory.mktemp("backbone") / "tiny", text_layers=2)
    before, found = snapshot(), study(folder)
    assert snapshot() == before
    return folder, found


@pytest.mark.parametrize("mode", ["float64", "no_grad", "inference", "autocast"])
def test_calls_neither_change_nor_depend_on_global_state(
    undisturbed: tuple[Path, dict[str, np.ndarray]], mode: str
) -> None:
    folder, expected = undisturbed
    managers = {
        "no_grad": torch.no_grad(), "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }  # fmt: skip
    try:
        if mode == "float64":
            torch.set_default_dtype(torch.float64)
            before = snapshot()
            found = study(folder)
            assert snapshot() == before
        else:
            with managers[mode]:
                before = snapshot()
                found = study(folder)
                assert snapshot() == before
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


def test_a_sweep_changes_nothing_global(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data" / "colours")
    grid = {
        "backbones": str(write_backbone(tmp_path / "tiny")), "datasets": "colours", "shots": 1, "seeds": 1, "views": 1,
        "methods": {"linear_probe": {"iterations": 5}, "finetune_image_encoder": {"epochs": 2}},
    }  # fmt: skip
    before = snapshot()
    fc.sweep(
        grid, data_root=tmp_path / "data", cache=tmp_path / "cache", results=tmp_path / "results", jobs=1
    )
    assert snapshot() == before
