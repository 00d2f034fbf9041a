"""Archives and state dicts of others: read as torch reads them, but for what they would run."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fastcoop.backbones import load_backbone
from fastcoop.backbones.weights import OPENAI_INTEGERS, read_weights
from fastcoop.errors import UserError
from tests.backbones.openai_archive import write_archive

TRACING = ("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")


@pytest.mark.filterwarnings(*TRACING)
def test_an_archive_is_read_as_torch_reads_it(tiny_model: open_clip.CLIP, tmp_path: Path) -> None:
    write_archive(tiny_model, tmp_path / "tiny.pt")
    expected = torch.jit.load(tmp_path / "tiny.pt").state_dict()
    state = read_weights(tmp_path / "tiny.pt").state
    assert state.keys() == expected.keys() - set(OPENAI_INTEGERS)
    for key, value in state.items():
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key]), key


class Overwrites(torch.nn.Module):
    """Scripted, it writes a file while ``torch.jit.load`` loads it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.path = str(path)

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.save(state[0], state[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::DeprecationWarning")
def test_nothing_that_an_archive_brings_along_is_run(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    path, written = tmp_path / "hostile.pt", tmp_path / "written"
    torch.jit.script(Overwrites(written)).save(str(path))
    written.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"hostile\.pt"):
        load_backbone("tiny-clip", path, force_quick_gelu=True)
    assert not written.exists()
    torch.jit.load(path)  # as dangerous as it is meant to be
    assert written.exists()


@pytest.mark.filterwarnings(*TRACING)
def test_a_file_damaged_anywhere_is_refused(
    tiny_config: dict[str, Any], tiny_model: open_clip.CLIP, tmp_path: Path
) -> None:
    write_archive(tiny_model, tmp_path / "archive.pt")
    torch.save(tiny_model.state_dict(), tmp_path / "state.pt")
    torch.save(tiny_model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(tiny_model.state_dict(), tmp_path / "state.safetensors")
    rng = random.Random(0)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for _ in range(6):
            path.write_bytes(whole[: rng.randrange(len(whole))])
            with pytest.raises(UserError, match=path.name):
                load_backbone("tiny-clip", path, force_quick_gelu=True)
            flipped = bytearray(whole)
            for at in (rng.randrange(2000), len(whole) - 1 - rng.randrange(2000)):
                flipped[at] ^= 1 + rng.randrange(255)
            path.write_bytes(flipped)
            with contextlib.suppress(UserError):  # a changed number is still a number
                load_backbone("tiny-clip", path, force_quick_gelu=True)
