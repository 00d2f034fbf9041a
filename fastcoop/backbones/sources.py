"""Where the files of a model are: in folders, in caches (open_clip's, OpenAI's, Hugging Face's), or on the network."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastcoop.backbones.hf_clip import is_hf_clip, open_clip_config, part_of, preprocess_settings
from fastcoop.backbones.late import open_clip
from fastcoop.backbones.weights import expected_sha256, file_sha256
from fastcoop.checks import shortened
from fastcoop.errors import UserError
from fastcoop.files import read_json

HUB_PREFIX = "hf-hub:"  # open_clip's, before the name of a repository
HUB_CONFIG = "open_clip_config.json"
CONFIG_KEYS = ("embed_dim", "vision_cfg", "text_cfg")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")
OPENAI_CACHE = Path("~/.cache/clip")  # where OpenAI's own package, and so the official CoOp code, keeps them
PREFERRED_STEMS = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
TOKENIZER_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json",
)  # fmt: skip
SMALL_FILES = ("*.json", "*.txt", "*.model")  # configs and tokenizers
# Settings in a Hugging Face config that change no feature, or that would make its library load other code or dtypes.
NOT_OF_A_TOWER = (
    "_commit_hash", "_name_or_path", "architectures", "attn_implementation", "auto_map", "dtype", "torch_dtype",
    "quantization_config", "transformers_version", "use_cache",
)  # fmt: skip
WORD = "photo</w>"  # tells vocabularies apart by its number
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def read_folder_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Return the open_clip config in ``folder``, its preprocessing settings ({} where it states none), and its file.

    It is ``open_clip_config.json``, else the only ``*.json`` that is a model config, else the ``config.json`` of a CLIP
    in Hugging Face's format.
    """
    found = []
    hub = folder / HUB_CONFIG
    for path in [hub] if hub.is_file() else sorted(folder.glob("*.json")):
        content = read_json(path)
        model = content.get("model_cfg", content) if isinstance(content, dict) else None
        if not isinstance(model, dict) or not all(key in model for key in CONFIG_KEYS):
            continue
        if odd := [key for key in CONFIG_KEYS[1:] if not isinstance(model[key], dict)]:
            raise UserError(f"{path}: {odd[0]} should hold keys and values, as in open_clip's configs.")
        if not isinstance(model.get("quick_gelu"), bool | None):
            raise UserError(
                f"{path}: quick_gelu should be true or false, got {shortened(model['quick_gelu'])}."
            )
        found.append((model, part_of(content, "preprocess_cfg", path), path))
    plain = folder / "config.json"
    if not found and plain.is_file() and is_hf_clip(content := read_json(plain)):
        model = open_clip_config(content, plain)
        _check_vocabulary(folder / "vocab.json")
        return model, _hf_preprocessing(folder, model["vision_cfg"]["image_size"]), plain
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {len(found) or 'no'} open_clip model configs; expected {HUB_CONFIG}, or one .json file "
            f"with {', '.join(CONFIG_KEYS)}, or the config.json of a CLIP in Hugging Face's format."
        )
    return found[0]


def _check_vocabulary(path: Path) -> None:
    """Refuse the vocabulary of a CLIP in Hugging Face's format, if there is one, unless it is CLIP's own."""
    own = open_clip.SimpleTokenizer().encoder
    if path.is_file() and ((words := _read_if_there(path)).get(WORD), len(words)) != (own[WORD], len(own)):
        raise UserError(
            f"{path} holds another vocabulary than CLIP's of {len(own)} tokens; in Hugging Face's format only CLIPs "
            "with CLIP's own tokenizer can be read."
        )


def _read_if_there(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def _hf_preprocessing(folder: Path, image_size: int) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        content = _read_if_there(folder / name)
        if settings := part_of(content, "image_processor", folder / name) or content:
            return preprocess_settings(settings, image_size, folder / name)
    return {}


def read_tower_config(name: str, folder: Path | None) -> dict[str, Any]:
    """Return the Hugging Face config of the text tower ``name``: the config.json in ``folder``, else the hub's.

    A UserError says if it is not on this machine, or is the config of a tower that open_clip does not build.
    """
    file, kinds = "config.json", [*open_clip.hf_configs.arch_dict]
    content = _read_if_there(folder / file) if folder is not None else {}
    if content.get("model_type") not in kinds:
        content = _read_if_there(
            find_hub_files(name, "config", [file], lambda at: (at / file).is_file()) / file
        )
    if (kind := content.get("model_type")) not in kinds:
        raise UserError(
            f'The text tower "{name}" is of type "{kind}"; open_clip builds the types {", ".join(kinds)}.'
        )
    return {key: value for key, value in content.items() if key not in NOT_OF_A_TOWER}


def is_model_folder(path: Path) -> bool:
    """Return whether ``path`` is a folder with a weights file and a .json file."""
    with suppress(OSError):
        suffixes = {file.suffix for file in path.iterdir()}
        return ".json" in suffixes and not suffixes.isdisjoint(WEIGHT_SUFFIXES)
    return False


def has_tokenizer(folder: Path) -> bool:
    """Return whether ``folder`` holds the vocabulary of a tokenizer in Hugging Face's format."""
    return any((folder / name).is_file() for name in TOKENIZER_VOCABULARIES)


def find_weights(folder: Path) -> Path:
    """Return the weights file in ``folder``: one of open_clip's usual names, else the only one."""
    files = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if (found := _choose(files)) is None:
        raise UserError(
            f"{folder} should hold one weights file ({', '.join(WEIGHT_SUFFIXES)}), found: "
            f"{', '.join(files) or 'none'}; pass the file itself."
        )
    return folder / found


def _choose(files: Sequence[str]) -> str | None:
    """Return the weights file among ``files``: one of open_clip's usual names, else the only one, else None."""
    usual = (f"{stem}{suffix}" for stem in PREFERRED_STEMS for suffix in WEIGHT_SUFFIXES)
    return next((name for name in usual if name in files), files[0] if len(files) == 1 else None)


def usual_settings(model_name: str) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of most of a model's tags in open_clip, for weights from a file, and the tags unlike them.

    These are the preprocessing, and "quick_gelu": False where neither a tag nor a variant of the model has QuickGELU.
    """
    names = open_clip.list_pretrained_tags_by_model(model_name)
    tags = {tag: open_clip.get_pretrained_cfg(model_name, tag) for tag in names}
    ways = {tag: {name: one[name] for name in PREPROCESSING if name in one} for tag, one in tags.items()}
    counts = Counter(map(repr, ways.values()))
    settings = next((way for way in ways.values() if repr(way) == counts.most_common(1)[0][0]), {})
    unlike = [tag for tag, way in ways.items() if way != settings]
    has_variant = any(name == f"{model_name}-quickgelu" for name, _ in open_clip.list_pretrained())
    if tags and not has_variant and not any(config.get("quick_gelu") for config in tags.values()):
        settings = settings | {"quick_gelu": False}
    return settings, unlike


def fetch_weights(model_name: str, tag: str, config: dict[str, Any]) -> Path:
    """Return the local file of open_clip's pretrained ``config`` for a model and tag, downloaded if needed."""
    url = config.get("url", "")
    cached = OPENAI_CACHE.expanduser() / Path(url).name
    expected = expected_sha256(url)
    if expected and cached.is_file() and file_sha256(cached).startswith(expected):
        return cached
    try:
        with _hub_errors_only():
            return Path(open_clip.pretrained.download_pretrained(config))
    except Exception as error:  # a network client may raise any exception
        repository, _, filename = str(config.get("hf_hub", "")).rpartition("/")
        file = filename or "open_clip_model.safetensors"
        address = url or f"https://huggingface.co/{repository}/resolve/main/{file}"
        raise UserError(
            f'The weights "{tag}" of {model_name} are not on this machine and could not be downloaded. Fetch {address} '
            f'where there is a network, then name the file with the model: "{model_name}:FILE", on the command line as '
            'in a grid, or pretrained="FILE" in Python.'
        ) from error


def fetch_model(repository: str) -> Path:
    """Return the folder of a model of the Hugging Face hub, with config, weights and tokenizer; download what lacks."""
    return find_hub_files(repository, "model", SMALL_FILES, is_model_folder, weights=True)


def find_hub_files(
    repository: str,
    what: str,
    names: Iterable[str],
    is_complete: Callable[[Path], bool],
    weights: bool = False,
) -> Path:
    """Return the folder of a repository in Hugging Face's cache, from the network where it is not complete.

    ``names`` are the files to download, or patterns of their names; ``weights`` adds the weights. ``is_complete`` says
    whether a folder has what is needed, and ``what`` names that in messages: "model", "tokenizer" or "config".

    Raises:
        UserError: The files are neither on this machine nor on the network.
    """
    from huggingface_hub import list_repo_files, snapshot_download

    with suppress(Exception):  # not in the cache
        cached = Path(snapshot_download(repository, local_files_only=True))
        if is_complete(cached):
            return cached
    wanted, cause = [*names], None
    try:
        with _hub_errors_only():
            if weights:
                files = [name for name in list_repo_files(repository) if name.endswith(WEIGHT_SUFFIXES)]
                wanted += [_choose(files) or "*.safetensors"]
            folder = Path(snapshot_download(repository, allow_patterns=wanted))
        if is_complete(folder):
            return folder
    except Exception as error:  # a network client may raise any exception
        cause = error
    if weights:
        raise missing_model(repository, " and could not be downloaded") from cause
    only = " ".join(f"--include '{name}'" for name in wanted)
    raise UserError(
        f'The {what} "{repository}" is not on this machine and could not be downloaded. Run "hf download {repository} '
        f"{only} --local-dir FOLDER\" where there is a network, then move its files next to the model's "
        "weights."
    ) from cause


def missing_model(repository: str, why: str = "") -> UserError:
    """Return the error for a model of the hub that is not in its cache."""
    return UserError(
        f'The model "{repository}" is not on this machine{why}. Run "hf download {repository} --local-dir FOLDER" '
        "where there is a network, then name FOLDER as the backbone."
    )


@contextmanager
def _hub_errors_only() -> Iterator[None]:
    """Silence the retries that the hub's client logs."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)
