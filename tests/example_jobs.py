"""A job for examples/train.py that several test files run, and what must hold of one with a critic."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import train
import yaml
from conftest import EXAMPLES, tiny_model
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture

from hf_spectral_dp import PrivacyCard, SpectralImageProcessor
from hf_spectral_dp.cli import main as cli
from hf_spectral_dp.privacy.ledger import read_ledger
from hf_spectral_dp.super_resolution import SpectralSuperResolution, SpectralSuperResolutionConfig


def images(count: int, seed: int) -> Dataset:
    generator = np.random.default_rng(seed)
    rows = {
        "image": [Picture.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)) for _ in range(count)],
        "label": [index % 10 for index in range(count)],
    }
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(num_classes=10)}))


def tiny_job(folder: Path) -> dict:
    """A config whose every part lies in folder."""
    tiny_model().save_pretrained(folder / "prior")
    SpectralImageProcessor(image_size=16, num_channels=1).save_pretrained(folder / "prior")
    network = SpectralSuperResolution(SpectralSuperResolutionConfig(num_channels=1, features=4, num_blocks=1))
    network.save_pretrained(folder / "detail")
    (folder / "data").mkdir()
    images(60, 0).to_parquet(folder / "data" / "train.parquet")
    images(20, 1).to_parquet(folder / "data" / "test.parquet")
    columns = {"source": str(folder / "data"), "image_column": "image", "label_column": "label"}
    return {
        "output": str(folder / "out"),
        "data": {**columns, "split": "train", "num_examples": 60, "description": "noise"},
        "model": {
            "prior": str(folder / "prior"), "prior_source": "noise", "super_resolution": str(folder / "detail"),
            "super_resolution_source": "noise",
        },
        "training": {
            "target_epsilon": 8.0, "expected_batch_size": 20, "max_steps": 4, "micro_batch_size": 8, "use_cpu": True,
            "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True,
        },
        "card": {"license": "mit", "hyperparameter_tuning": "by convention", "tuning_data": "none"},
        "evaluation": {**columns, "split": "test", "images_per_class": 2, "twin_epochs": 1, "classifier_steps": 5},
    }  # fmt: skip


def run(job: dict, tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(job))
    command = [sys.executable, str(EXAMPLES / "train.py"), "--config", str(config), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def run_here(job: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(job))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config)])
    train.main()


def of_one_budget(out: Path, charged: tuple[int, int]) -> tuple[dict, str]:
    """Report of a run with a critic, and the head of the critic's ledger; both runs are counted, once and together."""
    first, second = (read_ledger(out / name / "privacy_ledger.jsonl") for name in ("critic_training", "training"))
    assert (first["charged"], second["charged"]) == charged
    (earlier,) = second["header"]["plan"]["earlier"]
    assert earlier["noise_multiplier"] == first["header"]["plan"]["noise_multiplier"]
    report = PrivacyCard.load(out / "pipeline").report
    assert 7.9 < report["claim"]["epsilon"] <= 8
    assert report["mechanism"]["earlier_runs"][0]["ledger_head"] == first["head"]
    assert cli(["verify", str(out / "pipeline"), "--ledger", str(out / "training" / "privacy_ledger.jsonl")]) == 0
    return report, first["head"]
