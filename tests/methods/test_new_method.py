"""Adding a method is one class and one registration: grids, sweeps, results, evaluate and reports then have it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcoop.backbones import Backbone
from fastcoop.engine import PromptEncoder
from fastcoop.methods import METHODS, Data, LinearClassifier, Method, MethodSettings, Outcome, RunSpec, unit
from fastcoop.methods.estimators import MethodClassifier
from fastcoop.prompts import PromptLayout
from fastcoop.reports import report
from fastcoop.results import load_results
from fastcoop.sweeps import evaluate, sweep
from tests.methods.conftest import job, make_data, run
from tests.reference import reference_features
from tests.small_world import write_backbone, write_dataset


def nearest_mean() -> dict[str, Any]:
    """The names in the example of CONTRIBUTING.md."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"__name__": "nearest_mean"}
    exec(compile(code, "nearest_mean.py", "exec"), names)
    return names


def test_the_example_is_the_nearest_mean_and_an_estimator(
    backbone: Backbone, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "nearest_mean", nearest_mean()["NearestMeanMethod"]())
    (outcome,) = run(backbone, "nearest_mean", [job(data, "nearest_mean", shots=4)])
    features, labels = data.train(data.subset(4, 1))
    images = features[:, 0] / np.linalg.norm(features[:, 0], axis=1, keepdims=True)
    means = np.stack([images[labels == label].mean(0) for label in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    expected = (data.unit_test @ means.T).argmax(1)
    assert (outcome.scores["animals"].predictions == expected).all()

    class NearestMean(MethodClassifier, method="nearest_mean"):
        pass

    fitted = NearestMean(shrink=0.0).fit(features, labels)
    assert (fitted.predict(data.test[0]) == expected).all()
    assert NearestMean().get_params() == {"backbone": None, "shrink": 0.0, "seed": 1}
    seen = labels > 0
    fitted = NearestMean().fit(features[seen], labels[seen], class_names=data.class_names)
    assert set(fitted.predict(data.test[0])) == {1, 2}  # never a class without images


@pytest.mark.usefixtures("undrawn")
def test_a_new_method_goes_through_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "nearest_mean", nearest_mean()["NearestMeanMethod"]())
    write_dataset(tmp_path / "data" / "colours")
    write_dataset(tmp_path / "data" / "again", train=0, val=0, seed=1)
    places = {"data_root": tmp_path / "data", "cache": tmp_path / "cache"}
    grid = {
        "backbones": str(write_backbone(tmp_path / "tiny")), "datasets": "colours", "shots": [1, 2], "seeds": [1, 2],
        "views": 0,
        "methods": {
            "zero_shot": None, "nearest_mean": {"shrink": [0.0, 0.3]},
            "coop": {"prompt": "[V]x2 [CLASS], seen.", "epochs": 1},
        },
    }  # fmt: skip
    summary = sweep(grid, results=tmp_path / "results", jobs=1, **places)
    assert (summary.runs, summary.finished) == (13, 13)
    assert sweep(grid, results=tmp_path / "results", jobs=1, **places).finished == 0
    rows = load_results(tmp_path / "results").query("method == 'nearest_mean'")
    assert len(rows) == 8
    assert set(rows.label) == {"Nearest mean", "Nearest mean (shrink 0.3)"}
    tested = evaluate(tmp_path / "results", ["again"], backbones=[grid["backbones"]], **places)
    assert len(tested) == 13
    written = report(tmp_path / "results", tmp_path / "report")
    page = next(path for path in written if path.name == "index.html").read_text(encoding="utf-8")
    assert "Nearest mean (shrink 0.3)" in page
    assert "[V]x2 [CLASS], seen." in page
    assert "nearest mean" in (tmp_path / "report" / "figure3.md").read_text(encoding="utf-8")


class SeveralSettings(MethodSettings):
    prompts: int = 3
    apart: float = 0.5


class SeveralPrompts(Method[SeveralSettings]):
    """Several contexts per run, whose class features are averaged, and a second loss that keeps them apart.

    All that it takes of the engine is the differentiable encoder: the prompts are its runs.
    """

    name = "several_prompts"
    Settings = SeveralSettings
    layout = PromptLayout(2)

    def label(self, settings: SeveralSettings) -> str:
        return f"{settings.prompts} prompts"

    def classifier(self, backbone: Backbone, one: RunSpec, data: Data) -> LinearClassifier:
        encoder = PromptEncoder(backbone, data.class_names, self.layout)
        with torch.no_grad():
            texts = self.mean_features(encoder(torch.from_numpy(one.weights["prompts"])))[0].numpy()
        return LinearClassifier.of_texts(texts, backbone.logit_scale)

    @staticmethod
    def mean_features(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class features (classes, dim) and how alike the prompts' are, of features (prompts, classes, dim)."""
        units = torch.nn.functional.normalize(features, dim=-1)
        return torch.nn.functional.normalize(units.mean(0), dim=-1), (units.mean(0) ** 2).sum(-1).mean()

    def learn(self, backbone: Backbone, one: RunSpec) -> Outcome:
        features, labels = one.data.train(one.subset)
        images, targets = torch.from_numpy(unit(features[:, 0])), torch.from_numpy(labels)
        draw = torch.Generator().manual_seed(one.seed)
        contexts = 0.3 * torch.randn(one.settings.prompts, 2, backbone.text.width, generator=draw)
        contexts.requires_grad_()
        optimiser = torch.optim.SGD([contexts], lr=0.05)
        encoder, losses = PromptEncoder(backbone, one.data.class_names, self.layout), []
        for _ in range(12):
            weights, alike = self.mean_features(encoder(contexts))
            loss = torch.nn.functional.cross_entropy(10 * images @ weights.T, targets)
            loss = loss + one.settings.apart * alike
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return Outcome({}, np.array(losses, np.float32), weights={"prompts": contexts.detach().numpy()})


@pytest.mark.parametrize("apart", [0.0, 2.0])
def test_several_prompts_and_an_added_loss_need_the_encoder_alone(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, apart: float
) -> None:
    monkeypatch.setitem(METHODS, "several_prompts", SeveralPrompts())
    data: Data = make_data(views=0)
    (outcome,) = run(backbone, "several_prompts", [job(data, "several_prompts", apart=apart)])
    assert outcome.losses[-1] < outcome.losses[0]
    plain = [
        reference_features(backbone.model, backbone.tokenizer, data.class_names, torch.from_numpy(c), "end")
        for c in outcome.weights["prompts"]
    ]
    texts = SeveralPrompts.mean_features(torch.stack(plain))[0].numpy()
    assert (outcome.scores["animals"].predictions == (data.unit_test @ texts.T).argmax(1)).all()


def test_prompts_that_an_added_method_may_learn_from_are_in_its_key(backbone: Backbone) -> None:
    class Prompted(nearest_mean()["NearestMeanMethod"]):  # type: ignore[misc]
        def prompts(self, settings: MethodSettings, data: Data) -> tuple[str, ...]:
            return (data.dataset.template,)

    data, method = make_data(), Prompted()
    other = replace(data, dataset=replace(data.dataset, template="a drawing of a {}."))
    keys = [method.key_settings(job(one, "linear_probe"), backbone) for one in (data, other)]
    assert keys[0] != keys[1]
    plain = METHODS["linear_probe"].key_settings(job(data, "linear_probe"), backbone)
    assert plain == {"iterations": 1000, "search_steps": 8}
