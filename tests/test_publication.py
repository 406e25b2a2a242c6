"""What is uploaded: a pipeline and its card, never what lies beside them. Sent for real in test_hub_roundtrip.py."""

import json
from pathlib import Path

import pytest
import torch
from card_reports import report
from conftest import tiny_model
from huggingface_hub import CommitOperationDelete, HfApi
from training_parts import Rows, arguments

from hf_spectral_dp import DPSpectralPipeline, DPTrainer, PrivacyCard, SpectralImageProcessor
from hf_spectral_dp.publication import publish
from hf_spectral_dp.released_files import is_public, public_files

PUBLIC = {
    "README.md", "privacy.json", "samples.png", "model_index.json", "model/config.json", "model/generation_config.json",
    "model/model.safetensors", "image_processor/preprocessor_config.json",
}  # fmt: skip
PRIVATE = [
    "privacy_ledger.jsonl", "rng_state.pth", "optimizer.pt", "scheduler.pt", "training_args.bin", "trainer_state.json",
    "model.safetensors", "averaged_weights.safetensors", "privacy_state.json", "tokens/tokens.arrow",
    "tokens/store.json", "training/privacy_ledger.jsonl", "training/checkpoint-2/model.safetensors",
    "training/checkpoint-2/optimizer.pt", "checkpoint-2/config.json", "model/optimizer.pt", "model/training_args.bin",
    "model/adapter/config.json", "model/rng_state_0.pth", "model/averaged_weights.safetensors", "notes.txt",
    "images/private.png", "runs/events.out.tfevents.1", "xmodel_index.json", "model_index.json.bak",
    "super_resolution/../tokens/store.json", "README.md/tokens.arrow", "model/model.safetensors\n",
]  # fmt: skip


@pytest.fixture
def hub(monkeypatch) -> dict[str, bytes]:
    """What the Hub would hold after each commit."""
    received: dict[str, bytes] = {}

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del received[operation.path_in_repo]
                continue
            with operation.as_file() as file:
                received[operation.path_in_repo] = file.read()
        return f"commit to {repo_id}"

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo_id, **options: list(received))
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: type("Url", (), {"repo_id": repo_id}))
    return received


@pytest.fixture
def saved(tmp_path) -> Path:
    """A pipeline with its card in a folder."""
    folder = tmp_path / "pipeline"
    DPSpectralPipeline(tiny_model(), SpectralImageProcessor(image_size=16, num_channels=1)).save_pretrained(folder)
    (folder / "samples.png").write_bytes(b"png")
    PrivacyCard(report()).save(folder)
    return folder


def test_the_allow_list_knows_its_own_and_nothing_else():
    assert all(is_public(name) for name in PUBLIC)
    assert is_public("super_resolution/model-00001-of-00002.safetensors")
    assert is_public("model/model.safetensors.index.json")
    for name in ("text_encoder/model.safetensors", "tokenizer/vocab.txt", "tokenizer/tokenizer.json",
                 "tokenizer/merges.txt", "super_resolution/unet/diffusion_pytorch_model.safetensors",
                 "super_resolution/model_index.json"):  # fmt: skip
        assert is_public(name), name
    alone = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "modeling_spectral.py"}
    assert all(is_public(name, pipeline=False) for name in alone)
    assert not any(is_public(name, pipeline=False) for name in ("evil.py", "model/config.json", "training_args.bin"))
    assert [name for name in PRIVATE if is_public(name)] == []


def test_a_pipeline_is_uploaded_with_its_card_and_whole(saved, hub):
    assert publish(saved, "me/digits") == "commit to me/digits"
    assert set(hub) == PUBLIC == set(public_files(saved))
    assert all(content == (saved / name).read_bytes() for name, content in hub.items())


def test_publishing_again_changes_nothing(saved, hub):
    publish(saved, "me/digits")
    first = dict(hub)
    files = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    pipeline = DPSpectralPipeline.from_pretrained(saved)
    for again in (publish, lambda folder, name: pipeline.push_to_hub(name)):
        assert again(saved, "me/digits") == "commit to me/digits"
        assert hub == first
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == files


def test_private_files_beside_it_are_never_uploaded(saved, hub):
    for name in PRIVATE:
        if ".." not in name and not name.startswith("README.md/"):
            (saved / name).parent.mkdir(parents=True, exist_ok=True)
            if not (saved / name).exists():
                (saved / name).write_bytes(b"secret")
    assert set(public_files(saved)) == PUBLIC
    with pytest.raises(ValueError, match="(?s)is not what its card says.*tokens.arrow is in .*not on the card"):
        publish(saved, "me/digits")
    with pytest.raises(ValueError, match="holds files that no pipeline has"):
        PrivacyCard(report()).save(saved)  # nor does a card vouch for them
    assert hub == {}


def test_hidden_files_stay_here(saved, hub):
    (saved / ".cache").mkdir()
    (saved / ".cache" / "token").write_bytes(b"secret")
    publish(saved, "me/digits")
    assert set(hub) == PUBLIC and b"secret" not in hub.values()


def test_what_an_earlier_upload_left_goes_in_the_same_commit(saved, hub):
    hub |= {"model/model-00001-of-00002.safetensors": b"old", ".gitattributes": b"", "notes.md": b"the owner's"}
    publish(saved, "me/digits")
    assert set(hub) == PUBLIC | {".gitattributes", "notes.md"}


@pytest.mark.parametrize("method", ["push_to_hub", "save_pretrained"])
def test_the_usual_methods_of_diffusers_go_the_same_way(saved, hub, method):
    pipeline = DPSpectralPipeline.from_pretrained(saved)
    readme = (saved / "README.md").read_bytes()
    if method == "push_to_hub":
        assert pipeline.push_to_hub("me/digits") == "commit to me/digits"
    else:
        pipeline.save_pretrained(saved, push_to_hub=True, repo_id="me/digits", private=True)
    assert set(hub) == PUBLIC
    assert hub["README.md"] == readme  # diffusers alone would put a draft that knows nothing of privacy in its place
    assert not [name for name, content in hub.items() if str(saved).encode() in content]  # no path of this machine
    assert json.loads(hub["privacy.json"])["claim"]["epsilon"] == report()["claim"]["epsilon"]


def test_without_its_card_nothing_is_uploaded(tmp_path, hub):
    pipeline = DPSpectralPipeline(tiny_model(), SpectralImageProcessor(image_size=16, num_channels=1))
    with pytest.raises(FileNotFoundError, match="lies in no local folder"):
        pipeline.push_to_hub("me/digits")
    with pytest.raises(FileNotFoundError, match=r"privacy.json does not exist"):
        pipeline.save_pretrained(tmp_path / "pipeline", push_to_hub=True)
    assert hub == {}


def test_a_card_of_other_weights_is_not_uploaded(saved, hub):
    pipeline = DPSpectralPipeline.from_pretrained(saved)
    with torch.no_grad():
        pipeline.model.lm_head.weight += 1
    with pytest.raises(ValueError, match="weights of model in memory are not those in"):
        pipeline.push_to_hub("me/digits")
    pipeline.model.save_pretrained(saved / "model")
    with pytest.raises(ValueError, match="is not what its card says.*model/model.safetensors changed"):
        pipeline.push_to_hub("me/digits")
    assert hub == {}


def test_a_pipeline_is_not_saved_among_private_files(tmp_path):
    DPTrainer(tiny_model(), arguments(tmp_path, save_strategy="steps", save_steps=6), Rows()).train()
    before = sorted(tmp_path.rglob("*"))
    pipeline = DPSpectralPipeline(tiny_model(), SpectralImageProcessor(image_size=16, num_channels=1))
    with pytest.raises(ValueError, match="holds files that no pipeline has .*checkpoint-6/.*folder of its own"):
        pipeline.save_pretrained(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.save_pretrained(tmp_path / "pipeline")  # again, over itself
