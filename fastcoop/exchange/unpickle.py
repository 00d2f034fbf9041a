"""Checkpoints of the official code, opened without running anything that they name.

A genuine one pickles its learning rate scheduler, and with it an optimizer, so torch's own safe loading refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.backbones.unpickle import TorchFile
from fastcoop.errors import UserError


class Checkpoint:
    """A file of torch.save, opened. ``content`` has stand-ins in place of tensors; ``tensor`` reads them."""

    def __init__(self, path: Path):
        """Raises UserError if the file is missing, damaged, or not in the format of torch.save since 1.6."""
        self.path = path
        try:
            with TorchFile(path) as file:
                self.content: Any = file.unpickled()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
        except Exception as error:  # a damaged pickle raises whatever its next byte happens to mean
            raise self._damaged(error) from None

    def tensor(self, stand_in: Any) -> np.ndarray:
        """The array, in its own dtype, behind a tensor's stand-in.

        Raises UserError if it is no stand-in of a tensor of floating-point numbers, or reaches outside its storage.
        """
        try:
            with TorchFile(self.path) as file:
                array = file.tensor(stand_in)
            if array.dtype.kind != "f":
                raise ValueError(f"{array.dtype} numbers came where floating-point ones were expected")
            return array
        except Exception as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self.path} should be a checkpoint of torch.save, version 1.6 or later, but cannot be read as one "
            f"({error}); if torch itself can load it, save it again there."
        )


def state_dict_of(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], int]:
    """The state dict, of stand-ins, and the epoch. Raises UserError where the file has none."""
    content = checkpoint.content
    state = content.get("state_dict") if isinstance(content, dict) else None
    epoch = content.get("epoch") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not isinstance(epoch, int) or isinstance(epoch, bool):
        raise UserError(
            f"{checkpoint.path} should hold a state_dict and an epoch, as the official code saves; it does not."
        )
    return state, epoch
