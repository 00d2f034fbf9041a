"""Grid files: what they say, and what is said about them."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from fastcoop import escape
from fastcoop.errors import UserError
from fastcoop.grids import read_grid

TEXT = """\
backbones: [RN50, ViT-B/16]
datasets: dtd
shots: [1, all]
methods:
  - coop:
      context_length: [4, 16]
      epochs: {1: 5, all: 9}
  - zero_shot
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(TEXT)
    return path


def test_a_file_reads_as_written_with_defaults(file: Path) -> None:
    grid = read_grid(file)
    (block,) = grid.blocks
    assert grid.backbones == ("RN50", "ViT-B/16")
    assert grid.datasets == ("dtd",)
    assert (block.shots, block.seeds) == ((1, "all"), (1, 2, 3))
    assert grid.methods == ("zero_shot", "coop")  # what is quick first
    settings = dict(block.methods)["coop"]
    assert [one.context_length for one in settings] == [4, 16]
    assert settings[0].epochs == {1: 5, "all": 9}
    assert (grid.views, grid.recipe) == (8, "current")


def test_values_given_on_the_command_line_win(file: Path) -> None:
    grid = read_grid(file, ["shots=2,4", "seeds=[7]", "methods.coop.epochs=3", "datasets=a,b"], ["coop"])
    (block,) = grid.blocks
    assert (block.shots, block.seeds, grid.datasets) == ((2, 4), (7,), ("a", "b"))
    assert grid.methods == ("coop",)
    assert {run.settings.epochs for run in grid.runs()} == {3}


def test_a_range_of_seeds_is_written_out(file: Path) -> None:
    assert read_grid(file, ["seeds=1-10"]).blocks[0].seeds == tuple(range(1, 11))
    assert read_grid(file, ["seeds=[3-5, 9]"]).blocks[0].seeds == (3, 4, 5, 9)
    for wrong in ("5-1", "1-2-3", "a-b"):
        with pytest.raises(UserError, match='or a range such as "1-10"'):
            read_grid(file, [f"seeds={wrong}"])


def test_a_mapping_is_not_changed_by_overrides() -> None:
    given = {"backbones": "a", "datasets": "b", "methods": {"coop": {"epochs": 1}}}
    read_grid(given, ["methods.coop.epochs=2"])
    assert given["methods"] == {"coop": {"epochs": 1}}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("datasets:", "dataset:", r'Line 2: Unknown setting "dataset" .* Did you mean "datasets"'),
        ("- zero_shot", "- zeroshot", r'Line 8: There is no method "zeroshot". Did you mean "zero_shot"'),
        ("context_length", "contextlength", r'Line 6: .*Did you mean "context_length"'),
        ("shots: [1, all]", "shots: [0]", r"Line 3: .*shots.* cannot be 0"),
        ("shots: [1, all]", "shots: [-1]", r'Line 3: The setting "shots" of .* cannot be -1: expected whole'),
        (
            "shots: [1, all]",
            "shots: many",
            r'Line 3: The setting "shots" of .* cannot be \'many\': .* or "all"',
        ),
        ("shots: [1, all]", "shots: yes", r"Line 3: .*shots.* cannot be True"),
        ("shots: [1, all]", "shots: []", r"Line 3: .*shots.* cannot be \[\]"),
        ("shots: [1, all]", "shots: 1\nseeds: [1, -1]", r"Line 4: .*seeds.* cannot be -1: .* from 0 to"),
        ("shots: [1, all]", "shots: 1\nseeds: 4294967296", r"Line 4: .*seeds.* cannot be 4294967296"),
        ("[4, 16]", "[4, 16]\n      batch_size: -3", r'"batch_size" of method coop cannot be -3'),
        (
            "      epochs: {1: 5, all: 9}",
            "      epochs: -2",
            r'The setting "epochs" of method coop cannot be -2',
        ),
        ("shots: [1, all]", "shots: \0", "is not valid YAML"),
        ("  - coop:\n", "  - coop:\n\t", r"line 6 is not valid YAML"),
        (TEXT, "- backbones\n- datasets\n", "should hold keys such as"),
        ("datasets: dtd\n", "", r'"datasets" of .* is missing'),
        ("datasets: dtd", "datasets: []", "datasets"),
        ("[4, 16]", "[4, 16", "is not valid YAML"),
        ("datasets: dtd", "targets: {food: dtd}\ndatasets: dtd", '"food", which is not one of its datasets'),
        ("backbones", "!!python/object:os.system {}\nbackbones", "is not valid YAML"),
        ("[4, 16]", "[4, sixteen]", r"Line 6: .*context_length.* cannot be 'sixteen'"),
        ("  - zero_shot", "  - zero_shot: {prompt: a photo}", r'Line 8: .* needs one "{}"'),
        ("shots: [1, all]", "shots: 1\nseeds: 1\nshots: 2", r'Line 5: "shots" was given before, in line 3'),
        (
            "shots: [1, all]",
            "shots: [1, 010]",
            "Line 3: YAML reads 010 as 8; write 8, or the number that is meant",
        ),
        ("{1: 5, all: 9}", "{01: 5, all: 9}", "Line 7: YAML reads 01 as 1"),
        ("{1: 5, all: 9}", "1:30", "Line 7: YAML reads 1:30 as 90"),
        ("datasets: dtd", "datasets: &a [*a]", "an alias is in what it stands for"),
        ("shots", "exclude: {dataset: dtd}\nshots", r'Line 3: Unknown setting "exclude"'),
    ],
)
def test_what_is_wrong_with_a_file_is_said(file: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    file.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_grid(file)


BLOCKS = """\
backbones: RN50
datasets: [dtd, eurosat]
seeds: [1, 2]
blocks:
  unified:
    shots: [1, 16]
    methods:
      coop: {context_length: [4, 16]}
  probes:
    datasets: [food101, dtd]
    shots: [2, 16]
    methods: [linear_probe, coop]
"""


def named(file: Path, text: str = BLOCKS, *arguments: Any) -> list[tuple]:
    """(method, dataset, shots, seed, M) of a grid's runs."""
    file.write_text(text)
    return [
        (run.method, run.dataset, run.shots, run.seed, getattr(run.settings, "context_length", None))
        for run in read_grid(file, *arguments).runs()
    ]


def test_blocks_cross_for_themselves_and_share_what_stands_above(file: Path) -> None:
    expected = [
        ("coop", d, n, seed, m)
        for d in ("dtd", "eurosat") for n in (1, 16) for seed in (1, 2) for m in (4, 16)
    ]  # fmt: skip
    for method, m in (("linear_probe", None), ("coop", 16)):
        expected += [(method, d, n, s, m) for d in ("food101", "dtd") for n in (2, 16) for s in (1, 2)]
    assert sorted(named(file), key=str) == sorted(expected, key=str)
    grid = read_grid(file)
    assert grid.drawn("dtd") == ((1, 16, 2), (1, 2))
    assert grid.drawn("food101") == ((2, 16), (1, 2))
    assert [block.name for block in grid.blocks] == ["unified", "probes"]


def test_what_a_block_leaves_unsaid_is_the_grids(file: Path) -> None:
    text = "methods: zero_shot\nviews: 2\n" + BLOCKS + "  plain: {datasets: a}\n"
    assert ("zero_shot", "a", 0, 0, None) in named(file, text)
    assert read_grid(file).views == 2


@pytest.mark.parametrize(
    ("overrides", "only", "methods", "datasets"),
    [
        (["shots=16"], [], {"coop": 12, "linear_probe": 4}, {"dtd": 8, "eurosat": 4, "food101": 4}),
        (
            ["blocks.probes.shots=1"],
            [],
            {"coop": 20, "linear_probe": 4},
            {"dtd": 12, "eurosat": 8, "food101": 4},
        ),
        (
            ["seeds=[6]", "shots=all"],
            [],
            {"coop": 6, "linear_probe": 2},
            {"dtd": 4, "eurosat": 2, "food101": 2},
        ),
        (["datasets=dtd"], [], {"coop": 12, "linear_probe": 4}, {"dtd": 16}),
        (["methods.coop.context_length=8"], ["unified"], {"coop": 8}, {"dtd": 4, "eurosat": 4}),
        ([], ["coop"], {"coop": 24}, {"dtd": 12, "eurosat": 8, "food101": 4}),
        ([], ["linear_probe"], {"linear_probe": 8}, {"dtd": 4, "food101": 4}),
        ([], ["probes"], {"coop": 8, "linear_probe": 8}, {"dtd": 8, "food101": 8}),
        ([], ["probes", "coop"], {"coop": 8}, {"dtd": 4, "food101": 4}),
    ],
)
def test_the_command_line_narrows_every_block(
    file: Path, overrides: list[str], only: list[str], methods: dict, datasets: dict
) -> None:
    runs = named(file, BLOCKS, overrides, only)
    assert Counter(run[0] for run in runs) == methods
    assert Counter(run[1] for run in runs) == datasets
    again = read_grid(read_grid(file, overrides, only).source)
    assert [*again.runs()] == [*read_grid(file, overrides, only).runs()]


def test_what_is_kept_of_a_grid_reads_without_warnings(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(BLOCKS.replace("blocks:", "blocks:\n  prompts: {methods: kgcoop}") + "shots: 4\n")
    read_grid(dict(read_grid(file, [], ["unified"]).source))
    assert not caplog.records


def test_a_block_without_the_methods_that_are_kept_is_named(file: Path) -> None:
    with pytest.raises(
        UserError, match="Block unified of the grid has no linear_probe; its methods are coop"
    ):
        named(file, BLOCKS, [], ["unified", "linear_probe"])


def test_a_method_of_one_block_is_set(file: Path) -> None:
    runs = named(file, BLOCKS, ["blocks.probes.methods.coop.context_length=8"])
    assert {dataset for method, dataset, *_, m in runs if m == 8} == {"food101", "dtd"}
    assert {m for method, *_, m in runs if method == "coop"} == {4, 8, 16}
    with pytest.raises(UserError, match="which the grid does not run"):
        named(file, BLOCKS, ["blocks.unified.methods.linear_probe.iterations=5"])
    with pytest.raises(UserError, match=r'--set blocks.probes.views=2: "views" holds for the whole grid'):
        named(file, BLOCKS, ["blocks.probes.views=2"])


@pytest.mark.parametrize("option", ["methods=coop: {epochs: 20}", "methods=- coop:\n    epochs: 20"])
def test_an_option_may_be_written_as_a_file_is(file: Path, option: str) -> None:
    assert {run.settings.epochs for run in read_grid(file, [option]).runs()} == {20}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    shots: [2, 16]", "    shot: 2", r'Line 11: Unknown setting "shot" of block "probes".*"shots"'),
        ("    shots: [2, 16]", "    shots: 0", r"Line 11: .*shots.* cannot be 0"),
        ("    shots: [2, 16]", "    views: 0", r"Line 11: .*holds for the whole grid"),
        ("seeds: [1, 2]", "seeds: [1, x]", r"Line 3: .*seeds.* cannot be 'x'"),
        ("linear_probe", "linear_prob", r'Line 12: .*Did you mean "linear_probe"'),
        ("  probes:", "  coop:", r'Line 9: A block cannot be called "coop"'),
        ("unified:", "a:\n  unified:", r'Line 5: The block "a" should have keys'),
        ("seeds", "targets: {dtt: dtd}\nseeds", r'Line 3: .*targets for "dtt"'),
        ("    shots: [2", "    targets: {eurosat: dtd}\n    shots: [2", r'Line 11: .*targets for "eurosat"'),
        ("backbones: RN50", "", r'"backbones" of block "unified" of .* is missing'),
        (
            "methods: [linear_probe, coop]",
            "include: {}",
            r'Line 12: Unknown setting "include" of block "probes"',
        ),
    ],
)
def test_what_is_wrong_with_a_block_is_said(file: Path, old: str, new: str, message: str) -> None:
    assert old in BLOCKS
    file.write_text(BLOCKS.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_grid(file)


def test_targets_are_those_of_a_run_s_dataset(file: Path) -> None:
    file.write_text("backbones: a\ndatasets: [x, y, z]\nmethods: zero_shot\ntargets: {x: q, y: [z, x]}\n")
    grid = read_grid(file)
    assert {run.dataset: run.target_names for run in grid.runs()} == {"x": ("q",), "y": ("z", "x"), "z": ()}
    assert grid.targets == ("q", "z", "x")


@pytest.mark.parametrize(
    ("overrides", "only", "targets"),
    [
        ([], ["b"], [{"y": ("r",)}]),
        (["blocks.b.targets.y=s"], [], [{"x": ("q",)}, {"y": ("s",)}]),
        (["blocks.a.targets={}"], [], [{}, {"y": ("r",)}]),
    ],
)
def test_targets_above_blocks_are_those_of_each_block_s_datasets(
    overrides: list[str], only: list[str], targets: list[dict[str, tuple[str, ...]]]
) -> None:
    blocks = {"a": {"datasets": "x"}, "b": {"datasets": ["y"], "shots": 1}}
    given = {"backbones": "m", "methods": "coop", "targets": {"x": ["q"], "y": ["r"]}, "blocks": blocks}
    grid = read_grid(given, overrides, only)
    assert [dict(block.targets) for block in grid.blocks] == targets
    assert [*read_grid(dict(grid.source)).runs()] == [*grid.runs()]


def test_aliases_are_read_and_counted(file: Path) -> None:
    file.write_text(TEXT.replace("datasets: dtd", "datasets: &d [dtd]\ntargets: {dtd: &t [food]}"))
    assert next(read_grid(file).runs()).target_names == ("food",)
    bomb = "\n".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 10)}]" for n in range(1, 10))
    file.write_text(f"k0: &k0 [a]\n{bomb}\n")
    with pytest.raises(UserError, match="aliases"):
        read_grid(file)


@pytest.mark.parametrize(
    ("overrides", "only", "message"),
    [
        (["shots"], [], "KEY=VALUE"),
        (["views=&a [*a]"], [], "an alias is in what it stands for"),
        (["targets.dtd=dtd"], [], "--set targets.dtd=dtd: .*is tested on itself"),
        (["blocks.a=1"], [], "KEY=VALUE, such as .* or blocks.NAME.shots=1,2"),
        (["shot=1"], [], '--set shot=1: Unknown setting "shot" of .*yaml. Did you mean "shots"'),
        (["name=a"], [], 'Unknown setting "name"'),
        (["methods.coop.epoch=1"], [], 'Did you mean "epochs"'),
        (["shots.coop=1"], [], "no keys of its own"),
        (["shots=0"], [], '--set shots=0: The setting "shots" of .* cannot be 0'),
        (["shots=1-4"], [], '"shots" of .* cannot be .1-4.'),
        (["seeds=1,-1"], [], '"seeds" of .* cannot be -1'),
        (["methods.coop.epochs=no"], [], "--set methods.coop.epochs=no: .*epochs"),
        (["blocks.a.shots=1"], [], 'no block "a"'),
        (["methods.cop.epochs=1"], [], 'does not run. Did you mean "coop"'),
        (["methods.linear_probe.iterations=5"], [], "sets linear_probe, which the grid does not run"),
        ([], ["linear_probe"], "no linear_probe; its methods are coop, zero_shot"),
        ([], ["linear_prob"], 'Did you mean "linear_probe"'),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said(
    file: Path, overrides: list[str], only: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_grid(file, overrides, only)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no grid file"):
        read_grid(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_grid(tmp_path / "binary.yaml")


NAMES_LIKE_VALUES = """\
backbones: [null, 1e3]
datasets: [no, 2024-01-01, 1e3, 0x10, null, 007, ~, 1.50]
targets: {on: 010, no: [yes, 0o7], 007: off}
methods: {coop: {init: [yes, 12, null]}}
blocks: {1: {}, off: {datasets: 1_000}}
"""


def test_names_are_read_as_they_are_written(file: Path) -> None:
    """Whatever YAML takes them for; what makes them text is the key that they stand under."""
    file.write_text(NAMES_LIKE_VALUES.replace("on: 010, ", ""))
    grid = read_grid(file)
    one, other = grid.blocks
    assert one.backbones == ("null", "1e3")
    assert one.datasets == ("no", "2024-01-01", "1e3", "0x10", "null", "007", "~", "1.50")
    assert one.targets == {"no": ("yes", "0o7"), "007": ("off",)}
    assert [settings.init for settings in dict(one.methods)["coop"]] == ["yes", "12", "null"]
    assert [one.name, other.name, other.datasets] == ["1", "off", ("1_000",)]
    assert [*read_grid(yaml.safe_load(yaml.safe_dump(grid.source))).runs()] == [*grid.runs()]


@pytest.mark.parametrize("text", ["no", "2024-01-01", "1e3", "0x10", "null", "007", "1.50"])
def test_names_in_options_are_read_as_they_are_written(file: Path, text: str) -> None:
    assert read_grid(file, [f"datasets={text}"]).datasets == (text,)
    assert read_grid(file, [f"datasets={text},b"]).datasets == (text, "b")
    file.write_text("backbones: a\ndatasets: b\nmethods: coop\n")
    assert next(read_grid(file, [f"methods.coop.init={text}"]).runs()).settings.init == text


class Size(Enum):
    """Values of an enumeration, as configuration libraries have them."""

    small = 2


@pytest.mark.parametrize(
    ("shots", "rate"),
    [
        (np.array([1, 2]), np.linspace(0.25, 0.5, 2)),
        (range(1, 3), (0.25, Decimal("0.5"))),
        ({1, 2}, {0.25, 0.5}),
        ([np.int64(1), Size.small], [np.float32(0.25), Fraction(1, 2)]),
        (pd.Series([1, 2]), pd.Index([0.25, 0.5])),
        ((np.uint8(1), "2"), ["0.25", "5e-1"]),
        (torch.tensor([1, 2]), torch.tensor([0.25, 0.5])),
    ],
)
def test_values_of_other_libraries_become_plain(shots: Any, rate: Any) -> None:
    given = {
        "backbones": Path("models/tiny"),
        "datasets": np.array(["dtd", "food"]),
        "shots": shots,
        "methods": {"coop": {"learning_rate": rate, "epochs": {np.int64(1): np.int16(5), 2: 6}}},
    }
    grid = read_grid(given)
    (block,) = grid.blocks
    assert (block.backbones, block.datasets, block.shots) == (("models/tiny",), ("dtd", "food"), (1, 2))
    assert [settings.learning_rate for settings in block.methods[0][1]] == [0.25, 0.5]
    written = yaml.safe_dump(grid.source)
    assert "!" not in written
    assert [*read_grid(yaml.safe_load(written)).runs()] == [*grid.runs()]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shots": b"1"}, "got b'1' of type bytes"),
        ({"shots": (n for n in [1])}, "of type generator"),
        ({"datasets": object()}, "of type object"),
        ({("a", "b"): 1}, "Expected text or a number as a key"),
        ({"datasets": [True]}, "cannot be True"),
        ({"datasets": [None]}, "cannot be None"),
        ({"datasets": [""]}, "cannot be ''"),
        ({"datasets": ["a", "a"]}, "lists 'a' twice"),
        ({"shots": [1, "1"]}, "lists 1 twice"),
        ({"shots": 2.5}, "cannot be 2.5"),
        ({"seeds": float("nan")}, "cannot be nan"),
        ({"seeds": [3, 3]}, "lists 3 twice"),
        ({"views": True}, "from 0 to 1000"),
        ({"views": 10**12}, "from 0 to 1000"),
        ({"views": float("inf")}, "from 0 to 1000"),
        ({"methods": ["coop", "coop"]}, "listed twice"),
        ({"methods": {"coop": {"context_length": [4, 8, 4]}}}, "lists 4 twice"),
        ({"targets": {"d": ["d", "e"]}}, "tested on itself in any case"),
        (
            {"blocks": {1: {}}},
            'The setting "name" of block "1" of the grid cannot be 1: input should be a valid str',
        ),
    ],
)
def test_what_cannot_be_in_a_grid_from_python_is_said(changed: dict[Any, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_grid({"backbones": "b", "datasets": "d", "methods": "coop"} | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"methods": "zero_shot", "shots": 1}, "No run uses shots"),
        ({"methods": "zero_shot", "seeds": 1}, "No run uses seeds"),
        ({"methods": "linear_probe", "views": 2}, "No run uses views"),
        ({"blocks": {"x": {"shots": 1}, "y": {"shots": 2}}, "shots": 4}, "No run uses shots"),
        ({"blocks": {"x": {"methods": "coop"}}}, "No run uses methods"),
        (
            {"methods": {"coop": {"epochs": {1: 2, 16: 3, "all": 4}}}, "shots": 1},
            "No run has 16 or all shots",
        ),
        ({}, ""),
    ],
)
def test_keys_that_change_nothing_are_said(
    caplog: pytest.LogCaptureFixture, changed: dict[str, Any], said: str
) -> None:
    grid = {"backbones": "b", "datasets": "d", "methods": "coop"} | changed
    read_grid(grid)
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)
    caplog.clear()
    read_grid(grid, ["recipe=current"])
    assert not caplog.records, "an option may leave out what the rest of a file is for"


@pytest.mark.parametrize(
    "name",
    [
        "a: b #c",
        "null",
        "2020-01-01",
        "1e3",
        "yes",
        "- x",
        "{y}",
        "'",
        '"',
        "*",
        "é\n\t",
        "\u2028",
        "a\x85b\u202e",
        "\x7f",
        "🙂",
    ],
)
def test_names_are_written_so_that_they_read_back(tmp_path: Path, name: str) -> None:
    given = {
        "backbones": name, "datasets": [name, "x"], "targets": {name: "y"},
        "blocks": {name: {"methods": "coop"}, "plain": {"methods": {"coop": {"init": name}}}},
    }  # fmt: skip
    grid = read_grid(given)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(dict(grid.source), sort_keys=False), encoding="utf-8")
    again = read_grid(tmp_path / "grid.yaml")
    assert list(map(str, again.runs())) == list(map(str, grid.runs()))
    assert [block.name for block in again.blocks] == [name, "plain"]
    option = f"datasets={escape.yaml_scalar(name)}"
    assert read_grid(given, [option]).datasets == (name,)


def test_single_overrides_and_methods_need_no_list(file: Path) -> None:
    assert read_grid(file, "seeds=[7]", "coop") == read_grid(file, ["seeds=[7]"], ["coop"])


@pytest.mark.parametrize(
    ("overrides", "only", "said"),
    [
        (["shots=2"], ["zero_shot"], "--set shots=2 changes nothing"),
        (["seeds=[2]", "views=1"], ["zero_shot"], "--set views=1 changes nothing"),
        (["methods.coop.epochs=3"], ["zero_shot"], "--set methods.coop.epochs=3 changes nothing"),
        (["datasets=other"], [], "--set datasets leaves out the targets of dtd."),
        (["shots=2", "methods.coop.epochs=3"], ["coop"], ""),
        (["blocks.two.seeds=[2]", "seeds=[3]"], ["two"], ""),
        (["datasets=other", "targets={other: food}"], [], ""),
        (["datasets=dtd"], ["zero_shot"], ""),
    ],
)
def test_options_that_change_nothing_are_told(
    overrides: list[str], only: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid = {"backbones": "RN50", "datasets": ["dtd", "sun397"], "targets": {"dtd": "food"}}
    methods = {"coop": {"epochs": 2}, "zero_shot": None}
    named = "blocks" in str(overrides)
    grid |= (
        {"blocks": {"one": {"methods": methods}, "two": {"methods": "coop"}}}
        if named
        else {"methods": methods}
    )
    read_grid(grid, overrides, only)
    assert said in caplog.text
    assert said or not caplog.text


def test_an_option_given_twice(file: Path) -> None:
    with pytest.raises(UserError, match="--set gives shots twice; leave one of them"):
        read_grid(file, ["shots=1", "seeds=1", "shots=2"])


@pytest.mark.parametrize(
    ("methods", "message"), [(None, "does not run"), ({"coop": 5}, "reaches into coop, which has no keys")]
)
def test_an_option_reaches_into_settings_only(methods: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_grid({"backbones": "x", "datasets": "y", "methods": methods}, ["methods.coop.epochs=3"])


def test_an_alias_is_set_without_its_others(file: Path) -> None:
    file.write_text("backbones: a\ndatasets: b\nmethods: {coop: &own {epochs: 2}, kgcoop: *own}\n")
    runs = read_grid(file, ["methods.coop.epochs={1: 3, 2: 3, 4: 3, 8: 3, 16: 3}"]).runs()
    assert {(run.method, str(run.settings.epochs)[0]) for run in runs} == {("coop", "{"), ("kgcoop", "2")}


def test_an_option_in_base_8(file: Path) -> None:
    with pytest.raises(UserError, match=r"^--set seeds=1,010: YAML reads 010 as 8; write 8"):
        read_grid(file, ["seeds=1,010"])
    assert read_grid(file, ["datasets=010"]).blocks[0].datasets == ("010",)  # a name


def test_overrides_are_text() -> None:
    with pytest.raises(UserError, match=r'"3" should be KEY=VALUE'):
        read_grid({"backbones": "x", "datasets": "y", "methods": "zero_shot"}, [3])  # type: ignore[list-item]
