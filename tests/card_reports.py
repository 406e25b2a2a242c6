"""A true privacy report of a small plan, ways to change it, and a saved pipeline that carries it."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from hf_spectral_dp.card import PrivacyCard
from hf_spectral_dp.privacy.budget import PrivacyPlan, accountant_version, event_to_dict
from hf_spectral_dp.privacy.noise import describe_randomness

# Much noise and few steps: the accountant answers at once.
PLAN = PrivacyPlan(
    num_examples=5000, sampling_rate=0.05, steps=4, noise_multiplier=5.0, target_epsilon=1.0, delta=2e-5
)
# Anything may stand in `training`, and any package or source of randomness may be left out; the rest is fixed.
OPEN = {("training", "lr_scheduler"), ("training", "adapter", "rank"), ("evaluation", 0, "note")}
TRUNCATED = dataclasses.replace(PLAN, sampling="truncated_poisson", max_batch_size=300)
SINGLE_PASS = dataclasses.replace(PLAN, sampling="single_pass", noise_multiplier=9.0, steps=30)  # 1.5 passes of 20
PLANS = [PLAN, TRUNCATED, SINGLE_PASS]
OPEN_BELOW = {("software",), ("mechanism", "randomness")}


def report(plan: PrivacyPlan = PLAN) -> dict:
    return {
        "schema_version": 1,
        "guarantee": {
            "epsilon": plan.epsilon(),
            "delta": plan.delta,
            "unit": "one row of the training data (one image with its label)",
            "adjacency": plan.adjacency,
            "accountant": "PLD",
            "accountant_version": accountant_version(),
            "profile": plan.profile(),
            "epsilon_without_amplification": plan.epsilon_without_amplification(),
        },
        "mechanism": {
            "name": "DP-SGD (Poisson-subsampled Gaussian mechanism)",
            "sampling": plan.sampling,
            "sampling_rate": plan.sampling_rate,
            "max_batch_size": plan.max_batch_size,
            "num_examples": plan.num_examples,
            "expected_batch_size": plan.expected_batch_size,
            "noise_multiplier": plan.noise_multiplier,
            "clipping_norm": 1.0,
            "planned_steps": plan.steps,
            "charged_steps": plan.steps,
            "normalisation": "noisy clipped sum divided by the public expected batch size",
            "randomness": describe_randomness(),
            "event": event_to_dict(plan.event()),
        },
        "training": {
            "trainable_parameters": 1_070_000,
            "adapter": {"type": "lora", "rank": 8},
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
        },
        "post_processing": ["exponential moving average of the weights, decay 0.99"],
        "ledger": {"records": plan.steps, "head": "ab" * 32},
        "software": {"hf_spectral_dp": "0.1.0", "torch": "2.13.0"},
        "data": {"name": "digits", "split": "train", "description": "Grey digits; one writer wrote about ten."},
        "public_components": [{"role": "codec and prior", "source": "drawn glyphs"}],
        "hyperparameter_tuning": "Chosen on public glyphs; no private image was used.",
        "outside_guarantee": ["Accuracy was measured on a private test split."],
        "evaluation": [{"dataset": "digits, test", "metric": "accuracy", "value": 0.83, "n": 1000, "note": "one seed"}],
    }


MISSING = object()


def changed(fields: dict, path: tuple, value: object = MISSING) -> dict:
    """A copy with one value replaced, or left out."""
    fields = node = copy.deepcopy(fields)
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    if value is MISSING:
        del node[path[-1]]
    return fields


def value_at(fields: dict, path: tuple) -> object:
    for part in path:
        fields = fields[part]
    return fields


def fields_of(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all fields of all objects; list entries are passed through."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield (*path, name)
            yield from fields_of(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from fields_of(item, (*path, index))


def save_pipeline(folder: Path, plan: PrivacyPlan = PLAN) -> Path:
    """A saved pipeline with its card, and files that are none of the card's business."""
    (folder / "model").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model_index.json").write_text("{}")
    (folder / ".cache" / "state.json").write_text("{}")
    PrivacyCard(report(plan)).save(folder, license="apache-2.0")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def body(readme: str) -> str:
    """The Markdown after the front matter."""
    return readme.split("---\n", 2)[2]
