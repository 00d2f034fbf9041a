"""CoOp, CoCoOp, KgCoOp, ProGrad and TCP: their trainers' ``build_model`` and steps, on one random text tower."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import packaging.version
import torch
from safetensors.torch import save_file

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.methods import METHODS
from tools.parity import official, world
from tools.parity.world import Row, moved, relative

Space = SimpleNamespace


@dataclass(frozen=True)
class Case:
    """Two runs that are compared: of which dataset, with what batches, and the prompt in both configurations."""

    dataset: str
    shots: int
    epochs: int
    batch_size: int
    rate: float
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trainer:
    """An official trainer: where it is, its tower's size (dim, width, heads, layers), and what is compared."""

    folder: str
    name: str
    tower: tuple[int, int, int, int]
    cases: tuple[Case, ...]
    dassl: str = "Dassl.pytorch"
    clip: str = "clip.model"
    optimizer: str = "sgd"


# Of a dataset here: the official name, the template, and some of its class names.
DATASETS = {
    "oxford_pets": (
        "OxfordPets",
        "a photo of a {}, a type of pet.",
        [
            "abyssinian",
            "american_bulldog",
            "maine_coon",
            "pug",
            "shiba_inu",
            "great_pyrenees",
            "saint_bernard",
        ],
    ),
    "dtd": (
        "DescribableTextures",
        "{} texture.",
        ["banded", "cobwebbed", "polka-dotted", "lacelike", "zig zagged", "stained"],
    ),
    "eurosat": (
        "EuroSAT",
        "a centered satellite photo of {}.",
        ["annual crop land", "forest", "highway or road", "industrial buildings", "river", "sea or lake"],
    ),
    "ucf101": (
        "UCF101",
        "a photo of a person doing {}.",
        ["Apply_Eye_Makeup", "Yo_Yo", "Playing_Tabla", "Tai_Chi", "Walking_With_Dog"],
    ),
    "stanford_cars": (
        "StanfordCars",
        "a photo of a {}.",
        [
            "2012 Acura RL Sedan",
            "1994 Audi V8 Sedan",
            "2007 Hyundai Elantra Sedan",
            "2012 Tesla Model S Sedan",
        ],
    ),
    "fgvc_aircraft": (
        "FGVCAircraft",
        "a photo of a {}, a type of aircraft.",
        ["707-320", "A340-600", "MD-11", "Spitfire"],
    ),
    "caltech101": (
        "Caltech101",
        "a photo of a {}.",
        [
            "accordion",
            "ceiling_fan",
            "grand_piano",
            "yin_yang",
            "motorbike",
            "wild_cat",
            "inline skate",
            "leopard",
        ],
    ),
}
WORDS = "a photo of a"
PHOTO = {"CTX_INIT": WORDS}
SMALL = (56, 128, 4, 6)
TRAINERS = {
    "coop": Trainer("CoOp", "CoOp", SMALL, (
        Case("oxford_pets", 8, 50, 32, 0.002, {"N_CTX": 16}, {"context_length": 16}),
        Case("dtd", 16, 50, 32, 0.002, {"N_CTX": 4, "CSC": True}, {"context_length": 4, "class_specific": True}),
        Case("eurosat", 4, 50, 16, 0.002, {"N_CTX": 16, "CLASS_TOKEN_POSITION": "middle"},
            {"context_length": 16, "class_position": "mid"}),
        Case("ucf101", 8, 50, 16, 0.002, {"N_CTX": 5, "CSC": True, "CLASS_TOKEN_POSITION": "middle"},
            {"context_length": 5, "class_specific": True, "class_position": "mid"}),
        Case("caltech101", 2, 50, 32, 0.002, {"N_CTX": 8, "CLASS_TOKEN_POSITION": "front"},
            {"context_length": 8, "class_position": "front"}),
        Case("stanford_cars", 8, 50, 32, 0.002, PHOTO, {"init": WORDS}),
    )),
    "cocoop": Trainer("CoOp", "CoCoOp", (96, 96, 4, 4), (
        Case("caltech101", 2, 6, 1, 0.002, PHOTO),
        Case("eurosat", 3, 6, 5, 0.02, {"N_CTX": 6}, {"init": "random", "context_length": 6}),
    )),
    "kgcoop": Trainer("KgCoOp/KgCoOp", "KgCoOp", SMALL, (
        Case("oxford_pets", 8, 50, 40, 0.002, PHOTO),
        Case("dtd", 16, 30, 128, 0.01, PHOTO | {"W": 2.5}, {"lmbda": 2.5}),
        Case("eurosat", 2, 60, 32, 0.005, {"N_CTX": 7}, {"init": "random", "context_length": 7}),
    )),
    "prograd": Trainer("Prompt-align/ProGrad.public", "ProGrad", SMALL, (
        Case("eurosat", 6, 50, 20, 0.02, {"CTX_INIT": "x", "N_CTX": 16}),
        Case("ucf101", 16, 40, 32, 0.02, {"CTX_INIT": "x", "N_CTX": 8, "LAMBDA": 0.4},
            {"context_length": 8, "lmbda": 0.4}),
        Case("caltech101", 4, 50, 16, 0.02, {"N_CTX": 5, "CLASS_TOKEN_POSITION": "front"},
            {"init": "random", "context_length": 5, "class_position": "front"}),
    ), dassl="Prompt-align/Dassl.ProGrad.pytorch"),
    "tcp": Trainer("Textual-based_Class-aware_prompt_tuning", "TCP", (96, 512, 8, 10), (
        Case("dtd", 4, 10, 12, 0.002),
        Case("ucf101", 3, 8, 7, 0.004),
        Case("stanford_cars", 2, 10, 32, 0.002),
        Case("fgvc_aircraft", 2, 10, 32, 0.002, PHOTO, {"init": WORDS}),
    ), clip="trainers.clip_text.model", optimizer="adam"),
}  # fmt: skip
ADAM = '            betas=(adam_beta1, adam_beta2),\n        )\n\n    elif optim == "amsgrad":'
# As TCP's README asks for.
TCP_EDITS = ((ADAM, ADAM.replace("        )\n", "            eps=1e-3,\n        )\n", 1)),)


def compare(folder: Path, method: str) -> Iterator[Row]:
    trainer = TRAINERS[method]
    official.stub_dassl(folder / trainer.dassl, TCP_EDITS if method == "tcp" else ())
    official.stub("pkg_resources", packaging=packaging)  # which newer setuptools lack
    root = folder / trainer.folder
    sys.path.insert(0, str(root))
    official.stub("trainers").__path__ = [str(root / "trainers")]
    module = official.load(f"trainers.{method}", root / "trainers" / f"{method}.py")
    clip, backbone = random_tower(sys.modules[trainer.clip], *trainer.tower)
    for seed, case in enumerate(trainer.cases):
        _, template, classes = DATASETS[case.dataset]
        data = world.made_up(classes, trainer.tower[0], 4, seed, case.dataset, template)
        given = {
            "epochs": case.epochs,
            "batch_size": case.batch_size,
            "learning_rate": case.rate,
            **case.ours,
        }
        runs = world.runs_of(data, method, case.shots, (91, 92), backbone, **given)
        for run, found in world.learned(backbone, runs):
            training = METHODS[method].training(backbone, run)
            if hasattr(training, "net"):
                start, after = training.net.state_dict(), found.weights
            else:
                start, after = {"ctx": training.contexts.float()}, {"ctx": found.contexts}
            start = {name: one.detach().clone() for name, one in start.items()}
            theirs = build_official(module, trainer, case, run, clip)
            learner = dict(theirs.model.prompt_learner.named_parameters())
            if "CTX_INIT" in case.theirs:
                yield Row("start from words", float((learner["ctx"].detach() - start["ctx"]).abs().max()), 0)
            with torch.no_grad():
                for name, one in start.items():
                    learner[name].copy_(one)
            with official.quiet():
                losses = official.train(theirs, world.epochs_of(run, case.epochs, case.batch_size))
            for name, one in start.items():
                yield Row("parameters", moved(after[name], learner[name].detach(), one))
            yield Row("losses", relative(found.losses, losses))
            theirs.set_model_mode("eval")
            with torch.no_grad():
                logits = theirs.model(torch.from_numpy(data.split("test", METHODS[method].kinds[0])[0]))
            logits = logits[0] if isinstance(logits, tuple) else logits
            yield Row("logits", relative(world.logits_of(backbone, run, found), logits))


def random_tower(
    module: Any, dim: int, width: int, heads: int, layers: int
) -> tuple[torch.nn.Module, Backbone]:
    """Return the official model with random weights, and the same weights as a backbone."""
    torch.manual_seed(dim + layers)
    clip = module.CLIP(dim, 32, 1, 64, 16, 77, 49408, width, heads, layers)
    for name, one in clip.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            torch.nn.init.normal_(one, mean=1.0 if name.endswith("weight") else 0.0, std=0.15)
    torch.nn.init.normal_(clip.token_embedding.weight, std=0.05)
    torch.nn.init.normal_(clip.positional_embedding, std=0.03)
    clip.logit_scale.data.fill_(np.log(60.0))
    clip.requires_grad_(False).eval()
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads, "layers": layers}
    config = {"embed_dim": dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    numbers = ("input_resolution", "context_length", "vocab_size")
    weights = {name: one.contiguous() for name, one in clip.state_dict().items() if name not in numbers}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "random"
        folder.mkdir()
        (folder / "random.json").write_text(json.dumps(config))
        save_file(weights, folder / "open_clip_model.safetensors")
        return clip, backbone_from_spec(str(folder), device="cpu")


def build_official(module: Any, about: Trainer, case: Case, run: Any, clip: torch.nn.Module) -> Any:
    """Return the official trainer with its model, which takes features for images."""
    trainer = getattr(module, about.name)()
    trainer.device, dataset = torch.device("cpu"), DATASETS[case.dataset][0]
    prompt = {
        "N_CTX": 4,
        "CTX_INIT": "",
        "CSC": False,
        "CLASS_TOKEN_POSITION": "end",
        "PREC": "fp32",
        "W": 8.0,
    }
    prompt = Space(**prompt | case.theirs)
    trainer.cfg = Space(
        TRAINER=Space(COOP=prompt, COCOOP=prompt), DATASET=Space(NAME=dataset), INPUT=Space(SIZE=(32, 32)),
        MODEL=Space(BACKBONE=Space(NAME="random"), INIT_WEIGHTS=""),
        OPTIM=official.optimizer_config(NAME=about.optimizer, LR=case.rate, MAX_EPOCH=case.epochs),
        LOSS=Space(NAME="prograd", T=1.0, LAMBDA=case.theirs.get("LAMBDA", 1.0)),
    )  # fmt: skip
    trainer.dm = Space(dataset=Space(classnames=list(run.data.class_names)))
    module.load_clip_to_cpu = lambda config: copy.deepcopy(clip)
    with official.quiet():
        trainer.build_model()
    trainer.model.image_encoder = torch.nn.Identity()
    if hasattr(trainer, "zs_clip"):
        trainer.zs_clip.clip_model.encode_image = lambda images: images
    return trainer
