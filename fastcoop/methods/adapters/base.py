"""What the methods on image features have in common: stacked runs, chosen values, and classifiers that follow.

An adapter defines `fit`, which learns stacked runs (runs, ...), and what classifies: `class_weights` of logits that are
linear in images, or else `logits`, or `scorer` where many values are tried. Runs are stacked where all settings that
are not floats are equal, and each has the result that it has alone, to rounding.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from fastcoop.errors import UserError
from fastcoop.methods.adapters.selection import Judge, Selection, drawn_for
from fastcoop.methods.adapters.stack import Stack, Texts, Weights, normalized
from fastcoop.methods.base import Done, Method, MethodSettings, Outcome, RunContext, sharing
from fastcoop.methods.data import Data, known_classes, matching_classes
from fastcoop.methods.late import Backbone, Tensor, fresh_state, torch
from fastcoop.methods.scores import Classifier, LinearClassifier
from fastcoop.methods.spec import RunSpec

# Of the tensors of runs that are learned at once. With more, steps are no faster on a CPU.
STACK_BYTES = {"cpu": 72 << 20, "cuda": 512 << 20}
TEST_BYTES = 64 << 20  # of the tensors of images that are classified at once


class AdapterSettings(MethodSettings):
    """Settings of a method with values that are given or chosen.

    Attributes:
        selection: What values that are not given are chosen on. "fixed": nothing, they have their documented defaults.
            "few_val": min(shots, 4) validation images per class, by CoOp's rule. "shots_val": as many as training
            images, by LP++'s. "full_val": the whole validation split. "imagenet_val": that of ``tuned_on``, where the
            same shots and seed are learned first. "official": as in the official code, which looks at test labels.
        tuned_on: Dataset of "imagenet_val", which the grid names too.
    """

    selection: Selection = "few_val"
    tuned_on: str = "imagenet"

    def unused(self) -> Mapping[str, str | None]:
        if self.selection == "imagenet_val":
            return {}
        return {"tuned_on": "tuned_on is the dataset of selection: imagenet_val; leave it out"}


S = TypeVar("S", bound=MethodSettings)


@dataclass(frozen=True, eq=False)
class Fitted:
    """What `Adapter.fit` learned.

    Attributes:
        weights: Float tensors (runs, ...), or int64 labels; what `Adapter.logits` reads, besides values.
        losses: float32 (runs, epochs), of trained methods.
        trained: Names of those weights that were trained by steps.
        extra: Further numbers per run, (runs,) by name, such as "epoch".
        accuracy: Accuracy that settings to try are compared by, (runs,), of methods that have chosen an epoch and
            search no values; None to measure it.
    """

    weights: Weights
    losses: Tensor | None = None
    trained: tuple[str, ...] = ()
    extra: Weights = field(default_factory=dict)
    accuracy: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Row:
    """A run with one of the settings that it tries, and then what it learned. ``order``: among all rows.

    ``selection`` is that of the run, before the settings that it tries were set.
    """

    index: int
    order: int
    selection: Selection
    run: RunSpec[Any]
    tried: Mapping[str, Any]
    accuracy: float = math.nan
    outcome: Outcome = field(default_factory=lambda: Outcome({}))

    @property
    def rank(self) -> tuple[float, int]:
        """Is highest for the best of a run's rows: by accuracy, then the first. A row that diverged is the last."""
        return self.accuracy if self.outcome.status == "done" else -1.0, -self.order


class Adapter(Method[S]):
    """A method on frozen image features, and text features of each dataset's own prompt.

    Attributes:
        values: The floats that are chosen where a setting is None, and their defaults. Each is a setting of that name,
            and a weight (runs,).
        chooses_epoch: Whether runs choose an epoch, so that something is left to choose if all values are given.
        by_class: Names of weights with an axis of classes after that of runs, for `carry`. Classes that a run has not
            learned have the text feature "raw" or "unit" there, or zeros ("").
        mixes: Whether logits of classes that a run has learned compare with those of others. If not, it has learned no
            class of a dataset that has others too: one shared class would get all images, or none.
    """

    needs_backbone = False
    reads_prompt = True
    runs_together = True
    values: ClassVar[Mapping[str, float]] = {}
    chooses_epoch: ClassVar[bool] = False
    by_class: ClassVar[Mapping[str, Literal["raw", "unit", ""]]] = {}
    mixes: ClassVar[bool] = True

    # What an adapter defines.

    def fit(self, stack: Stack, judge: Judge | None) -> Fitted:
        """Learn runs. ``judge``: images to choose an epoch on, with `BestEpoch`; None if nothing is chosen."""
        raise NotImplementedError

    def class_weights(self, weights: Weights, texts: Texts) -> tuple[Tensor, Tensor | None]:
        """Return W (runs, classes, dim) and b (runs, classes), or None, of a linear method.

        The logits of image features x of length 1 are ``texts.scale * x @ W.T + b``.
        """
        raise NotImplementedError

    def logits(self, weights: Weights, images: Tensor, texts: Texts) -> Tensor:
        """Return logits (runs, images, classes) of raw features (runs, images, dim)."""
        W, b = self.class_weights(weights, texts)
        found = texts.scale * normalized(images) @ W.mT
        return found if b is None else found + b[:, None]

    def scorer(self, weights: Weights, images: Tensor, texts: Texts) -> Callable[..., Tensor]:
        """Return a function from all of `values`, (runs,) by name, to new logits. It computes once what they share."""
        return lambda **values: self.logits({**weights, **values}, images, texts)

    def searched(self, settings: S) -> Mapping[str, Sequence[float]]:
        """Return the numbers that are tried for each of `values`."""
        return {}

    def tries(self, run: RunSpec[S]) -> Sequence[Mapping[str, Any]]:
        """Return the settings, changed from the given ones, that a run which chooses learns with and compares."""
        return ({},)

    def settle(self, weights: Weights, texts: Texts) -> Weights:
        """Return what runs keep of what they learned, once their values are chosen."""
        return weights

    def carry(self, weights: Weights, rows: Tensor, texts: Texts) -> Weights:
        """Return what a run learned for the classes of another dataset.

        Args:
            weights: (1, ...), of a run.
            rows: int64 (classes,), the run's label of each class; -1 for classes that it has not learned.
            texts: Of the other dataset.
        """
        carried = {}
        for name, text in self.by_class.items():
            learned = weights[name][:, rows.clamp(min=0)]
            known = (rows >= 0).view(-1, *[1] * (learned.ndim - 2))
            carried[name] = learned.where(known, getattr(texts, text) if text else 0.0)
        return weights | carried

    def chooses(self, settings: S) -> bool:
        """Return whether something is left to choose."""
        return self.chooses_epoch or any(getattr(settings, name) is None for name in self.values)

    def chosen(self, extra: Mapping[str, float]) -> dict[str, Any]:
        """Return the settings of ``imagenet_val`` that a run's ``Outcome.extra`` on that dataset stands for."""
        return {name: extra[name] for name in self.values}

    def official_split(self, data: Data, what: Literal["values", "epoch"]) -> Literal["val", "test"]:
        """Return the split that the official code chooses on, of ``selection: official``."""
        return "test" if data.name.partition(":")[0] == "imagenet" else "val"

    def run_bytes(self, images: int, views: int, classes: int, dim: int) -> int:
        """Return about how many bytes a stacked run needs to learn."""
        return 4 * images * (3 * (1 + views) * dim + 6 * classes)

    def image_bytes(self, weights: Weights, texts: Texts) -> int:
        """Return about how many bytes an image that is classified needs, by each run."""
        rows = max((one.shape[1] for one in weights.values() if one.ndim > 1), default=0)
        return 12 * (rows + sum(texts.raw.shape))

    # What follows.

    @property
    def kind(self) -> str:
        """The kind of features that runs learn from."""
        return self.kinds[0]

    def selection(self, settings: S) -> Selection:
        """Return what the values of such runs are chosen on; "fixed" if nothing is left to choose."""
        given: Selection = getattr(settings, "selection", "fixed")
        return given if given == "fixed" or self.chooses(settings) else "fixed"

    def validation_choice(self, settings: S) -> tuple[str, str] | None:
        if self.selection(settings) in ("fixed", "imagenet_val"):
            return None
        return f"the values of {self.name}", f"set selection of {self.name} to fixed"

    def tuned_on(self, settings: S) -> str | None:
        return getattr(settings, "tuned_on", "") if self.selection(settings) == "imagenet_val" else None

    def check(self, run: RunSpec[S]) -> None:
        super().check(run)
        if run.has_learned:
            return
        name = self.tuned_on(run.settings)
        if name is not None and (run.tuning is None or "val" not in run.tuning.dataset.splits):
            raise UserError(
                f"selection: imagenet_val of {self.name} learns on {name} first and chooses on its validation images; "
                f"name a dataset {name} with a val split in the grid, or set selection to another protocol."
            )

    def key_settings(self, run: RunSpec[S], backbone: Backbone) -> dict[str, Any]:
        views = run.data.views
        # Of the kind "flip", the images learned from: the test-time crop, and the mirrored one unless views are 0.
        resolved: dict[str, Any] = {"views": 1 + bool(views) if self.kind == "flip" else views}
        if hasattr(run.settings, "selection"):
            resolved["selection"] = self.selection(run.settings)
            resolved["tuned_on"] = None
        if (data := run.tuning) is not None:
            features = data.store.digest if data.store else data.name
            resolved["tuned_on"] = [data.dataset.digest, features, data.dataset.template]
        return super().key_settings(run, backbone) | resolved

    def read_draw(self, run: RunSpec[S]) -> np.ndarray | None:
        from fastcoop.datasets import few_shot

        if run.tuning is None:
            return None
        rows = run.tuning.subset(run.shots, run.seed).train
        drawn = few_shot(run.tuning.dataset, run.shots, run.seed, read=False).train
        return None if np.array_equal(rows, drawn) else rows

    def columns(self, run: RunSpec[S], backbone: Backbone) -> dict[str, Any]:
        return {"selection": self.selection(run.settings)}

    def classifier(self, backbone: Backbone, run: RunSpec[S], data: Data) -> Classifier:
        if self.is_class_specific(run.settings):
            matching_classes(run.data, data)  # refuses classes that the run has not learned
        with fresh_state():
            texts = Texts.of(backbone, data)
            learned = run.weights.items()
            weights = {name: torch.as_tensor(one)[None].to(backbone.device) for name, one in learned}
            rows = known_classes(run.data, data)
            if not self.mixes and (rows < 0).any():
                rows.fill(-1)
            if not np.array_equal(rows, np.arange(len(run.data.class_names))):
                weights = self.carry(weights, torch.from_numpy(rows).to(backbone.device), texts)
            if type(self).class_weights is Adapter.class_weights:
                return AdapterClassifier(self, weights, texts)
            W, b = self.class_weights(weights, texts)
            bias = None if b is None else b[0].cpu().numpy()
            return LinearClassifier(W[0].cpu().numpy(), bias, texts.scale, unit_length=True)

    def run(self, backbone: Backbone, runs: Sequence[RunSpec[S]], done: Done, context: RunContext) -> None:
        known = [index for index, run in enumerate(runs) if run.has_learned]
        learned = [_Row(index, 0, "fixed", runs[index], {}) for index in known]
        pending = {index: run for index, run in enumerate(runs) if not run.has_learned}
        for rows in itertools.chain([learned], self._learn_all(backbone, pending, context)):
            start = time.perf_counter()
            tests, outcomes = [runs[row.index] for row in rows], [row.outcome for row in rows]
            with fresh_state():
                scores = self.scores_of(backbone, tests, outcomes)
            tested = (time.perf_counter() - start) / max(1, len(rows))
            for row, of_run in zip(rows, scores, strict=True):
                seconds = 0.0 if row.run.has_learned else row.outcome.seconds + tested
                done(row.index, replace(row.outcome, scores=of_run, seconds=seconds))
                if row.run.has_learned:
                    context.on_progress(1.0)

    def _learn_all(
        self, backbone: Backbone, runs: Mapping[int, RunSpec[S]], context: RunContext
    ) -> Iterator[list[_Row]]:
        """Yield runs that finish together, each with the best of the settings that it tries, without scores."""
        rows: list[_Row] = []
        tuned = self._tuned(backbone, runs, context)
        for index, run in runs.items():
            settings = run.settings.model_copy(update=tuned.get(index))
            selection = self.selection(settings)
            for tried in self.tries(run) if selection != "fixed" else (tuned.get(index, {}),):
                tried_run = replace(run, settings=settings.model_copy(update=dict(tried)))
                rows.append(_Row(index, len(rows), selection, tried_run, tried))
        most = STACK_BYTES[str(backbone.device).partition(":")[0]]
        tries = Counter(row.index for row in rows)
        left, best, seconds = tries.copy(), dict[int, _Row](), dict[int, float]()
        for part in self._stacks(rows, min(context.memory_budget or most, most)):
            finished = []
            with sharing(context.on_progress, sum(1 / tries[row.index] for row in part)):
                learned = [*self._learn_stack(backbone, part)]
            for row in learned:
                index, known = row.index, best.get(row.index)
                seconds[index] = seconds.get(index, 0.0) + row.outcome.seconds
                if known is None or row.rank > known.rank:
                    best[index] = row
                left[index] -= 1
                if not left[index]:
                    row = best.pop(index)
                    finished.append(replace(row, outcome=replace(row.outcome, seconds=seconds[index])))
            yield finished

    def _tuned(
        self, backbone: Backbone, runs: Mapping[int, RunSpec[S]], context: RunContext
    ) -> dict[int, dict[str, Any]]:
        """Return the changed settings of each run of ``imagenet_val``: what an equal run on that dataset chose."""
        elsewhere: dict[Any, list[int]] = {}
        for index, run in runs.items():
            if self.tuned_on(run.settings) is not None:
                elsewhere.setdefault((run.settings, run.shots, run.seed), []).append(index)
        tuning = {}
        for indices in elsewhere.values():
            run = runs[indices[0]]
            assert run.tuning is not None
            tuning[indices[0]] = replace(
                run, data=run.tuning, dataset=run.tuning.name, subset=run.tuning.subset(run.shots, run.seed),
                settings=run.settings.model_copy(update={"selection": "full_val"}),
            )  # fmt: skip
        parts = self._learn_all(backbone, tuning, RunContext(context.memory_budget)) if tuning else ()
        found = {row.index: row for part in parts for row in part}
        tuned: dict[int, dict[str, Any]] = {}
        for indices in elsewhere.values():
            row, given = found[indices[0]], dict(runs[indices[0]].settings)
            chosen = {**row.tried, **self.chosen(row.outcome.extra), "selection": "fixed"}
            changed = {name: value for name, value in chosen.items() if value != given[name]}
            tuned |= dict.fromkeys(indices, changed)
        return tuned

    def _stacks(self, rows: Sequence[_Row], budget: int) -> Iterator[list[_Row]]:
        """Yield rows that are learned together: of equal data, shots, shape, search, and settings but floats."""
        groups: dict[Any, list[_Row]] = {}
        for row in rows:
            run, selection = row.run, row.selection
            settings = [(name, float if isinstance(v, float) else str(v)) for name, v in run.settings]
            drawn = () if selection in ("fixed", "official") else drawn_for(run, selection)
            images = len(run.data.readable("train", run.subset.train))
            shape = images, run.shots, len(run.data.readable("val", np.array(drawn, np.int64)))
            searched = [tuple(numbers) for numbers in self.searched(run.settings).values()]
            groups.setdefault((*shape, id(run.data), selection, *settings, *searched), []).append(row)
        for (images, *_others), group in groups.items():
            texts = len(group[0].run.data.class_names)
            dim = group[0].run.data.train_views(group[0].run.subset, self.kind)[0].shape[-1]
            size = max(1, budget // self.run_bytes(images, group[0].run.data.views, texts, dim))
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def _learn_stack(self, backbone: Backbone, rows: Sequence[_Row]) -> Iterator[_Row]:
        """Learn stacked rows, and yield each with its outcome, without scores."""
        start = time.perf_counter()
        with fresh_state():
            stack = Stack.of(backbone, [row.run for row in rows], self.kind)
            selection = rows[0].selection
            official = selection == "official"
            data = stack.runs[0].data
            splits = [official and self.official_split(data, what) for what in ("epoch", "values")]
            judge = Judge.of(self, stack, selection, on_test=splits[0] == "test")
            fitted = self.fit(stack, judge)
            weights, extra = fitted.weights | self.given(stack), dict(fitted.extra)
            if splits[0] != splits[1]:
                judge = Judge.of(self, stack, selection, on_test=splits[1] == "test")
            accuracy = torch.full((len(rows),), math.nan)
            if judge is not None:
                tried = self.searched(stack.settings).items()
                searched = {name: numbers for name, numbers in tried if getattr(stack.settings, name) is None}
                if searched or fitted.accuracy is None:
                    values, accuracy = judge.search(weights, searched)
                    weights |= values
                else:
                    accuracy = fitted.accuracy
                if not official:
                    extra["val_accuracy"] = accuracy
            extra |= {name: weights[name] for name in self.values}
            weights = self.settle(weights, stack.texts)
        trained = sum(weights[name][0].numel() for name in fitted.trained)
        kept = {name: one.cpu().numpy() for name, one in weights.items()}
        losses = None if fitted.losses is None else fitted.losses.cpu().numpy()
        seconds = (time.perf_counter() - start) / len(rows)
        for place, row in enumerate(rows):
            learned = {name: np.array(array[place]) for name, array in kept.items()}
            loss = None if losses is None else losses[place]
            numbers = {name: float(one) for name, one in row.tried.items() if isinstance(one, int | float)}
            numbers |= {name: float(one[place]) for name, one in extra.items()}
            numbers["trained_parameters"] = float(trained)
            outcome = Outcome.learned(loss, weights=learned, seconds=seconds, extra=numbers)
            yield replace(row, accuracy=float(accuracy[place]), outcome=outcome)

    def given(self, stack: Stack) -> Weights:
        """Return each of `values`, (runs,): the setting, or its default where that is None."""
        return {name: stack.value(name, default) for name, default in self.values.items()}


@dataclass(frozen=True, eq=False)
class AdapterClassifier:
    """The classifier of a run whose logits are no linear function of image features.

    Attributes:
        adapter: The method.
        weights: What the run learned, (1, ...), for the classes of ``texts``.
        texts: Of the classes.
    """

    adapter: Adapter[Any]
    weights: Weights
    texts: Texts
    unit_length: ClassVar[bool] = False  # it reads raw features

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return logits float32 (images, classes) of raw features (images, dim)."""
        values = {name: self.weights[name] for name in self.adapter.values}
        size = max(1, TEST_BYTES // self.adapter.image_bytes(self.weights, self.texts))
        found = [np.zeros((0, len(self.texts)), np.float32)]
        with fresh_state(), torch.no_grad():
            for start in range(0, len(features), size):
                some = features[None, start : start + size]
                images = torch.tensor(some, dtype=torch.float32, device=self.texts.raw.device)
                logits = self.adapter.scorer(self.weights, images, self.texts)
                found.append(logits(**values)[0].cpu().numpy())
        return np.concatenate(found)
