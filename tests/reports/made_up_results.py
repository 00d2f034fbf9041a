"""A made-up results folder with the paper's pattern in it: known gains, known spreads, every method and
study."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

DATASETS = ("objects", "instruments", "textures", "digits", "weather")
SHOTS = (1, 2, 4, 8, 16)
BASE = {"objects": 50.0, "instruments": 42.0, "textures": 30.0, "digits": 35.0, "weather": 60.0}


def results(
    datasets: Sequence[str] = DATASETS,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = (1, 2, 3),
    backbone: str = "demo-resnet",
    schedule: str = "paper",
    lift: float = 0.0,
) -> pd.DataFrame:
    """Figure 3's runs on ``datasets``: zero-shot, linear probe and four CoOp variants, ``lift`` points
    better."""
    rng = np.random.default_rng(0)
    rows = []
    for dataset in datasets:
        base = BASE.get(dataset, 45.0) + lift
        common = {"backbone": backbone, "dataset": dataset, "chance": 10.0}
        rows.append(run(**common, method="zero_shot", shots=0, seed=0, accuracy=base))
        for count in shots:
            for seed in seeds:
                noise = rng.normal(0, 0.4, 5)
                step = np.log2(count)
                rows.append(
                    run(
                        **common,
                        method="linear_probe",
                        shots=count,
                        seed=seed,
                        accuracy=base - 14 + 6.5 * step + noise[0],
                    )
                )
                for k, (position, specific) in enumerate(
                    (p, s) for s in (False, True) for p in ("end", "mid")
                ):
                    gain = (-6 + 5.6 * step if specific else 2 + 3.6 * step) + noise[1 + k]
                    layout = {"class_position": position, "class_specific": specific}
                    trained = {"shots": count, "seed": seed, "schedule": schedule}
                    rows.append(coop(**common, **layout, **trained, accuracy=base + gain))
    return pd.DataFrame(rows)


def run(**given) -> dict:
    """One row of a results table."""
    accuracy = given.get("accuracy")
    row = {
        "label": given.get("method", ""), "context_length": np.nan, "class_position": None, "class_specific": False,
        "init": None, "epochs": np.nan, "schedule": "paper", "macro_accuracy": accuracy, "status": "done",
        "seconds": 1.0, "settings": json.dumps({"views": 8}), "chance": 10.0, "source": given.get("dataset"),
        "per_class": None, "versions": None, "train_images": np.nan, "test": None, "images": None,
        "backbone_digest": None, "prompts": None,
    }  # fmt: skip
    row.update(given)
    text = "-".join(str(row[k]) for k in sorted(row) if k not in ("accuracy", "macro_accuracy", "seconds"))
    row["key"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return row


def coop(**given) -> dict:
    """One row of a CoOp run: M = 16, random initialisation, the class at the end, unless said otherwise."""
    usual = {
        "method": "coop",
        "context_length": 16,
        "class_position": "end",
        "class_specific": False,
        "init": "random",
        "epochs": 200,
    }
    return run(**{**usual, **given})


def store_words(
    folder,
    frame: pd.DataFrame,
    words: Sequence[str] = ("cat", "hu-", "of"),
    chance: float = 1.0,
    classes: Sequence[str] = ("boxer", "pug"),
) -> None:
    """Nearest words for every CoOp run of ``frame``: vector i is nearest to ``words[i % len(words)]``, at 0.9 to
    1.05; random vectors of its length are ``chance`` away. Class-specific runs have them per class."""
    (folder / "nearest_words").mkdir(parents=True, exist_ok=True)
    for _, row in frame[frame.method == "coop"].iterrows():
        specific = bool(row.class_specific)
        vectors = [
            {"position": i + 1, "words": [words[i % len(words)], "x"], "distances": [0.9 + i / 100, 1.5],
             "chance": chance, **({"class": name} if specific else {})}
            for name in (classes if specific else classes[:1])
            for i in range(int(row.context_length))
        ]  # fmt: skip
        stored = {"metric": "euclidean", "vectors": vectors, "by_chance": 0.8 * chance, "initial": 0.7}
        if row.init not in (None, "random"):
            stored["start_words"] = row.init.split()
        (folder / "nearest_words" / f"{row.key}.json").write_text(json.dumps(stored))


def whole_study(seeds: Sequence[int] = (1, 2, 3)) -> pd.DataFrame:
    """Runs for every item of the paper: two backbones, prompts, context lengths, words, shift, other
    methods."""
    rng = np.random.default_rng(1)
    frames = [
        results(seeds=seeds, schedule=QUICK),
        results(seeds=seeds, backbone="demo-vit", schedule=QUICK, lift=5),
    ]
    rows = []
    for backbone, lift in (("demo-resnet", 0.0), ("demo-vit", 5.0)):
        for dataset in DATASETS:
            base = BASE[dataset] + lift
            common = {"backbone": backbone, "dataset": dataset, "schedule": QUICK}
            for prompt, worse in (("a {}.", 6), ("an icon of a {}, a type of symbol.", 2)):
                settings = json.dumps({"prompt": prompt})
                rows.append(
                    run(
                        **common,
                        method="zero_shot",
                        shots=0,
                        seed=0,
                        accuracy=base - worse,
                        settings=settings,
                    )
                )
            rows.append(run(**common, method="ensemble", shots=0, seed=0, accuracy=base + 2))
            for seed in seeds:
                trained = {**common, "shots": 16, "seed": seed}
                for length, more in ((4, 15.0), (8, 15.7)):
                    for position in ("end", "mid"):
                        accuracy = base + more + rng.normal(0, 0.3)
                        rows.append(
                            coop(**trained, context_length=length, class_position=position, accuracy=accuracy)
                        )
                accuracy = base + 15 + rng.normal(0, 0.2)
                rows.append(coop(**trained, context_length=4, init="a photo of a", accuracy=accuracy))
                for method, gain in (
                    ("finetune_image_encoder", -25),
                    ("text_transform", 1),
                    ("text_bias", 4),
                ):
                    rows.append(run(**trained, method=method, accuracy=base + gain + rng.normal(0, 0.3)))
        for target, harm in (("objects-outline", 8.0), ("objects-filled", 12.0), ("objects-duotone", 20.0)):
            base = BASE["objects"] + lift - harm
            common = {"backbone": backbone, "dataset": target, "source": "objects", "schedule": QUICK}
            rows.append(
                run(**common | {"source": target}, method="zero_shot", shots=0, seed=0, accuracy=base)
            )
            for seed in seeds:
                trained = {**common, "shots": 16, "seed": seed}
                rows.append(run(**trained, method="linear_probe", accuracy=base - 9 + rng.normal(0, 0.5)))
                for length, gain in ((4, 3.0), (16, 1.0)):
                    rows.append(
                        coop(**trained, context_length=length, accuracy=base + gain + rng.normal(0, 0.3))
                    )
    return pd.concat([*frames, pd.DataFrame(rows)], ignore_index=True)


QUICK = "quick: 30 epochs instead of 50 to 200"
