"""A study from Python, from pictures to a classifier. It needs data/photos with one folder per class."""

# %% Load a dataset
import torch

import fastcoop as fc

dataset = fc.load_dataset("photos", "data")
print(f"{dataset.name}: {', '.join(dataset.class_names)}")
print({split: len(images) for split, images in dataset.splits.items()}, "images")

# %% Load a frozen backbone: a name, MODEL:TAG or a folder, as in the commands
backbone = fc.backbone_from_spec("RN50")
print(backbone.name, backbone.digest[:12], "text width", backbone.text.width)

# %% Compute image features once. Later calls add only what is missing.
path = fc.cache_features(backbone, dataset, "cache", shots=[1, 2], seeds=[1, 2], views=2)
store = fc.FeatureStore.open(path)
features, labels = store.split("test")
print(f"{path}: {len(labels)} test images with {features.shape[1]} features each")

# %% Run a sweep. The grid is the content of a grid file; lists are crossed.
grid = {
    "backbones": "RN50",
    "datasets": "photos",
    "shots": [1, 2],
    "seeds": [1, 2],
    "views": 2,
    "methods": {
        "zero_shot": None,
        "linear_probe": None,
        "coop": {"context_length": 4, "class_position": ["end", "mid"], "epochs": 10},
    },
}
summary = fc.sweep(grid, data_root="data", cache="cache", results="results/study")
print(f"{summary.finished} runs in {summary.seconds:.0f} s")

# %% Read the results: a pandas frame with one row per run and test dataset
frame = fc.load_results("results/study")
print(frame.pivot_table(index="label", columns="shots", values="accuracy"))

# %% Read the predictions of one run for every test image
best = frame[frame.method == "coop"].sort_values("accuracy").iloc[-1]
predictions = fc.load_predictions("results/study", best.key)
wrong = predictions.labels != predictions.predicted
print(f"{best.label}, shots: {best.shots}; {wrong.sum()} of {len(wrong)} wrong")

# %% Find the words nearest to its context vectors (Table 4)
contexts = torch.from_numpy(fc.load_contexts("results/study", best.key))  # (M, width)
words = fc.nearest_words(backbone, contexts, k=3)
print(words.words)

# %% Write figures, tables, the checks of the paper's claims, and one page with all of them
written = fc.report("results/study", "reports/study")
print(written[0])

# %% Save a classifier in one file and predict with it
classifier = fc.make_classifier(fc.find_run("results/study", best.key), backbone)
classifier.save("classifier.safetensors")
pictures = [dataset.root / name for name in dataset.splits["test"].paths[:4]]
for prediction in fc.predict(classifier, backbone, pictures):
    assert prediction.probabilities is not None
    print(prediction.path.name, classifier.class_names[int(prediction.probabilities.argmax())])

# %% Use the engine alone: prompts of several layouts and class lists in one differentiable call
unified = fc.PromptLayout(context_length=4, class_position="end")
specific = fc.PromptLayout(context_length=4, class_position="mid", class_specific=True)
items = [
    (dataset.class_names, unified, fc.initial_contexts(backbone, unified, len(dataset.class_names), seed=1)),
    (["a", "b", "c"], specific, fc.initial_contexts(backbone, specific, 3, seed=2).requires_grad_()),
]
first, second = fc.encode_prompts(backbone, items)
second.sum().backward()
print(first.shape, second.shape, items[1][2].grad.shape)

# %% Train many runs at once on your own features
few = fc.few_shot(dataset, 2, seed=1)
images, shot_labels = store.train(few.train), store.train_labels(few.train)  # (images, views, dim), (images,)
runs = [
    fc.Run(
        dataset.class_names,
        unified,
        fc.initial_contexts(backbone, unified, len(dataset.class_names), seed=seed),
        images,
        shot_labels,
        epochs=5,
        seed=seed,
    )
    for seed in (1, 2, 3)
]
for run, trained in zip(runs, fc.train(backbone, runs), strict=True):
    print(
        run.seed, tuple(trained.contexts.shape), f"loss {trained.losses[0]:.2f} to {trained.losses[-1]:.2f}"
    )
