"""Run by test_two_processes: two and three processes at random moments on one feature cache.

    python -m tests.features.race_trial FOLDER TRIALS [SEED]

Everything is imported once; each process is a fork that caches features for some shots and views, imports features
under a shared name, or sweeps; some are killed. Whatever a process finishes must hold the numbers that it has alone,
and whatever it refuses it must refuse in one sentence. Prints how many processes finished, refused and were killed.
By hand, TRIALS of a few hundred take minutes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.datasets import load_dataset
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, cache_features, import_features, plan
from fastcoop.results import load_predictions, load_results
from fastcoop.sweeps import sweep
from tests.small_world import write_backbone, write_dataset

REFUSED = 3
SENTENCES = ("exists already", "made from other images", "Another process has written other features")
ASKED = tuple((shots, views) for shots in (1, 2, "all") for views in (1, 3))


def main(folder: Path, trials: int, seed: int) -> None:
    torch.set_num_threads(1)  # a fork does not bring along the threads that OpenMP would wait for
    plan.CROPS_PER_CHUNK = 4  # type: ignore[misc]
    one_crop_at_a_time()
    write_dataset(folder / "data" / "colours")
    backbone = backbone_from_spec(str(write_backbone(folder / "tiny")))
    dataset = load_dataset("colours", folder / "data")
    for number in range(2):
        write_features(folder / f"{number}.npz", number)

    def cache(place: Path, shots: int | str, views: int) -> None:
        path = cache_features(backbone, dataset, place, shots=[shots], seeds=[1], views=views)
        store = FeatureStore.open(path, backbone, dataset)
        rows = store.indices("train")
        assert np.array_equal(store.train(rows)[:, : 1 + views], everything.train(rows)[:, : 1 + views])
        assert store.digest == everything.digest

    def bring(place: Path, number: int, name: str) -> None:
        path = import_features({"test": folder / f"{number}.npz"}, place, backbone, name=name)
        with np.load(folder / f"{number}.npz") as file:
            assert np.array_equal(FeatureStore.open(path).split("test")[0], file["features"])

    def study(place: Path, results: Path) -> None:
        coop = {"context_length": 2, "epochs": 3}
        grid = {
            "backbones": str(folder / "tiny"),
            "datasets": "colours",
            "shots": [1, 2],
            "seeds": 1,
            "views": 1,
        }
        grid |= {"methods": ["zero_shot", {"coop": coop}]}
        sweep(grid, data_root=folder / "data", cache=place, results=results, jobs=1)

    def choose(rng: random.Random, place: Path, process: int) -> Callable[[], None]:
        kind, (shots, views) = rng.choice(("cache", "cache", "sweep", "import")), rng.choice(ASKED)
        name = rng.choice(("elsewhere", "elsewhere", "colours"))
        if kind == "cache":
            return lambda: cache(place, shots, views)
        if kind == "sweep":
            return lambda: study(place, place / f"results{process}")
        return lambda: bring(place, process % 2, name)

    everything = FeatureStore.open(
        cache_features(backbone, dataset, folder / "alone", shots=["all"], seeds=[1], views=3)
    )
    begin = time.monotonic()
    study(folder / "swept", folder / "results")
    duration, undisturbed = time.monotonic() - begin, numbers(folder / "results")

    rng, count = random.Random(seed), Counter[str]()
    for trial in range(trials):
        place = folder / f"trial{trial}"
        work = [choose(rng, place, process) for process in range(rng.choice((2, 3)))]
        place.mkdir()
        children = []
        for process, do in enumerate(work):
            children.append(start(do, place / f"said{process}"))
            time.sleep(rng.uniform(0, duration / 2))
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, duration / 2))
            os.kill(rng.choice(children), signal.SIGKILL)
        for process, child in enumerate(children):
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = (place / f"said{process}").read_text()
            assert code in (0, REFUSED, -signal.SIGKILL), said
            assert code != REFUSED or any(part in said for part in SENTENCES), said
            count[{0: "finished", REFUSED: "refused"}.get(code, "killed")] += 1
        for results in place.glob("results*"):
            if (results / "results.sqlite").exists():
                assert numbers(results).items() <= undisturbed.items()
        try:
            cache(place, "all", 3)
            study(place, place / "last")
            assert numbers(place / "last") == undisturbed
        except UserError as error:
            if "made from other images" not in str(error):  # imported under the dataset's name
                raise
        left = [
            path.name for path in place.rglob("*") if path.suffix == ".part" or path.name.endswith(".parts")
        ]
        assert not left or count["killed"], left
        shutil.rmtree(place)
    print(count["finished"], count["refused"], count["killed"])


def one_crop_at_a_time() -> None:
    """Features that do not depend on what they are encoded with, not even by rounding."""
    original = Backbone.encode_images

    def encode_images(self: Backbone, images: torch.Tensor, precision: str = "float32") -> torch.Tensor:
        return torch.cat([original(self, images[row : row + 1]) for row in range(len(images))])

    Backbone.encode_images = encode_images  # type: ignore[method-assign]


def write_features(path: Path, seed: int) -> None:
    """Features to import, exact in float16."""
    features = np.random.default_rng(seed).normal(size=(4000, 16)).astype(np.float16).astype(np.float32)
    np.savez(path, features=features, labels=np.arange(4000) % 2, names=["cat", "dog"])


def numbers(results: Path) -> dict[str, tuple[float, bytes]]:
    """Accuracy and predictions of each run, by key."""
    frame = load_results(results)
    predicted = {key: load_predictions(results, key).predicted.tobytes() for key in frame.key}
    return {row.key: (row.accuracy, predicted[row.key]) for row in frame.itertuples()}


def start(do: Callable[[], None], said: Path) -> int:
    """Fork a process that does it; what it prints goes to a file."""
    said.touch()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr = sys.stdout = said.open("w")
        do()
        code = 0
    except UserError as error:
        print(error)
        code = REFUSED
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
