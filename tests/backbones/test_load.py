from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from safetensors.torch import save_file

from fastcoop.backbones import Backbone, backbone_from_spec, load, load_backbone, sources
from fastcoop.backbones.backbone import fingerprint
from fastcoop.backbones.tokenizer import load_tokenizer
from fastcoop.backbones.weights import OPENAI_INTEGERS, Weights
from fastcoop.errors import UserError
from tests.advice import follows
from tests.backbones.openai_archive import published, write_archive
from tests.backbones.small_models import small_config
from tools.pretrain.sparse import write_sparse_model

TRACING = ("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")


def check_every_format(original: Backbone, name: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Weights of values that OpenAI's dtypes hold, written in every format, load back to the same features."""
    model = original.model
    state = published(model)
    model.load_state_dict(state)  # float32, with the values of the file
    digest = fingerprint(model.state_dict(), True, original.preprocess)
    size = original.image_size
    image, texts = torch.randn(1, 3, size, size), ["a photo of a cat."]
    expected = original.encode_images(image), original.encode_text(texts)

    def check(pretrained: Path, model_name: str = name) -> None:
        loaded = load_backbone(model_name, pretrained)
        assert loaded.digest == digest
        assert loaded.quick_gelu
        assert torch.equal(loaded.encode_images(image), expected[0])
        assert torch.equal(loaded.encode_text(texts), expected[1])
        (pretrained / "model.safetensors" if pretrained.is_dir() else pretrained).unlink()

    write_archive(model, tmp_path / f"{name}.pt")
    held = dict(torch.jit.load(tmp_path / f"{name}.pt").state_dict())
    integers = {key: int(held.pop(key)) for key in OPENAI_INTEGERS}
    assert integers == {"input_resolution": size, "context_length": 77, "vocab_size": 49408}
    assert {key: value.dtype for key, value in held.items()} == {
        key: value.dtype for key, value in state.items()
    }
    assert {value.dtype for value in state.values()} >= {torch.float16, torch.float32}
    check(tmp_path / f"{name}.pt")
    torch.save(state, tmp_path / "state.pt")
    check(tmp_path / "state.pt", f"{name}-quickgelu")
    save_file(state, tmp_path / "state.safetensors")
    check(tmp_path / "state.safetensors", f"{name}-quickgelu")
    (tmp_path / "folder").mkdir()
    facts = {"model_cfg": config | {"quick_gelu": True}, "preprocess_cfg": {}}
    (tmp_path / "folder" / "open_clip_config.json").write_text(json.dumps(facts))
    save_file(state, tmp_path / "folder" / "model.safetensors")
    check(tmp_path / "folder")


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
@pytest.mark.filterwarnings(*TRACING)
def test_weights_written_in_each_format_load_back_to_identical_features(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the kinds of layers that OpenAI's two kinds of image towers have, fewer and narrower."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, name, small_config(name))
    original = load_backbone(f"{name}-quickgelu", seed=3)
    check_every_format(original, name, open_clip.get_model_config(name), tmp_path)


@pytest.mark.filterwarnings(*TRACING)
def test_a_plain_state_dict_may_hold_openais_integers(
    tiny_config: dict[str, Any], tiny_model: open_clip.CLIP, tmp_path: Path
) -> None:
    """As ``torch.save(archive.state_dict())`` leaves it."""
    write_archive(tiny_model, tmp_path / "tiny.pt")
    by_archive = load_backbone("tiny-clip", tmp_path / "tiny.pt", force_quick_gelu=True)
    torch.save(dict(torch.jit.load(tmp_path / "tiny.pt").state_dict()), tmp_path / "state.pt")
    assert (
        load_backbone("tiny-clip", tmp_path / "state.pt", force_quick_gelu=True).digest == by_archive.digest
    )


@follows(
    "correct the config's quick_gelu",
)
@pytest.mark.filterwarnings(*TRACING)
def test_an_archive_in_a_model_folder_tells_what_its_config_does_not(
    tiny_folder: Path, tiny_config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tiny_folder / "open_clip_model.safetensors").unlink()
    write_archive(open_clip.CLIP(**tiny_config, quick_gelu=True).eval(), tiny_folder / "model.pt")
    assert backbone_from_spec(str(tiny_folder)).quick_gelu
    assert not caplog.records
    (tiny_folder / "tiny.json").write_text(json.dumps(tiny_config | {"quick_gelu": False}))
    with pytest.raises(UserError, match="traced with QuickGELU and its config says GELU"):
        backbone_from_spec(str(tiny_folder))
    assert not load_backbone("tiny", tiny_folder, force_quick_gelu=False).quick_gelu
    (tiny_folder / "tiny.json").write_text(json.dumps(tiny_config | {"quick_gelu": True}))
    assert backbone_from_spec(str(tiny_folder)).quick_gelu


@pytest.mark.filterwarnings(*TRACING)
def test_an_archive_tells_its_activation(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    for quick_gelu in (False, True):
        model = open_clip.CLIP(**tiny_config, quick_gelu=quick_gelu).eval()
        write_archive(model, tmp_path / "tiny.pt")
        assert load_backbone("tiny-clip", tmp_path / "tiny.pt").quick_gelu is quick_gelu


@follows(
    "pass force_quick_gelu=True or False, or name the model",
)
def test_where_nothing_tells_the_activation_the_user_must(
    tiny_config: dict[str, Any], tiny_model: open_clip.CLIP, tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in tiny_model.state_dict().items()}}, path)
    with pytest.raises(UserError, match="force_quick_gelu"):
        load_backbone("tiny-clip", path)
    plain = load_backbone("tiny-clip", path, force_quick_gelu=False)
    quick = load_backbone("tiny-clip", path, force_quick_gelu=True)
    assert plain.digest != quick.digest
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(plain.encode_images(image), tiny_model.encode_image(image))
    assert not torch.equal(plain.encode_images(image), quick.encode_images(image))
    assert backbone_from_spec(f"tiny-clip-gelu:{path}").digest == plain.digest
    assert backbone_from_spec(f"tiny-clip-quickgelu:{path}").digest == quick.digest


@follows(
    'if it is QuickGELU, add "quick_gelu": true',
)
def test_a_config_that_does_not_speak_of_the_activation_is_taken_at_its_word_aloud(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert not backbone_from_spec(str(tiny_folder)).quick_gelu
    assert caplog.text.count("tiny.json does not state the activation, which means GELU") == 1
    assert load_backbone("tiny", tiny_folder, force_quick_gelu=True).quick_gelu
    (tiny_folder / "tiny.json").write_text(
        json.dumps(json.loads((tiny_folder / "tiny.json").read_text()) | {"quick_gelu": False})
    )
    caplog.clear()
    load._warn_defaulting_to_gelu.cache_clear()
    assert not backbone_from_spec(str(tiny_folder)).quick_gelu
    (tiny_folder / "tiny.json").write_text(
        json.dumps(json.loads((tiny_folder / "tiny.json").read_text()) | {"quick_gelu": True})
    )
    assert backbone_from_spec(str(tiny_folder)).quick_gelu
    assert not caplog.records


def test_a_known_file_digest_tells_the_activation(
    tiny_config: dict[str, Any], tiny_model: open_clip.CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "renamed.pt"
    torch.save(tiny_model.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    released = {"url": f"https://github.com/mlfoundations/x/tiny-{digest[:8]}.pt", "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"released": released})
    assert load_backbone("tiny-clip", path).quick_gelu


def test_a_tag_tells_activation_and_preprocessing(
    tiny_config: dict[str, Any], tiny_model: open_clip.CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(tiny_model.state_dict(), path)
    tag = {"file": str(path), "quick_gelu": True, "mean": (0.5,) * 3, "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"released": tag})
    backbone = backbone_from_spec("tiny-clip:released")
    assert backbone.quick_gelu
    assert backbone.preprocess.mean == (0.5, 0.5, 0.5)
    assert backbone.preprocess.resize_mode == "squash"
    assert backbone.name == "tiny-clip-released"
    with pytest.raises(UserError, match='Did you mean "released"'):
        backbone_from_spec("tiny-clip:release")


@pytest.mark.parametrize("spec", ["RN50", "RN101", "ViT-B/32", "ViT-B/16", "ViT-B-32", "RN50:openai"])
def test_the_papers_four_mean_openais_weights_with_quickgelu(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[dict[str, Any]] = []
    fetched: list[tuple[str, str]] = []

    def fetch_weights(model: str, tag: str, known: dict[str, Any]) -> Path:
        fetched.append((model, tag))
        assert known["url"].startswith("https://openaipublic.azureedge.net/clip/models/")
        return Path("weights.pt")

    def build(config: dict[str, Any], *_: Any) -> None:
        built.append(config)
        raise UserError("the weights would be loaded now")

    monkeypatch.setattr(sources, "fetch_weights", fetch_weights)
    monkeypatch.setattr(load, "read_weights", lambda _: Weights({}))
    monkeypatch.setattr(load, "_build", build)
    with pytest.raises(UserError, match="would be loaded now"):
        backbone_from_spec(spec)
    name = spec.removesuffix(":openai").replace("/", "-")
    assert fetched == [(name, "openai")]
    assert built == [open_clip.get_model_config(name) | {"quick_gelu": True}]


@follows(
    "Fetch {} where there is a network, then name the file with the model",
)
@pytest.mark.filterwarnings(*TRACING)
def test_without_a_network_the_message_names_the_file(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_config: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def offline(*_: Any, **__: Any) -> str:
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 8s [Retry 5/5].")
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", offline)
    monkeypatch.setattr(sources, "OPENAI_CACHE", tmp_path)
    openai = open_clip.pretrained.get_pretrained_cfg("RN50", "openai")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"openai": openai})
    with pytest.raises(UserError, match=r"Fetch https://\S+/RN50\.pt .*tiny-clip:FILE"):
        load_backbone("tiny-clip", "openai")
    assert not caplog.records  # what the hub's client says of its retries buries it
    write_archive(open_clip.CLIP(**tiny_config, quick_gelu=True).eval(), tmp_path / "fetched.pt")
    assert backbone_from_spec(f"tiny-clip:{tmp_path / 'fetched.pt'}").quick_gelu
    assert load_backbone("tiny-clip", pretrained=tmp_path / "fetched.pt").quick_gelu


def test_a_path_of_windows_that_is_not_there_is_no_model_called_c() -> None:
    with pytest.raises(UserError, match=r'There is no backbone "C:\\models\\tiny"'):
        backbone_from_spec(r"C:\models\tiny")


def test_openais_own_cache_is_used_before_the_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_config: dict[str, Any], tiny_model: open_clip.CLIP
) -> None:
    torch.save(tiny_model.state_dict(), tmp_path / "tiny.pt")
    digest = hashlib.sha256((tmp_path / "tiny.pt").read_bytes()).hexdigest()
    tag = {"url": f"https://openaipublic.azureedge.net/{digest}/tiny.pt", "quick_gelu": True}
    monkeypatch.setattr(sources, "OPENAI_CACHE", tmp_path)
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", lambda _: pytest.fail("downloads"))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"openai": tag})
    assert load_backbone("tiny-clip", "openai").name == "tiny-clip"


def test_a_folder_called_like_a_model_is_one_only_with_config_and_weights(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embedded = backbone_from_spec("demo-resnet")
    for name in ("demo-resnet", "openai", "RN50"):  # as a feature cache in the current folder makes them
        Path(name).mkdir()
        Path(name, "pets.h5").touch()
    assert backbone_from_spec("demo-resnet").digest == embedded.digest
    fetched: list[str] = []

    def fetch(model: str, tag: str, config: dict[str, Any]) -> Path:
        fetched.append(f"{model}:{tag}")
        raise UserError("no network")

    monkeypatch.setattr(sources, "fetch_weights", fetch)
    for spec in ("RN50", "RN50:openai"):
        with pytest.raises(UserError, match="no network"):
            backbone_from_spec(spec)
    assert fetched == ["RN50:openai"] * 2
    Path("photos").mkdir()
    for spec in ("photos", "RN50:photos"):
        with pytest.raises(UserError, match="photos should hold one weights file"):
            backbone_from_spec(spec)
    model = backbone_from_spec(str(tiny_folder))
    tiny_folder.rename("demo-vit")
    assert backbone_from_spec("demo-vit").digest == model.digest


def test_a_model_folder_is_named_after_itself(tiny_folder: Path, tiny_model: open_clip.CLIP) -> None:
    backbone = backbone_from_spec(str(tiny_folder))
    assert backbone.name == "tiny"
    assert (backbone.image_size, backbone.embed_dim) == (32, 16)
    assert backbone.logit_scale == pytest.approx(1 / 0.07)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training
    ids = open_clip.tokenize(["a cat"])
    assert torch.equal(backbone.encode_text(["a cat"]), tiny_model.encode_text(ids))
    by_file = load_backbone("tiny", tiny_folder / "open_clip_model.safetensors")
    assert by_file.digest == backbone.digest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_factor_is_as_precise_as_the_model(tiny_folder: Path, dtype: torch.dtype) -> None:
    """A float64 reference starts from it; half precision is exponentiated in float32, as float32 is."""
    backbone = backbone_from_spec(str(tiny_folder), dtype=dtype)
    exact = math.exp(float(backbone.model.logit_scale))
    assert backbone.logit_scale == pytest.approx(exact, rel=1e-15 if dtype == torch.float64 else 2e-7)


def test_half_precision_files_have_the_digest_of_their_values(
    tiny_folder: Path, tiny_model: open_clip.CLIP
) -> None:
    half = {key: value.half() for key, value in tiny_model.state_dict().items()}
    file = tiny_folder / "open_clip_model.safetensors"
    save_file(half, file)
    first = backbone_from_spec(str(tiny_folder)).digest
    save_file({key: value.float() for key, value in half.items()}, file)
    assert backbone_from_spec(str(tiny_folder)).digest == first
    half["logit_scale"] = half["logit_scale"] + 1
    save_file(half, file)
    assert backbone_from_spec(str(tiny_folder)).digest != first


def test_sparse_weights_bring_config_and_trained_tokens(
    tmp_path: Path, tiny_model: open_clip.CLIP, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sparse_model(
        tmp_path / "demo-tiny.safetensors", tiny_config, tiny_model.state_dict(), torch.tensor([7, 9]), seed=0
    )
    monkeypatch.setattr(load, "EMBEDDED_WEIGHTS", tmp_path)
    backbone = backbone_from_spec("demo-tiny")
    assert backbone.name == "demo-tiny"
    assert backbone.trained_tokens is not None
    assert backbone.trained_tokens.nonzero().flatten().tolist() == [7, 9]


def test_random_weights_come_from_the_seed(tiny_config: dict[str, Any]) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (load_backbone("tiny-clip", seed=seed).digest for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_that_do_not_fit_are_refused_by_name(tiny_folder: Path, tiny_model: open_clip.CLIP) -> None:
    state = tiny_model.state_dict()
    del state["ln_final.weight"]
    save_file(state, tiny_folder / "open_clip_model.safetensors")
    with pytest.raises(
        UserError, match=r"do not fit the model: Missing key\(s\) in state_dict: \"ln_final\.weight\""
    ):
        backbone_from_spec(str(tiny_folder))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("RN51", 'Did you mean "RN50"'),
        ("ViT-L-14", "ViT-L-14:TAG"),
        ("RN5O:openai", 'no model "RN5O"'),
        ("ViT-B-32:laion2b", "nor a tag of ViT-B-32"),
    ],
)
def test_unknown_backbones_are_refused_with_what_to_write(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbone_from_spec(spec)


@pytest.mark.parametrize("text", [{"no_causal_mask": True}, {"pool_type": "last"}])
def test_towers_that_share_nothing_load(tiny_folder: Path, text: dict[str, Any]) -> None:
    config = json.loads((tiny_folder / "tiny.json").read_text())
    config["text_cfg"] |= text
    (tiny_folder / "tiny.json").write_text(json.dumps(config))
    backbone = backbone_from_spec(str(tiny_folder))
    assert backbone.prompt_path.path == "plain"
    assert backbone.encode_text(["a cat"]).shape == (1, 16)


def test_damaged_and_hostile_files_are_refused(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "zero.pt").write_bytes(b"")
    (tmp_path / "noise.safetensors").write_bytes(b"\0" * 100)
    (tmp_path / "noise.pt").write_bytes(b"junk")
    torch.save({"a": Hostile()}, tmp_path / "hostile.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    for name in ("zero.pt", "noise.pt", "noise.safetensors", "hostile.pt", "other.pt"):
        with pytest.raises(UserError, match=name) as caught:
            load_backbone("tiny-clip", tmp_path / name, force_quick_gelu=True)
        assert "weights_only" not in str(caught.value)  # torch's advice would run the file
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_one_config_is_refused(tiny_folder: Path) -> None:
    (tiny_folder / "copy.json").write_text((tiny_folder / "tiny.json").read_text())
    with pytest.raises(UserError, match="holds 2 open_clip model configs"):
        backbone_from_spec(str(tiny_folder))
    (tiny_folder / "copy.json").write_text('{"embed_dim": 16, "vision_cfg": {}, "text_cfg": []}')
    with pytest.raises(UserError, match="text_cfg should hold keys and values"):
        backbone_from_spec(str(tiny_folder))
    for path in tiny_folder.glob("*.json"):
        path.unlink()
    with pytest.raises(UserError, match="holds no open_clip model configs"):
        backbone_from_spec(str(tiny_folder))


@follows(
    'The text "{}" does not fit the {}; shorten it',
)
def test_prompts_that_do_not_fit_are_refused_not_cut(tiny_folder: Path) -> None:
    backbone = backbone_from_spec(str(tiny_folder))
    assert backbone.encode_text(["cat " * 75]).shape == (1, 16)
    with pytest.raises(UserError, match="does not fit the 77 tokens"):
        backbone.encode_text(["a cat", "cat " * 76])


def test_a_tokenizer_that_was_read_before_open_clip_can_be_sent_once_it_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as before:
        before.delitem(sys.modules, "open_clip")
        alone = load_tokenizer({"context_length": 9}, None)
    sent = pickle.loads(pickle.dumps(load_tokenizer({"context_length": 9}, None)))
    assert torch.equal(sent(["a Cat's photo"]), alone(["a Cat's photo"]))
