"""What is damaged, missing or hostile in a saved pipeline is refused by name, and nothing of it is run."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from huggingface_hub.errors import StrictDataclassFieldValidationError

from hf_spectral_dp import DPSpectralPipeline, SpectralConfig, SpectralImageProcessor, SpectralTokenizerForCausalLM
from hf_spectral_dp.safe_loading import check_shards


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    DPSpectralPipeline(tiny_model(), SpectralImageProcessor(image_size=16, num_channels=1)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def test_damaged_weights_are_named(folder):
    path = folder / "model" / "model.safetensors"
    content = path.read_bytes()
    generator = random.Random(0)
    for damaged in (b"", content[:7], content[:100], content[:-1], b"\xff" * 8 + content[8:], bytes(1000),
                    *(content[: generator.randrange(len(content))] for _ in range(3))):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights in .*pipeline.* are damaged \(.*\); `hf-spectral-dp verify`"):
            DPSpectralPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model", "image_processor"])
def test_a_missing_component_is_named(folder, name):
    shutil.rmtree(folder / name)
    with pytest.raises((OSError, ValueError), match=name.replace("_", ".")):
        DPSpectralPipeline.from_pretrained(folder)


def test_a_damaged_index_is_named(folder):
    for text in ("", "[]", "{", '{"_class_name": 3}', '{"_class_name": "DDPMPipeline"}', "[" * 100_000):
        (folder / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match="model_index.json (is no readable JSON|names the class)"):
            DPSpectralPipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text('{"_class_name": "DPSpectralPipeline"}')
    with pytest.raises(ValueError, match="image_processor.*model|model.*image_processor"):
        DPSpectralPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", "", 3, ".w"])
def test_a_shard_outside_of_the_folder_is_refused(folder, name):
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match="model.safetensors.index.json names the file .* outside of its folder"):
        DPSpectralPipeline.from_pretrained(folder)
    (folder / "model" / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no index of weights"):
        check_shards(folder)


def test_a_pickle_is_never_read(folder):
    weights = torch.load  # must not be called
    called = []
    (folder / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(1)}, folder / "model" / "pytorch_model.bin")
    torch.load = lambda *arguments, **options: called.append(arguments) or weights(*arguments, **options)
    try:
        for load in (DPSpectralPipeline.from_pretrained, SpectralTokenizerForCausalLM.from_pretrained):
            place = folder if load == DPSpectralPipeline.from_pretrained else folder / "model"
            with pytest.raises((OSError, ValueError), match="safetensors"):
                load(place)
            with pytest.raises(ValueError, match="use_safetensors=False would read a pickle"):
                load(place, use_safetensors=False)
    finally:
        torch.load = weights
    assert called == []


def test_code_beside_the_weights_is_not_run(folder, tmp_path):
    """As a repository with remote code would have it: the classes of model_index.json in files of its own."""
    for name in ("pipeline_spectral.py", "model/modeling_spectral.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    index = json.loads((folder / "model_index.json").read_text())
    index["model"] = ["modeling_spectral", "SpectralTokenizerForCausalLM"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="modeling_spectral"):
        DPSpectralPipeline.from_pretrained(folder)
    index["_class_name"] = ["pipeline_spectral", "DPSpectralPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names the class .*Code beside a model is never run"):
        DPSpectralPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="trust_remote_code would run code"):
        DPSpectralPipeline.from_pretrained(folder, trust_remote_code=True)
    assert not (tmp_path / "run").exists()


def test_the_strict_config_checks_types():
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        SpectralConfig(hidden_size="a")


def test_the_defining_modules_expose_the_base_classes_that_diffusers_looks_up(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["model"] == ["hf_spectral_dp.modeling_spectral", "SpectralTokenizerForCausalLM"]
    assert index["image_processor"] == ["hf_spectral_dp.image_processing_spectral", "SpectralImageProcessor"]
    processor = SpectralImageProcessor(image_size=16, num_channels=1)
    given = DPSpectralPipeline.from_pretrained(folder, image_processor=processor)  # explicit components take that way
    assert given.image_processor is processor


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_the_index_of_a_variant_and_of_a_model_alone_is_read_as_well(folder, name):
    (folder / "model" / name).write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=f"{name} names the file .* outside of its folder"):
        DPSpectralPipeline.from_pretrained(folder, variant="fp16" if "fp16" in name else None)
    with pytest.raises(ValueError, match=f"{name} names the file .* outside of its folder"):
        SpectralTokenizerForCausalLM.from_pretrained(folder / "model")


def test_a_variant_in_pieces_is_saved_and_loaded(folder):
    pipeline = DPSpectralPipeline.from_pretrained(folder)
    for _ in range(2):  # once more: what is there is known
        pipeline.save_pretrained(folder.parent / "pieces", variant="fp16", max_shard_size="20KB")
    index = folder.parent / "pieces" / "model" / "model.safetensors.index.fp16.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    again = DPSpectralPipeline.from_pretrained(folder.parent / "pieces", variant="fp16")
    for name, weight in pipeline.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
