"""A true privacy report of a small plan, ways to change it, and a saved pipeline that carries it."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from hf_spectral_dp.card import PrivacyCard
from hf_spectral_dp.privacy.budget import PrivacyPlan
from hf_spectral_dp.privacy_report import run_report, statement

# Much noise and few steps: the accountant answers at once.
PLAN = PrivacyPlan(num_examples=5000, sampling_rate=0.05, steps=4, noise_multiplier=5.0, target_epsilon=1.0, delta=2e-5)
TRUNCATED = dataclasses.replace(PLAN, sampling="truncated_poisson", max_batch_size=300)
SINGLE_PASS = dataclasses.replace(PLAN, sampling="single_pass", noise_multiplier=9.0, steps=30)  # 1.5 passes of 20
PLANS = [PLAN, TRUNCATED, SINGLE_PASS]
# After two earlier runs: two steps on full batches, and three on others.
COMPOSED = dataclasses.replace(
    PLAN,
    earlier=(
        dataclasses.replace(PLAN, sampling_rate=1.0, steps=2, noise_multiplier=20.0),
        dataclasses.replace(PLAN, sampling_rate=0.1, steps=3, noise_multiplier=8.0),
    ),
)


def report(plan: PrivacyPlan = PLAN) -> dict:
    run = run_report(
        plan,
        plan.steps,
        "ab" * 32,
        clipping_norm=1.0,
        unit="one row of the training data (one image with its label)",
        person=False,
        noise_source="cipher",
        earlier_runs=[{"clipping_norm": 0.5, "ledger_head": f"{index:02}" * 32} for index in range(len(plan.earlier))],
        training={
            "trainable_parameters": 1_070_000,
            "adapter": {"type": "lora", "rank": 8},
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
            "processes": 1,
            "conditioning": "none",
            "private_loss_logged": False,
        },
        post_processing=["exponential moving average of the weights, decay 0.99"],
    )
    looked = {"what": "Accuracy was measured on a private test split.", "accounted": False, "released": True}
    return {**run, **PUBLISHED, "data_accesses": [*run["data_accesses"], looked]}


# What only the publisher knows.
PUBLISHED = {
    "data": {"name": "digits", "split": "train", "description": "Grey digits; one writer wrote about ten."},
    "public_data": [{"role": "codec and prior", "source": "drawn glyphs"}],
    "hyperparameter_tuning": {
        "statement": "Chosen on public glyphs; no private image was used.", "data": "public", "accounted": True,
    },
    "audit": [
        {
            "attack": "one-run audit", "quantity": "epsilon", "shown": 0.01, "claimed": 1.0, "confidence": 0.95,
            "n": 500, "control": "no noise", "control_shown": 3.5, "control_caught": True, "verdict": "not refuted",
            "note": "",
        },
    ],
    "utility": [
        {
            "dataset": "digits, test", "metric": "accuracy", "value": 0.83, "low": 0.82, "high": 0.85, "n": 1000,
            "private": True, "accounted": False, "note": "one seed",
        },
    ],
    "reproduce": {"train": "accelerate launch examples/train.py --config x.yaml", "verify": "hf-spectral-dp verify"},
    "license": "apache-2.0",
    "contact": "the publisher of this repository",
}  # fmt: skip


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


def forged(fields: dict, path: tuple, value: object) -> dict:
    """A copy with one value replaced, and everything that follows from it by plain arithmetic adapted."""
    fields = changed(fields, path, value)
    mechanism, sampling = fields["mechanism"], fields["sampling"]
    mechanism["noise_standard_deviation"] = mechanism["noise_multiplier"] * mechanism["clipping_norm"]
    sampling["expected_batch_size"] = mechanism["divisor"] = sampling["rate"] * fields["adjacency"]["num_units"]
    fields["claim"]["statement"] = statement(fields)
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
    PrivacyCard(report(plan)).save(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def body(readme: str) -> str:
    """The Markdown after the front matter."""
    return readme.split("\n---\n", 1)[1]
