"""Run by test_disk in a namespace where it may mount: stores on disks of a few kilobytes.

    python -m tests.features.full_disk_trial FOLDER

Mounts a tmpfs at FOLDER/disk, smaller and larger, and caches there, few images and then more. Prints how often the
disk was too small for the second and how often it was not. What the first left must be as it was.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from fastcoop.errors import UserError
from fastcoop.features import cache_features, plan
from tests.features.small import make_backbone, make_folder

KILOBYTES = (40, 72, 88, 104, 120, 1024)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    plan.CROPS_PER_CHUNK = 32  # type: ignore[misc]
    backbone, dataset = make_backbone(), make_folder(folder / "animals", train=40, val=4, test=20)
    refused = finished = 0
    for size in KILOBYTES:
        disk = folder / "disk"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
        try:
            path = cache_features(backbone, dataset, disk, shots=[1], seeds=[1], views=0)
            before = path.read_bytes()
            cache_features(backbone, dataset, disk, shots=["all"], seeds=[1], views=3)
            finished += 1
        except UserError as error:
            full = "cannot be written (No space left on device)" in str(error)
            if not full or list(disk.glob("**/*.part")):
                raise
            if list(disk.glob("**/*.h5")):
                assert path.read_bytes() == before
                refused += 1
        subprocess.run(["umount", disk], check=True)
    print(refused, finished)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
