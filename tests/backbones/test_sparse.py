from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastcoop.backbones.weights import SEEN_IDS, read_weights
from fastcoop.errors import UserError
from tools.pretrain.sparse import write_sparse_model

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 500, "width": 16, "heads": 2, "layers": 1},
}


def test_round_trip_keeps_trained_rows_and_redraws_the_others_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    ids = torch.tensor([3, 499, 3, 7])
    path = tmp_path / "m.safetensors"
    write_sparse_model(path, CONFIG, model.state_dict(), ids, seed=5, facts={"steps": 9})
    weights, again = read_weights(path), read_weights(path).state
    config, state, trained = weights.config, weights.state, weights.trained_tokens

    assert config == CONFIG
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["facts"]) == {"steps": 9}
    assert trained.nonzero().flatten().tolist() == [3, 7, 499]
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        expected = value if key != "token_embedding.weight" else value[trained]
        found = state[key] if key != "token_embedding.weight" else state[key][trained]
        torch.testing.assert_close(
            found, expected.half().float() if expected.is_floating_point() else expected
        )
    unseen = state["token_embedding.weight"][~trained]
    assert torch.equal(unseen, again["token_embedding.weight"][~trained])
    assert unseen.std() == pytest.approx(0.02, rel=0.05)
    assert path.stat().st_size < sum(v.numel() for v in state.values()) * 2
    open_clip.CLIP(**config).load_state_dict(state)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    lacking, text = tmp_path / "lacking.safetensors", tmp_path / "text.safetensors"
    save_file({SEEN_IDS: torch.zeros(1)}, lacking)
    text.write_text("hello")
    odd = [tmp_path / f"odd{number}.safetensors" for number in range(3)]
    for path, config in zip(odd, ([1], {}, CONFIG | {"text_cfg": 3}), strict=True):
        write_sparse_model(path, config, open_clip.CLIP(**CONFIG).state_dict(), torch.tensor([3]), seed=5)
    for path in (lacking, text, *odd):
        with pytest.raises(UserError, match=rf"{path.name} should hold CLIP weights"):
            read_weights(path)
    with pytest.raises(UserError, match="absent"):
        read_weights(tmp_path / "absent.safetensors")
