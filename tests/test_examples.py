"""The main job end to end on a handful of images, and that what cannot work is refused before any image is read."""

import ast
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import controls
import job_config
import numpy as np
import pytest
import torch
import train
import yaml
from conftest import EXAMPLES, tiny_model
from datasets import ClassLabel, Dataset, Features, Image, Value
from example_jobs import images, run, run_here, tiny_job
from PIL import Image as Picture
from pipeline_parts import of_half_the_side

from hf_spectral_dp import DPSpectralPipeline, PrivacyCard, SpectralImageProcessor
from hf_spectral_dp.cli import main as cli
from hf_spectral_dp.privacy.ledger import read_ledger


@pytest.fixture
def job(tmp_path) -> dict:
    return tiny_job(tmp_path)


@pytest.mark.slow
def test_images_in_pipeline_and_card_out(job, tmp_path):
    done = run(job, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "pipeline"
    card = PrivacyCard.load(folder)
    assert card.verify(folder) == [] and cli(["verify", str(folder)]) == 0
    report = card.report
    assert 0.99 * 8 < report["claim"]["epsilon"] <= 8
    ledger = read_ledger(tmp_path / "out" / "training" / "privacy_ledger.jsonl")
    assert ledger["charged"] == report["mechanism"]["charged_steps"] == 4
    assert ledger["head"] == report["accounting"]["ledger"]["head"]
    for word in ("floor", "ceiling", "twin", "epsilon spent", "samples.png"):
        assert word in done.stdout
    # Figures computed from private images outside the guarantee stay off the card.
    metrics = json.dumps(report["utility"])
    assert "floor" in metrics and "twin" not in metrics and "ceiling" not in metrics
    assert {path.name for path in folder.iterdir()} >= {"README.md", "privacy.json", "samples.png", "model_index.json"}
    assert report["data"]["name"] == "data"  # no path of this machine
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    pipeline = DPSpectralPipeline.from_pretrained(folder)
    assert pipeline(class_labels=3, num_images=2).images[0].size == (16, 16)
    again = run(job, tmp_path)
    assert again.returncode != 0 and "exists" in again.stderr


@pytest.mark.parametrize(
    "section, field, value, message",
    [
        ("training", "target_epsilon", 0.0, "epsilon=0.0"),
        ("training", "target_delta", 0.5, "delta=0.5"),
        ("training", "expected_batch_size", 61, "expected_batch_size=61 is larger than the data"),
        ("training", "epsilon", 1.0, r"unknown fields \['epsilon'\]"),
        ("sampling", "temprature", 1.0, r"unknown fields \['temprature'\]"),
        ("sampling", "temperature", [1.0] * 7, "temperature=.* must be > 0: one number, or"),
        ("sampling", "attempts", 0, "attempts=0 a whole number of at least 1"),
        ("sampling", "guidance_scale", float("inf"), "guidance_scale=inf must be finite"),
        ("card", "tuning_data", "validation", "hyperparameter_tuning.data='validation': .*none, public"),
        ("card", "license", "", "license=''"),
        ("card", "outside_guarantee", "a look", "card.outside_guarantee='a look' must be a list of texts"),
        ("data", "description", 7, "data.description=7 must be text"),
        ("data", "description", " ", "data.description must say something"),
        ("data", "views", {"count": 3}, "count=3 with no change given"),
        ("data", "views", {"count": 3, "rotate": 5}, "data.views=.* takes count, and beside it some of rot"),
        ("data", "views", 4, "data.views=4 takes count"),
        ("data", "white_level", 0, "data.white_level=0 must be a whole number of at least 1"),
        ("data", "white_level", 65536, r"white_level=65536 must be in \[1, 65535\]"),
        ("data", "num_examples", "60", "data.num_examples='60' must be a whole number of at least 1, without quotes"),
        ("data", "label_column", 3, "data.label_column=3 must be text; put it into quotes"),
        ("data", "class_names", [True, False], r"data.class_names=\[True, False\] must be a list of texts; quotes"),
        ("model", "num_classes", 2.5, "model.num_classes=2.5 must be a whole number of at least 0"),
        ("evaluation", "images_per_class", 0, "evaluation.images_per_class=0 must be a whole number of at least 1"),
        ("evaluation", "classifier_steps", -1, "evaluation.classifier_steps=-1 must be a whole number of at least 1"),
        ("evaluation", "twin_epochs", 0, "evaluation.twin_epochs=0 must be a number above 0"),
        ("evaluation", "source", None, r"evaluation lacks \['source'\]"),
        ("training", "max_steps", "240", "max_steps='240' must be a whole number, without quotes"),
        ("sampling", "top_p", "0.9", "top_p='0.9'"),
        ("model", "prior_source", None, r"model lacks \['prior_source'\]"),
    ],
)
def test_a_config_that_cannot_work_fails_before_any_image_is_read(
    job, tmp_path, monkeypatch, section, field, value, message
):
    job.setdefault(section, {})[field] = value
    if value is None:
        del job[section][field]
    monkeypatch.setattr(job_config, "load_images", lambda *args, **kwargs: pytest.fail("images were read"))
    with pytest.raises(ValueError, match=message):
        run_here(job, tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_a_field_that_stands_twice_is_refused(tmp_path):
    """Of two lists of earlier ledgers, YAML would silently keep the last."""
    (tmp_path / "twice.yaml").write_text("training:\n  earlier_ledgers: [a]\n  earlier_ledgers: [b]\n")
    with pytest.raises(ValueError, match="earlier_ledgers stands twice"):
        job_config.read_config(str(tmp_path / "twice.yaml"))
    (tmp_path / "merged.yaml").write_text("data: &same\n  split: a\nevaluation:\n  <<: *same\n  split: b\n")
    with pytest.raises(ValueError, match="data lacks"):  # another error: a field that was merged may be given anew
        job_config.read_config(str(tmp_path / "merged.yaml"))


def test_coarse_tokens_need_a_network(job, tmp_path, monkeypatch):
    """Its samples could not be drawn, after the budget is spent."""
    of_half_the_side().save_pretrained(tmp_path / "prior")
    job["model"]["super_resolution"] = None
    with pytest.raises(ValueError, match="model.super_resolution is empty, but prior=.* draws images of side 8 for 16"):
        run_here(job, tmp_path, monkeypatch)


@pytest.mark.parametrize("change", [{"split": "test"}, {"unit_column": "label", "max_rows_per_unit": 2}])
def test_a_run_does_not_go_on_with_other_data(job, tmp_path, monkeypatch, change):
    """The tokens are there: they would be trained on, and the card would speak of the others."""
    monkeypatch.setattr(train, "DPTrainer", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here(job, tmp_path, monkeypatch)
    job["data"] |= {"description": "other words for the same"}
    for more, error, message in (({}, ZeroDivisionError, ""), (change, ValueError, "tokens.* were made of data=")):
        job["data"] |= more
        monkeypatch.setattr(sys, "argv", [*sys.argv[:3], "--resume"])
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(job))
        with pytest.raises(error, match=message):
            train.main()


def test_a_run_does_not_go_on_with_another_critic(job, tmp_path, monkeypatch):
    """Photos and network that are there would be used, and the card would speak of the others."""
    monkeypatch.setattr(train, "DPTrainer", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here(job, tmp_path, monkeypatch)
    job |= {"critic": {"kind": "mean", "target_epsilon": 1.0}, "sampling": {"attempts": 2}}
    monkeypatch.setattr(sys, "argv", [*sys.argv[:3], "--resume"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(job))
    with pytest.raises(ValueError, match="give data, classes and critic again as they were"):
        train.main()


def test_a_network_that_is_not_there_is_refused_before_any_image_is_read(job, tmp_path, monkeypatch):
    job |= {"critic": {"kind": "mean", "target_epsilon": 1.0, "network": "nowhere"}, "sampling": {"attempts": 2}}
    with pytest.raises(ValueError, match="critic.network='nowhere' is no folder; .* bundled:public-eye"):
        run_here(job, tmp_path, monkeypatch)
    assert not (tmp_path / "run").exists()


def test_the_card_says_what_the_network_of_the_critic_learned_from(job, tmp_path, monkeypatch):
    critic = {"kind": "mean", "target_epsilon": 1.0, "network": str(tmp_path)}
    job |= {"critic": critic, "sampling": {"attempts": 2}}
    with pytest.raises(ValueError, match="critic.network and critic.network_source belong together"):
        run_here(job, tmp_path, monkeypatch)
    own, bundled = critic | {"network_source": "my photos"}, {"kind": "mean", "target_epsilon": 1.0}
    for given, expected in ((own, ["my photos"]), (bundled, ["Tiny ImageNet, public photos"]), (None, [])):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(job | {"critic": given}))
        words = job_config.publisher_words(job_config.read_config(str(tmp_path / "config.yaml")))["public_data"]
        assert [some["source"] for some in words if some["role"] == "network that the critic looks through"] == expected


TRAINS = ("pretrain", "pretrain_codec", "train_eye", "train_features", "train_super_resolution")


@pytest.mark.parametrize("script", TRAINS)
def test_no_images_and_no_place_for_a_network_are_refused_before_training(tmp_path, monkeypatch, capsys, script):
    (tmp_path / "file").write_text("taken")
    codec = [] if script in ("pretrain_codec", "train_features") else ["--codec", "c"]
    monkeypatch.setattr(sys, "argv", ["x", "--public", "p", *codec, "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert "file is a file; name a folder for the network" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["x", "--public", "p", *codec, "--images", "0", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert "--images 0: it takes at least one" in capsys.readouterr().err


def test_the_ceiling_sees_every_row_through_the_codec(job, tmp_path, monkeypatch):
    """In parts, and without the graph that a gradient would need."""
    monkeypatch.setattr(train, "DPTrainer", lambda model, args, store: held.append((model, store)) or 1 / 0)
    held = []
    with pytest.raises(ZeroDivisionError):
        run_here(job, tmp_path, monkeypatch)
    (model, store), processor = held[0], SpectralImageProcessor(image_size=16, num_channels=1)
    pixels, labels = controls.through_codec(DPSpectralPipeline(model, processor), store)
    tokens = store[range(len(store))]["input_ids"][:, 1:]
    assert torch.allclose(pixels, model.decode(tokens).clamp(-1, 1), atol=1e-6) and not pixels.requires_grad
    assert labels.tolist() == [index % 10 for index in range(60)]


def test_adapters_cannot_learn_new_classes(job, tmp_path, monkeypatch):
    job["model"]["num_classes"], job["training"]["lora_rank"] = 3, 2
    monkeypatch.setattr(job_config, "load_images", lambda *args, **kwargs: pytest.fail("images were read"))
    with pytest.raises(ValueError, match="num_classes=3 are new to prior=.* use lora_rank 0"):
        run_here(job, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_finished_run_without_checkpoints_keeps_its_pipeline(job, tmp_path):
    """To go on from nothing would write the public model under the card of the run."""
    job["training"] |= {"save_strategy": "no"}
    del job["evaluation"], job["training"]["save_steps"]
    assert run(job, tmp_path).returncode == 0
    weights = tmp_path / "out" / "pipeline" / "model" / "model.safetensors"
    trained = weights.read_bytes()
    again = run(job, tmp_path, "--resume")
    assert again.returncode != 0 and "nothing is left to train" in again.stderr
    assert weights.read_bytes() == trained


def test_controls_want_one_process(job, tmp_path, monkeypatch):
    """What the others left would wait for them for ever, after the budget is spent."""
    monkeypatch.setattr(job_config, "load_images", lambda *args, **kwargs: pytest.fail("images were read"))
    monkeypatch.setattr(train, "PartialState", lambda: SimpleNamespace(num_processes=2, is_main_process=True))
    with pytest.raises(ValueError, match="one of 2; take the section out, and run examples/evaluate.py"):
        run_here(job, tmp_path, monkeypatch)


def test_a_config_is_read_as_it_looks(tmp_path):
    """Numbers as 1e-5, which YAML 1.1 takes for text; an empty field is not given; what is no section is refused."""
    config = yaml.safe_load((EXAMPLES / "configs" / "demo.yaml").read_text())
    lines = yaml.safe_dump(config).replace("target_epsilon: 8.0", "target_epsilon: 8\n  target_delta: 1e-5")
    path = tmp_path / "config.yaml"
    path.write_text(lines.replace("num_examples: 4000", "num_examples:"))
    found = job_config.read_config(str(path))
    assert found["training"]["target_delta"] == 1e-5 and "num_examples" not in found["data"]
    kept = {"revision": "v1e5", "a": "12e", "b": 10, "c": "1.5.2"}
    assert yaml.load(yaml.safe_dump(kept), job_config._Loader) == kept
    for content, message in (
        ("# nothing\n", "holds no sections"),
        ("data: my images\n", "data='my images' is no section"),
        ("1: 2\nother: 3\n", r"unknown sections \['1', 'other'\]"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            job_config.read_config(str(path))


def test_a_run_that_was_refused_does_not_stand_in_the_way_of_the_next(job, tmp_path, monkeypatch):
    job["data"]["label_column"] = "lable"
    del job["evaluation"]
    for _ in range(2):  # by the same reason the second time, not because of what the first left
        with pytest.raises(ValueError, match="label_column='lable' is not a column"):
            run_here(job, tmp_path, monkeypatch)


def test_a_file_or_a_folder_in_use_is_no_place_for_a_run(job, tmp_path, monkeypatch):
    out = Path(job["output"])
    out.write_text("something else")
    with pytest.raises(SystemExit, match="exists; pass --resume to go on"):
        run_here(job, tmp_path, monkeypatch)
    out.unlink()
    out.mkdir()
    (out / "notes.txt").write_text("something else")
    with pytest.raises(SystemExit, match="exists; pass --resume to go on"):
        run_here(job, tmp_path, monkeypatch)


def test_without_labels_the_model_has_no_classes(job, tmp_path, monkeypatch):
    """Those of the prior would be drawn by class tokens that no private row ever had."""
    del job["data"]["label_column"], job["evaluation"]
    run_here(job, tmp_path, monkeypatch)
    pipeline = DPSpectralPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert pipeline.model.config.num_classes == 0 and len(pipeline(num_images=2).images) == 2


def test_labels_of_test_images_that_the_model_does_not_know_end_the_run_before_it_spends(job, tmp_path, monkeypatch):
    job["model"]["num_classes"] = 10
    monkeypatch.setattr(train, "DPTrainer", lambda *args: pytest.fail("training began"))
    rows = images(12, 1).to_dict()
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict({**rows, "label": [11] * 12}, features=features).to_parquet(tmp_path / "data" / "test.parquet")
    with pytest.raises(ValueError, match="label 11, but the model has num_classes=10"):
        run_here(job, tmp_path, monkeypatch)


def test_controls_that_fail_leave_a_pipeline_with_its_card(job, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "compare", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here(job, tmp_path, monkeypatch)
    folder = tmp_path / "out" / "pipeline"
    assert PrivacyCard.load(folder).verify(folder) == []


def test_test_images_are_those_of_the_configuration_and_revision_that_are_named(monkeypatch):
    asked = []
    monkeypatch.setattr(job_config, "load_images", lambda *args, **options: asked.append((args, options)) or iter(()))
    section = {"source": "owner/name", "split": "test", "config_name": "small", "revision": "v1"}
    with pytest.raises(ValueError):
        controls.real_images(section, SpectralImageProcessor(image_size=16, num_channels=1), tiny_model().config)
    assert asked == [(("owner/name", "test"), {"config_name": "small", "revision": "v1"})]


@pytest.mark.slow
def test_any_classes_start_from_the_bundled_photos(job, tmp_path):
    """The recipe of faces.yaml on a few colour images of three classes, each in two views."""
    model = yaml.safe_load((EXAMPLES / "configs" / "faces.yaml").read_text())["model"]
    job["model"] = {**model, "num_classes": 3}
    generator = np.random.default_rng(0)
    pictures = [Picture.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(60)]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=3)})
    rows = Dataset.from_dict({"image": pictures, "label": [index % 3 for index in range(60)]}, features=features)
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    job["data"]["views"] = {"count": 2, "mirror": True}
    job["training"] |= {"max_steps": 2, "save_strategy": "no"}
    del job["evaluation"], job["training"]["save_steps"]
    done = run(job, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "pipeline"
    assert PrivacyCard.load(folder).verify(folder) == []
    pipeline = DPSpectralPipeline.from_pretrained(folder)
    assert pipeline(class_labels=2, num_images=1).images[0].size == (64, 64)
    with pytest.raises(ValueError, match="num_classes=3"):
        pipeline(class_labels=3)


def test_test_images_that_cannot_be_used_end_the_run_before_it_spends(job, tmp_path, monkeypatch):
    job["evaluation"]["label_column"] = "colour"
    monkeypatch.setattr(train, "tokenise", lambda *args: pytest.fail("private images were read"))
    with pytest.raises(ValueError, match="no column 'colour'"):
        run_here(job, tmp_path, monkeypatch)


def test_a_broken_test_image_is_left_out_of_the_controls(tmp_path):
    rows = images(12, 0).to_dict()
    rows["image"][3] = {"bytes": b"no image", "path": None}
    features = Features({"image": Image(decode=False), "label": ClassLabel(num_classes=10)})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "test.parquet")
    section = {"source": str(tmp_path / "data"), "split": "test"}
    with pytest.warns(UserWarning, match="1 images could not be read"):
        processor = SpectralImageProcessor(image_size=16, num_channels=1)
        pixels, labels = train.real_images(section, processor, tiny_model().config)
    assert pixels.shape == (11, 1, 16, 16) and labels.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 0, 1]


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_repository_is_readable(path):
    config = train.read_config(str(path))
    arguments = train.DPTrainingArguments(
        **{**config["training"], "output_dir": "unused", "report_to": "none", "use_cpu": True}
    )
    if "num_examples" in config["data"]:
        assert arguments.plan(config["data"]["num_examples"]).epsilon() <= config["training"]["target_epsilon"]


RUN = [path for path in sorted(EXAMPLES.glob("*.py")) if "ArgumentParser(" in path.read_text()]  # others are imported


@pytest.mark.parametrize("script", RUN, ids=lambda path: path.stem)
def test_help_teaches(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    said, purpose = capsys.readouterr().out, ast.get_docstring(ast.parse(script.read_text()))
    assert ended.value.code == 0 and purpose in said  # line by line, as it was written
