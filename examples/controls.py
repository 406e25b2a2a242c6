"""A generator beside its controls: what the codec, the public prior and the privacy each cost.

Accuracy on real test images of a fixed kind of classifier, trained on images from different sources. Run by train.py
when a config has an `evaluation` section. Only the first two figures are free of the private training images; the rest
are computed from them outside of any guarantee, so they are printed for the owner of the data and kept off the card.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from job_config import opened
from pretrain import Rows
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_spectral_dp import DPSpectralPipeline, SpectralConfig
from hf_spectral_dp.assessment import draw_images, shown
from hf_spectral_dp.image_sources import source_name
from hf_spectral_dp.metrics.utility import classifier_accuracy
from hf_spectral_dp.pipeline_spectral import SAMPLING_VALUES
from hf_spectral_dp.private_marks import UNRECORDED, marks
from hf_spectral_dp.real_images import read_real_images
from hf_spectral_dp.token_store import TokenStore

Labelled = tuple[Tensor, Tensor]
CLASSIFIERS = 3  # trained from different random weights on the same images; the mean and the range are given


def real_images(section: dict[str, Any], processor: Any, config: SpectralConfig) -> Labelled:
    """All images of a split that can be read, cropped as the pipeline crops: (N, C, H, W) in [-1, 1], and labels (N,).

    Raises:
        ValueError: a column that is missing, a label that is no class of the model, or no image that can be read.
    """
    found = read_real_images(
        opened(section), processor,
        f"{section['source']}, split {section['split']}",
        image_column=section.get("image_column", "image"), label_column=section.get("label_column", "label"),
        class_names=config.class_names, limit=None,
    )  # fmt: skip
    found.check_fits(config)
    assert found.labels is not None  # their column was named
    return processor.postprocess(found.pixels, "pt") * 2 - 1, found.labels


def through_codec(pipeline: DPSpectralPipeline, store: TokenStore) -> Labelled:
    """The private images as well as the tokens and the super-resolution can show them, with views one of each image."""
    rows = store[range(len(store))]["input_ids"]
    return shown(pipeline, rows[:, 1:]), pipeline.model.labels_of(rows[:, 0])


def generated(pipeline: DPSpectralPipeline, model: Any, each: int) -> Labelled:
    """`each` images per class from `model`, through the rest of `pipeline`."""
    images, labels = draw_images(pipeline, model, each * model.config.num_classes, seed=0, batch_size=500)
    assert labels is not None  # a model with classes
    return images, labels


def trained_without_privacy(model: Any, store: TokenStore, epochs: float, folder: Path, use_cpu: bool) -> Any:
    """The twin: the same model and rows, ordinary training. Never published."""
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=5e-4,
        lr_scheduler_type="cosine", save_strategy="no", logging_strategy="no", report_to="none", use_cpu=use_cpu,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Rows(store, model.config, class_dropout=0.0)).train()
    model.config.private_runs = [UNRECORDED]  # so that no script takes it for a public one
    return model.cpu().eval()


def compare(
    section: dict[str, Any],
    data: dict[str, Any],
    pipeline: DPSpectralPipeline,
    prior: Any,
    detail: Any,
    store: TokenStore,
    args: Any,
    test: Labelled,
) -> list[dict[str, Any]]:
    """Prints the accuracies and returns the rows that may stand on the card.

    Args:
        section: the config's `evaluation`; data: the config's `data`.
        pipeline: the trained pipeline; prior, detail: the model and super-resolution that it started from, which are
            no floor where an earlier private run made them.
        store: the private token rows; args: the training arguments.
        test: `real_images` of the section, read before anything was spent.
    """
    each = section.get("images_per_class", 1000)
    test_images, test_labels = test
    columns = {name: section[name] for name in ("image_column", "label_column") if name in section}
    sampling = {name: pipeline.config[name] for name in SAMPLING_VALUES}
    floor = DPSpectralPipeline(pipeline.model, pipeline.image_processor, detail, critic=pipeline.critic, **sampling)

    def twin() -> Labelled:
        folder = Path(args.output_dir).with_name("twin")
        epochs = section.get("twin_epochs", 15)
        model = trained_without_privacy(copy.deepcopy(prior), store, epochs, folder, args.use_cpu)
        model.save_pretrained(folder)  # for examples/evaluate.py --twin; never to be published
        return generated(pipeline, model, each)

    publishable: dict[str, Callable[[], Labelled]] = {
        f"images generated at epsilon {args.target_epsilon:g}": lambda: generated(pipeline, pipeline.model, each),
    }
    if not marks(prior, detail):  # what an earlier run made is no public model
        publishable["floor: images of the public model (epsilon 0)"] = lambda: generated(floor, prior, each)
    private: dict[str, Callable[[], Labelled]] = {
        "twin: images of a model trained without privacy": twin,
        "ceiling: real training images through the codec": lambda: through_codec(pipeline, store),
        "real training images": lambda: real_images({**columns, **data}, pipeline.image_processor, prior.config),
    }
    name = f"{source_name(section['source'])}, split {section['split']}"
    print(f"accuracy on {len(test_labels)} real test images ({name}) of a classifier trained on", flush=True)
    rows = []
    for title, source in (publishable | private).items():
        images, labels = source()
        steps = section.get("classifier_steps", 400)
        accuracies = [
            classifier_accuracy(images, labels, test_images, test_labels, steps, seed=seed)
            for seed in range(CLASSIFIERS)
        ]
        accuracy, spread = fmean(accuracies), f"{min(accuracies):.1%} to {max(accuracies):.1%}"
        mark = "" if title in publishable else "   (computed from private images: do not publish)"
        print(f"  {title:<50} {accuracy:6.1%}  ({spread}){mark}", flush=True)
        if title in publishable:
            rows.append(
                {
                    "dataset": name,
                    "metric": f"accuracy of a classifier trained on {title}",
                    "value": round(accuracy, 4),
                    "low": round(min(accuracies), 4),
                    "high": round(max(accuracies), 4),
                    "n": len(test_labels),
                    "private": True,
                    "accounted": False,
                    "note": f"{len(labels)} training images; mean and range of {CLASSIFIERS} classifiers",
                }
            )
    return rows
