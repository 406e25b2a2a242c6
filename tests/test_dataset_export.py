"""Synthetic datasets: the same files however the export was interrupted, labels as asked, an inherited guarantee."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from card_reports import report
from conftest import tiny_model
from datasets import load_dataset
from hub_server import HubServer, fresh
from PIL import Image
from text_parts import text_encoder, text_model

from hf_spectral_dp import DPSpectralPipeline, PrivacyCard, SpectralImageProcessor
from hf_spectral_dp.dataset_export import export_dataset, export_shards, publish_dataset

SETTINGS = {"num_images": 47, "shard_size": 10, "batch_size": 4, "seed": 3}


def make_source(folder: Path) -> Path:
    """A pipeline with its card."""
    DPSpectralPipeline(tiny_model(), SpectralImageProcessor(image_size=16, num_channels=1)).save_pretrained(folder)
    PrivacyCard(report()).save(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "pipeline")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """The files of an export that nothing interrupted."""
    return files(export_dataset(source, tmp_path_factory.mktemp("whole") / "out", **SETTINGS))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_datasets_reads_it_with_images_and_balanced_labels(source, whole, tmp_path):
    export_dataset(source, tmp_path / "out", **SETTINGS)
    assert set(whole) == {
        "README.md", "privacy.json", "export.json", *(f"data/train-{i:05d}-of-00005.parquet" for i in range(5))
    }  # fmt: skip
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 47 and rows["label"][:12] == [*range(10), 0, 1]
    counts = np.bincount(rows["label"], minlength=10)
    assert counts.max() - counts.min() == 1 and rows.features["label"].num_classes == 10
    assert isinstance(rows[0]["image"], Image.Image) and rows[0]["image"].size == (16, 16)
    images = np.stack([np.asarray(image) for image in rows["image"]])
    assert len(np.unique(images.reshape(47, -1), axis=0)) == 47  # no two shards or batches alike


class Stop(BaseException):
    """As KeyboardInterrupt, which pytest would take for itself."""


@pytest.mark.parametrize("stopped_at", [1, 2, 3, 6, 10])
def test_interrupted_and_gone_on_with_it_is_the_same_dataset(source, whole, tmp_path, monkeypatch, stopped_at):
    import hf_spectral_dp.dataset_export as module

    calls, png = [], module._png

    def stops(image):
        calls.append(image)
        if len(calls) == 4 * stopped_at:
            raise Stop
        return png(image)

    monkeypatch.setattr(module, "_png", stops)
    with pytest.raises(Stop):
        export_dataset(source, tmp_path, **SETTINGS)
    assert len([name for name in files(tmp_path) if name.endswith(".parquet")]) == (4 * stopped_at - 1) // 10
    assert "README.md" not in files(tmp_path)
    done = len(calls)
    export_dataset(source, tmp_path, **SETTINGS)
    assert files(tmp_path) == whole
    assert len(calls) - done == 47 - 10 * ((4 * stopped_at - 1) // 10)  # what was finished is not drawn again


@pytest.mark.slow  # processes that import everything
def test_killed_it_goes_on_in_two_processes_as_if_nothing_had_been(source, tmp_path):
    example = Path(__file__).parents[1] / "examples" / "export_dataset.py"
    options = ["--num_images", "900", "--shard_size", "15", "--device", "cpu"]
    command = [sys.executable, str(example), str(source), "--out", str(tmp_path / "killed"), *options]
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "killed").glob("data/train-*"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    begun = files(tmp_path / "killed")
    assert "README.md" not in begun and len(begun) < 62
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, *command[1:]], check=True, capture_output=True, timeout=250)
    export_dataset(source, tmp_path / "whole", num_images=900, shard_size=15, device="cpu")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_several_processes_share_the_shards_and_make_the_same(source, whole, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "export.json").write_bytes(whole["export.json"])
    pipeline = DPSpectralPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    (tmp_path / "data" / ".1-train-00001-of-00005.parquet").write_bytes(b"half")  # of a process that died
    export_shards(pipeline, tmp_path, 1, 2)
    assert [name[-22:] for name in files(tmp_path) if "parquet" in name] == [
        "train-00001-of-00005.parquet"[-22:], "train-00003-of-00005.parquet"[-22:]
    ]  # fmt: skip
    export_shards(pipeline, tmp_path, 0, 2)
    assert {name: content for name, content in whole.items() if "parquet" in name} == {
        name: content for name, content in files(tmp_path).items() if "parquet" in name
    }


def test_labels_and_sampling_as_asked(source, tmp_path):
    export_dataset(source, tmp_path, 8, class_labels=[7, 7, 2], batch_size=8, upscaling="none", temperature=1e-6)
    rows = load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / ".cache"))
    assert rows["label"] == [7, 7, 2, 7, 7, 2, 7, 7]
    images = [np.asarray(image).tobytes() for image in rows["image"]]
    assert len(set(images)) == 2 and images[0] == images[1] != images[2]  # almost no heat: one image per label


def test_classes_keep_their_names(tmp_path):
    model = tiny_model()
    model.config.class_names = ["benign", "malignant"]
    processor = SpectralImageProcessor(image_size=16, num_channels=1)
    DPSpectralPipeline(model, processor).save_pretrained(tmp_path / "pipeline")
    PrivacyCard(report()).save(tmp_path / "pipeline")
    export_dataset(tmp_path / "pipeline", tmp_path / "out", 2)
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features["label"].names[:3] == ["benign", "malignant", "2"] and rows["label"][:2] == [0, 1]


def test_prompts_in_turn_become_a_column(tmp_path):
    encoder, words = text_encoder(tmp_path / "encoder")
    source, processor = tmp_path / "source", SpectralImageProcessor(image_size=16, num_channels=3)
    model = text_model()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # so large that a prompt changes the likeliest tokens
        parameter.data.normal_(std=1.0, generator=generator)
    DPSpectralPipeline(model, processor, None, encoder, words).save_pretrained(source)
    PrivacyCard(report()).save(source)
    prompts = ["a red circle", "a blue square", "a photo"]
    folder = export_dataset(source, tmp_path / "out", 7, prompts=prompts, shard_size=3, temperature=1e-6)
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["text"] == [*prompts, *prompts, prompts[0]]
    images = [np.asarray(image).tobytes() for image in rows["image"]]
    assert len(set(images)) == 3 and images[:3] == images[3:6]  # almost no heat: one image per prompt
    assert "the guarantee does not speak of it" in (folder / "README.md").read_text()
    plain = load_dataset(
        str(export_dataset(source, tmp_path / "plain", 2)), split="train", cache_dir=str(tmp_path / "c")
    )
    assert plain.column_names == ["image"]
    with pytest.raises(ValueError, match=r"prompts=\[\] must be texts"):
        export_dataset(source, tmp_path / "none", 2, prompts=[])


def test_another_seed_gives_other_images(source, whole, tmp_path):
    other = files(export_dataset(source, tmp_path, **{**SETTINGS, "seed": 4}))
    assert other.keys() == whole.keys()
    assert all(other[name] != whole[name] for name in whole if "parquet" in name)


def test_the_card_inherits_the_guarantee(source, whole):
    readme = whole["README.md"].decode()
    assert " ".join(PrivacyCard.load(source).guarantee.split()) in readme and "post-processing" in readme
    assert whole["privacy.json"] == (source / "privacy.json").read_bytes()
    assert "47 images" in readme and "n<1K" in readme


def test_markup_in_the_unit_stays_text(source, tmp_path):
    from hf_spectral_dp.dataset_export import dataset_card

    class Card:
        guarantee = "differentially private under\n---\nremoving <script>alert(1)</script>"

    settings = json.loads((export_dataset(source, tmp_path, 1) / "export.json").read_text())
    text = dataset_card(Card(), settings)
    assert "<script>" not in text and "under --- removing &lt;script&gt;" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 0}, "num_images=0"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"upscaling": "magic"}, "upscaling='magic'"),
        ({"device": "foo"}, "device='foo' cannot be used here"),
        ({"class_labels": [10]}, r"class_labels=\[10\] must be labels in \[0, 10\)"),
        ({"class_labels": []}, r"class_labels=\[\]"),
        ({"prompts": ["a"]}, "prompts are for a model with text alone, but this one has conditioning='class'"),
        ({"heat": 1.0}, r"\['heat'\] are unknown; use guidance_scale"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(source, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        export_dataset(source, tmp_path / "out", **{**SETTINGS, **settings})
    assert not (tmp_path / "out").exists()


def test_other_settings_other_files_and_other_weights_are_refused(source, tmp_path):
    export_dataset(source, tmp_path / "out", 3)
    with pytest.raises(ValueError, match="begun with other settings .seed=0 there, 1 now.*go on"):
        export_dataset(source, tmp_path / "out", 3, seed=1)
    with pytest.raises(ValueError, match="guidance_scale"):  # found out by the pipeline
        export_dataset(source, tmp_path / "again", 3, guidance_scale=float("nan"))
    export_dataset(source, tmp_path / "again", 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="holds other files"):
        export_dataset(source, tmp_path / "mine", 3)
    changed = make_source(tmp_path / "changed")
    model = tiny_model()
    model.lm_head.weight.data += 1
    model.save_pretrained(changed / "model")
    with pytest.raises(ValueError, match="is not what its card says.*model.safetensors"):
        export_dataset(changed, tmp_path / "new", 3)
    (changed / "privacy.json").unlink()
    with pytest.raises(FileNotFoundError):
        export_dataset(changed, tmp_path / "new", 3)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["privacy.json", "README.md"])
def test_another_guarantee_than_the_generators_is_not_published(source, tmp_path, name):
    folder = export_dataset(source, tmp_path / "out", 2)
    (folder / name).write_text((folder / name).read_text().replace("epsilon", "Epsilon") + " ")
    with pytest.raises(ValueError, match="is not what the export wrote"):
        publish_dataset(folder, "me/synthetic")


def test_a_damaged_shard_is_not_taken_for_one(source, tmp_path):
    export_dataset(source, tmp_path, 3)
    shard = tmp_path / "data" / "train-00000-of-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="train-00000-of-00001.parquet is damaged .*[Pp]arquet.*delete it and"):
        export_dataset(source, tmp_path, 3)


PUSH = """
import json
from pathlib import Path
from hf_spectral_dp.dataset_export import publish_dataset
shard, error = Path({shard!r}), None
content = shard.read_bytes()
shard.unlink()
try:
    publish_dataset({folder!r}, "me/synthetic", private=True)
except FileNotFoundError as raised:
    error = str(raised)
shard.write_bytes(content)
print(json.dumps([error, publish_dataset({folder!r}, "me/synthetic", private=True)]))
"""

PULL = """
import json, numpy
from datasets import load_dataset
rows = load_dataset("me/synthetic", split="train")
print(json.dumps([numpy.stack(rows["image"]).tolist(), list(rows["label"])]))
"""


def test_a_finished_dataset_goes_to_the_hub_in_one_commit_and_back(source, tmp_path):
    """By the true clients, over HTTP, in a fresh process each time. One that lacks a shard stays here."""
    folder = export_dataset(source, tmp_path / "out", 5, shard_size=2)
    shard = folder / "data" / "train-00001-of-00003.parquet"
    with HubServer() as hub:
        error, address = fresh(hub, tmp_path, PUSH.format(folder=str(folder), shard=str(shard)))
        assert "lacks data/train-00001-of-00003.parquet; finish" in error
        repository = hub.repositories["datasets/me/synthetic"]
        (_, _, before), (sha, message, after) = repository.commits
        assert repository.private and address == f"{hub.endpoint}/datasets/me/synthetic/commit/{sha}"
        assert message == "Upload synthetic images with their privacy card"
        released = {name: content for name, content in files(folder).items() if name != "export.json"}
        assert after == {**before, **released}
        assert " ".join(PrivacyCard.load(source).guarantee.split()) in after["README.md"].decode()
        assert sum(request.startswith("POST /api/repos/create") for request in hub.requests) == 1
        (tmp_path / "user").mkdir()
        images, labels = fresh(hub, tmp_path / "user", PULL)
    here = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(images, np.stack([np.asarray(image) for image in here["image"]]))
    assert labels == list(here["label"]) == [0, 1, 2, 3, 4]


def test_the_example_refuses_in_words(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export_dataset.py", str(source), "--out", str(tmp_path), "--num_images", "0"])
    with pytest.raises(SystemExit, match=r"export_dataset\.py: num_images=0"):
        runpy.run_path(str(Path(__file__).parents[1] / "examples" / "export_dataset.py"), run_name="__main__")
