"""What runs learned: one safetensors file per run, ``contexts/KEY.safetensors``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastcoop.errors import UserError
from fastcoop.files import atomic_write

CONTEXTS = "contexts"


@dataclass(frozen=True, eq=False)
class Parameters:
    """What a run learned, and the classes that it learned.

    Attributes:
        contexts: float32 (M, width) or (classes, M, width) of prompt learning; None for other methods.
        weights: arrays by name of other methods; None for prompt learning.
        class_names, class_ids: of the training dataset, in label order; empty in files without them.
        recipe: name of the features' image transforms; None in files without it.
        header: the whole metadata of the file.
    """

    contexts: np.ndarray | None
    weights: Mapping[str, np.ndarray] | None
    class_names: tuple[str, ...] = ()
    class_ids: tuple[str, ...] = ()
    recipe: str | None = None
    header: Mapping[str, str] = field(default_factory=dict)


def parameters_path(folder: Path, key: str) -> Path:
    """Return the path of the file of what a run learned."""
    return folder / CONTEXTS / f"{key}.safetensors"


def write_parameters(folder: Path, key: str, learned: Parameters) -> None:
    """Write what a run learned. Raises OSError where the disk is full or cannot be written to."""
    arrays = {name: np.ascontiguousarray(array) for name, array in (learned.weights or {}).items()}
    if learned.contexts is not None:
        arrays["contexts"] = learned.contexts.astype(np.float32)
    header = {
        "class_names": json.dumps(learned.class_names),
        "class_ids": json.dumps(learned.class_ids),
        "key": key,
    }
    header |= {} if learned.recipe is None else {"recipe": learned.recipe}
    write_arrays(parameters_path(folder, key), arrays, header)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, str]) -> None:
    """Write arrays to a safetensors file, with their digest added to the header. Raises OSError as above."""
    from safetensors.numpy import save

    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part, part.open("wb") as file:
        file.write(save(arrays, {**header, "sha256": _digest(arrays)}))
        file.flush()
        os.fsync(file.fileno())  # as the database is, whose row refers to the file


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 hex of arrays: their names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype.str}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def load_parameters(folder: str | Path, key: str) -> Parameters | None:
    """Return what a run learned; None where the folder has no file of it.

    Raises:
        UserError: the file is damaged, or another run's.
    """
    from safetensors import SafetensorError, safe_open

    path = parameters_path(Path(folder), key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names, ids = (tuple(json.loads(header.get(part, "[]"))) for part in ("class_names", "class_ids"))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy.") from None
    digest = _digest(arrays)
    if header.get("key", key) != key or header.get("sha256", digest) != digest:
        raise UserError(
            f"{path} is damaged: it does not hold what was written for run {key[:12]}; restore it from a copy."
        )
    contexts = arrays.pop("contexts", None)
    weights = arrays if contexts is None else None
    return Parameters(contexts, weights, names, ids, header.get("recipe"), header)


def load_contexts(folder: str | Path, key: str) -> np.ndarray:
    """Return the contexts that a run learned: float32 (M, width), or (classes, M, width) if class-specific.

    Args:
        folder: a results folder.
        key: the run's whole key.

    Raises:
        UserError: there is no file of them, or it is damaged.
    """
    learned = load_parameters(folder, key)
    if learned is None or learned.contexts is None:
        path = parameters_path(Path(folder), key)
        reason = f"there is no {path}" if learned is None else f"{path} holds other arrays"
        raise UserError(f"{folder} has no learned contexts for run {key}: {reason}.")
    return learned.contexts
