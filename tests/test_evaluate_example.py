"""The example from its command line: a folder of images in, the page and an updated card out."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from card_reports import report
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from test_assessment import tiny_pipeline

from hf_spectral_dp import PrivacyCard

# By its path: there is a package called evaluate, which other tests import.
specification = importlib.util.spec_from_file_location(
    "evaluate_example", Path(__file__).parents[1] / "examples" / "evaluate.py"
)
assert specification is not None and specification.loader is not None
example = importlib.util.module_from_spec(specification)
specification.loader.exec_module(example)


@pytest.fixture
def job(tmp_path) -> list[str]:
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    PrivacyCard(report()).save(tmp_path / "pipeline")
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 110), ("test", 105)):
        rows = {
            "image": [Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)) for _ in range(count)],
            "label": [index % 10 for index in range(count)],
        }
        features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=10)})
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    return [
        "--pipeline", str(tmp_path / "pipeline"), "--real", str(tmp_path / "data"), "--label_column", "label",
        "--out", str(tmp_path / "report"), "--num_images", "60", "--trainings", "1", "--steps", "2",
    ]  # fmt: skip


def run(arguments, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    example.main()


def test_the_page_and_the_card(job, tmp_path, monkeypatch):
    data = str(tmp_path / "data")
    run([*job, "--training", data, "--show_private", "--update_card"], monkeypatch)
    figures = json.loads((tmp_path / "report" / "assessment.json").read_text())
    assert figures["training"]["images"] == 110 and "this model" in figures["leakage"]
    assert "nearest training image (private)" in (tmp_path / "report" / "index.html").read_text()
    card = PrivacyCard.load(tmp_path / "pipeline")
    assert any("kernel_distance" in row["metric"] for row in card.report["utility"])
    assert not card.verify(tmp_path / "pipeline")


def test_a_pipeline_without_a_card_is_public_or_refused(job, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="has a privacy card"):
        run([*job, "--public_model", "noise"], monkeypatch)
    (tmp_path / "pipeline" / "privacy.json").unlink()
    with pytest.raises(FileNotFoundError):
        run(job, monkeypatch)
    with pytest.raises(SystemExit, match="leave out --public_model"):
        run([*job, "--public_model", "noise", "--update_card"], monkeypatch)
    run([*job, "--public_model", "noise"], monkeypatch)
    assert "no claim" in (tmp_path / "report" / "index.html").read_text()


def test_what_cannot_work_is_refused_at_once(job, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "read_real_images", lambda *args, **kwargs: pytest.fail("images were read"))
    with pytest.raises(SystemExit, match="give --training"):
        run([*job, "--show_private"], monkeypatch)
    with pytest.raises(SystemExit, match="local folder"):
        run([*job[2:], "--pipeline", "owner/name", "--update_card"], monkeypatch)
    assert not (tmp_path / "report").exists()
