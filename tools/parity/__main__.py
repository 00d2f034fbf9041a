"""Run the official codes beside fastcoop, and print how far their results are apart.

    python -m tools.parity FOLDER [METHOD ...]

FOLDER has checkouts of the official repositories; those that a method lacks are named, with the commands that get
them. Both learn from the same made-up features, texts, start and batches, on a CPU in float32, and both choose on the
same validation images. Nothing of the official codes is changed but what a line of ``tools/parity`` names: their
readers of images and files are left out, and float16 is float32.

Differences of logits and losses are relative to the largest; those of learned weights to the distance that they
moved. A row is the largest difference of all runs compared. The exit code is 1 if one is above its bar.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tools.parity.official import use_cpu
from tools.parity.world import Row

COMMITS = {
    "KaiyangZhou/CoOp": "ff61507", "KaiyangZhou/Dassl.pytorch": "c61a1b5", "htyao89/KgCoOp": "c43ccc3",
    "BeierZhu/Prompt-align": "1b76203", "htyao89/Textual-based_Class-aware_prompt_tuning": "bd97bec",
    "gaopengcuhk/Tip-Adapter": "d0e2d6f", "mrflogs/ICLR24": "560fe21", "omarnust/BReg-Adapter": "035b684",
    "geekyutao/TaskRes": "5195359", "gaopengcuhk/CLIP-Adapter": "08d07f8", "jusiro/CLAP": "dbdf409",
    "FereshteShakeri/FewShot-CLIP-Strong-Baseline": "f81054f", "linzhiqiu/cross_modal_adaptation": "ac9077e",
    "astra-vision/ProLIP": "b43e795",
}  # fmt: skip
# Module of a method, and its repositories.
METHODS = {
    "tip_adapter": ("tip_adapter", "Tip-Adapter"),
    "tip_adapter_f": ("tip_adapter", "Tip-Adapter"),
    "gda": ("gda", "ICLR24"),
    "proker": ("proker", "BReg-Adapter"),
    "task_res": ("task_res", "TaskRes", "Dassl.pytorch"),
    "clip_adapter": ("clip_adapter", "CLIP-Adapter", "Dassl.pytorch"),
    "lp_plus_plus": ("lp_plus_plus", "FewShot-CLIP-Strong-Baseline"),
    "cross_modal": ("cross_modal", "cross_modal_adaptation"),
    "zs_lp": ("clap", "CLAP", "Dassl.pytorch"),
    "clap": ("clap", "CLAP", "Dassl.pytorch"),
    "prolip": ("prolip", "ProLIP"),
    "coop": ("prompts", "CoOp", "Dassl.pytorch"),
    "cocoop": ("prompts", "CoOp", "Dassl.pytorch"),
    "kgcoop": ("prompts", "KgCoOp", "Dassl.pytorch"),
    "prograd": ("prompts", "Prompt-align"),
    "tcp": ("prompts", "Textual-based_Class-aware_prompt_tuning", "Dassl.pytorch"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"by default all: {', '.join(METHODS)}")
    given = parser.parse_args()
    methods = given.methods or list(METHODS)
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"expected methods of {', '.join(METHODS)}, got {', '.join(unknown)}")
    missing = {
        name for method in methods for name in METHODS[method][1:] if not (given.folder / name).is_dir()
    }
    if missing:
        parser.error(
            "\n".join(
                [
                    "these repositories are missing; get them by",
                    *(clone(name, given.folder) for name in sorted(missing)),
                ]
            )
        )
    if len(methods) > 1:  # in a process each: several codes have modules of the same names
        command = [sys.executable, "-W", "ignore", "-m", "tools.parity", str(given.folder)]
        failed = [name for name in methods if subprocess.run([*command, name], check=False).returncode]
        sys.exit(bool(failed))
    use_cpu()
    sys.exit(not report(methods[0], given.folder.resolve()))


def clone(name: str, folder: Path) -> str:
    """Return the command that makes a checkout of a repository."""
    (repository,) = (one for one in COMMITS if one.endswith(f"/{name}"))
    place = shlex.quote(str(folder / name))
    return (
        f"git clone https://github.com/{repository} {place} && git -C {place} checkout {COMMITS[repository]}"
    )


def report(method: str, folder: Path) -> bool:
    """Print the largest difference of each quantity, and return whether all are within their bars."""
    start, worst, counts = time.perf_counter(), dict[str, Row](), dict[str, int]()
    for row in importlib.import_module(f"tools.parity.{METHODS[method][0]}").compare(folder, method):
        counts[row.quantity] = counts.get(row.quantity, 0) + 1
        before = worst.get(row.quantity)
        if before is None or not row.difference - row.bar <= before.difference - before.bar:
            worst[row.quantity] = row
    for row in worst.values():
        verdict = "ok" if row.difference <= row.bar else "ABOVE"
        numbers = (
            f"{row.difference:7.1e}  bar {row.bar:7.1e}  {verdict:5s}  {counts[row.quantity]:2d} compared"
        )
        print(f"{method:13s}  {numbers}  {row.quantity}")
    print(f"{method:13s}  {time.perf_counter() - start:.0f} s", flush=True)
    return all(row.difference <= row.bar for row in worst.values())


if __name__ == "__main__":
    main()
