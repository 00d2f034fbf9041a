"""What the official codes need to run here: on a CPU, in float32, without the packages that only read images."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

Edits = Sequence[tuple[str, str]]  # of a file's text: old, new


def use_cpu() -> None:
    """Keep tensors on the CPU and in float32 where the official codes move them to a GPU or to float16."""
    torch.set_num_threads(1)
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *given, **more: self
    torch.Tensor.half = lambda self, *given, **more: self.float()
    torch.cuda.empty_cache = lambda: None
    torch.optim.lr_scheduler._LRScheduler = Scheduler


class Scheduler(torch.optim.lr_scheduler.LRScheduler):
    """torch's, with the argument ``verbose`` that older code passes."""

    def __init__(self, optimizer: Any, last_epoch: int = -1, verbose: bool = False):
        super().__init__(optimizer, last_epoch)


def stub(name: str, **members: Any) -> ModuleType:
    """Make a module that is imported as ``name``; other modules can be loaded below it."""
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(members)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules.setdefault(parent, ModuleType(parent)), child, module)
    return module


def stub_clip() -> None:
    """Stand in for OpenAI's package, of which nothing is used."""
    stub("clip").clip = stub("clip.clip")
    stub("clip.simple_tokenizer", SimpleTokenizer=lambda: None)


def load(name: str, path: Path, edits: Edits = ()) -> ModuleType:
    """Import a file as ``name``, with passages of its text replaced."""
    text = path.read_text()
    for old, new in edits:
        if text.count(old) != 1:
            raise SystemExit(f"{path} is not as in the commit that it is compared at; check that out.")
        text = text.replace(old, new)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    sys.modules[name] = module
    exec(compile(text, str(path), "exec"), vars(module))
    return module


def functions(path: Path, *names: str, **known: Any) -> dict[str, Any]:
    """Return only some functions or classes of a file, whose imports are ``known``."""
    wanted = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in names]
    exec(compile(ast.Module(wanted, []), str(path), "exec"), known)
    return known


def reads_arrays_as_numbers(*modules: ModuleType) -> None:
    """Let modules call float() on an array of one number, which NumPy no longer does."""
    for module in modules:
        module.float = lambda number: float(np.asarray(number).reshape(-1)[0])


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keep what is printed, and return it."""
    kept = io.StringIO()
    with contextlib.redirect_stdout(kept), contextlib.redirect_stderr(kept):
        yield kept


# Dassl: its trainer's methods, optimizers and learning rates, without its readers of images.


def stub_dassl(folder: Path, optimizer_edits: Edits = ()) -> None:
    """Make the parts of Dassl that trainers import, from its checkout."""
    root = folder / "dassl"
    known = {
        "torch": torch,
        "OrderedDict": OrderedDict,
        "tolist_if_not": lambda one: one if isinstance(one, list) else [one],
    }
    base = functions(root / "engine/trainer.py", "TrainerBase", **known)["TrainerBase"]
    trainer = type("TrainerX", (base,), {})
    registry = SimpleNamespace(register=lambda: lambda cls: cls)
    stub("dassl.engine", TRAINER_REGISTRY=registry, TrainerX=trainer, SimpleTrainer=trainer)
    stub(
        "dassl.metrics", compute_accuracy=lambda out, labels: [100 * (out.argmax(1) == labels).float().mean()]
    )
    meter = type("Meter", (), {"avg": 0.0, "meters": {}, "update": lambda self, *given: None})
    unused = dict.fromkeys(("load_pretrained_weights", "load_checkpoint"))
    stub("dassl.utils", AverageMeter=meter, MetricMeter=meter, **unused)
    package = stub("dassl.optim")
    package.__path__ = [str(root / "optim")]
    load("dassl.optim.radam", root / "optim/radam.py")
    optimizers = load("dassl.optim.optimizer", root / "optim/optimizer.py", optimizer_edits)
    package.build_optimizer = optimizers.build_optimizer
    schedulers = load("dassl.optim.lr_scheduler", root / "optim/lr_scheduler.py")
    package.build_lr_scheduler = schedulers.build_lr_scheduler


def optimizer_config(**given: Any) -> SimpleNamespace:
    """Return Dassl's configuration ``OPTIM``: its defaults, the official warm-up, and what is given."""
    defaults = {
        "NAME": "sgd", "LR": 0.002, "WEIGHT_DECAY": 5e-4, "MOMENTUM": 0.9, "SGD_DAMPNING": 0, "SGD_NESTEROV": False,
        "RMSPROP_ALPHA": 0.99, "ADAM_BETA1": 0.9, "ADAM_BETA2": 0.999, "STAGED_LR": False, "NEW_LAYERS": (),
        "BASE_LR_MULT": 0.1, "LR_SCHEDULER": "cosine", "STEPSIZE": (-1,), "GAMMA": 0.1, "MAX_EPOCH": 50,
        "WARMUP_EPOCH": 1, "WARMUP_TYPE": "constant", "WARMUP_CONS_LR": 1e-5, "WARMUP_MIN_LR": 1e-5,
        "WARMUP_RECOUNT": True,
    }  # fmt: skip
    return SimpleNamespace(**defaults | given)


def register(trainer: Any, name: str, module: torch.nn.Module, config: SimpleNamespace) -> None:
    """Give a trainer the optimizer and the learning rates of a module, as its ``build_model`` does."""
    optim = sys.modules["dassl.optim"]
    trainer.optim = optim.build_optimizer(module, config)
    trainer.sched = optim.build_lr_scheduler(trainer.optim, config)
    trainer.register_model(name, module, trainer.optim, trainer.sched)


def train(trainer: Any, epochs: Iterable[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> np.ndarray:
    """Run a trainer's ``forward_backward`` over batches of images and labels; return the mean loss of each epoch."""
    losses = []
    for batches in epochs:
        trainer.set_model_mode("train")
        trainer.num_batches, found = len(batches), []
        for trainer.batch_idx, (images, labels) in enumerate(batches):
            summary = trainer.forward_backward({"img": images, "label": labels})
            found.append(summary["loss"] if "loss" in summary else summary["xe_loss"])
        losses.append(np.mean(found))
    return np.array(losses)


def clip_of_features() -> SimpleNamespace:
    """Return as much of OpenAI's model as adapters read: an image tower that passes features on, and a scale of 100."""
    return SimpleNamespace(
        visual=torch.nn.Identity(), transformer=torch.nn.Identity(), ln_final=torch.nn.Identity(),
        positional_embedding=None, text_projection=None, dtype=torch.float32,
        logit_scale=torch.tensor(np.log(100.0), dtype=torch.float32), encode_image=lambda images: images.clone(),
    )  # fmt: skip


def replaced(module: ModuleType, **members: Any) -> SimpleNamespace:
    """Return a module's members with some of them replaced."""
    return SimpleNamespace(**vars(module) | members)
