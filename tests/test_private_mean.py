"""The main job with a private mean: both runs count, the pipeline chooses, a run goes on where it was."""

import shutil
from types import SimpleNamespace

import controls
import pytest
import torch
from conftest import tiny_model
from critic_parts import network
from datasets import Dataset
from example_jobs import images, of_one_budget, run, run_here, tiny_job
from pipeline_parts import enlarging, of_half_the_side

from hf_spectral_dp import DPSpectralPipeline, MeanCritic, PrivacyCard, SpectralImageProcessor
from hf_spectral_dp.privacy.ledger import read_ledger
from hf_spectral_dp.super_resolution import SpectralSuperResolution


@pytest.fixture
def job(tmp_path) -> dict:
    return tiny_job(tmp_path)


@pytest.fixture
def with_mean(job, tmp_path) -> dict:
    network().save_pretrained(tmp_path / "network")
    section = {"kind": "mean", "target_epsilon": 2.0, "network": str(tmp_path / "network"), "network_source": "none"}
    return {**job, "critic": section, "sampling": {"attempts": 2}, "evaluation": {}}


@pytest.mark.slow
def test_mean_and_training_share_one_budget_and_a_run_goes_on(with_mean, tmp_path):
    done = run(with_mean, tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    report, head = of_one_budget(out, charged=(1, 4))
    assert [stage["name"] for stage in report["stages"]].count("choosing among samples") == 1
    roles = {"codec and prior", "super-resolution", "network that the critic looks through"}
    assert {entry["role"] for entry in report["public_data"]} == roles
    pipe = DPSpectralPipeline.from_pretrained(out / "pipeline")
    assert isinstance(pipe.critic, MeanCritic) and pipe.critic.exponent.abs().sum() > 0
    assert pipe.config.attempts == 2
    assert run(with_mean, tmp_path, "--resume").returncode == 0
    assert read_ledger(out / "critic_training" / "privacy_ledger.jsonl")["head"] == head


def test_runs_that_the_config_declares_count_beside_the_mean(with_mean, tmp_path, monkeypatch):
    """All three, and what they leave is found out before the mean spends."""
    before = {**with_mean, "output": str(tmp_path / "before"), "critic": {}, "sampling": {}}
    before["training"] = {**with_mean["training"], "target_epsilon": 4.0, "max_steps": 2}
    run_here(before, tmp_path, monkeypatch)
    ledger = str(tmp_path / "before" / "training" / "privacy_ledger.jsonl")
    with_mean["training"]["earlier_ledgers"] = [ledger]
    tight = {**with_mean, "critic": {**with_mean["critic"], "target_epsilon": 7.9}}
    with pytest.raises(ValueError, match="the earlier ones cost"):
        run_here(tight, tmp_path, monkeypatch)
    assert not (tmp_path / "out" / "critic_training").exists()
    shutil.rmtree(tmp_path / "out")
    run_here(with_mean, tmp_path, monkeypatch)
    report = PrivacyCard.load(tmp_path / "out" / "pipeline").report
    counted = [earlier["ledger_head"] for earlier in report["mechanism"]["earlier_runs"]]
    mean = tmp_path / "out" / "critic_training" / "privacy_ledger.jsonl"
    assert counted == [read_ledger(path)["head"] for path in (ledger, mean)]
    assert 7.9 < report["claim"]["epsilon"] <= 8


@pytest.fixture
def with_photos(with_mean, tmp_path) -> dict:
    """Its tokens show half the side, and public photos are weighed."""
    of_half_the_side().with_classes(10).save_pretrained(tmp_path / "prior")
    enlarging().save_pretrained(tmp_path / "detail")
    (tmp_path / "photos").mkdir()
    images(20, 2).to_parquet(tmp_path / "photos" / "train.parquet")
    with_mean["critic"] |= {"public": str(tmp_path / "photos"), "public_source": "other noise", "public_steps": 3}
    return with_mean


@pytest.mark.slow
def test_detail_learns_from_public_photos_and_the_card_says_so(with_photos, job, tmp_path):
    with_photos["evaluation"] = job["evaluation"]
    done = run(with_photos, tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    report, _ = of_one_budget(out, charged=(1, 4))
    roles = {entry["role"]: entry["source"] for entry in report["public_data"]}
    assert roles["photos that a private mean weighed"] == "other noise"
    names = [stage["name"] for stage in report["stages"]]
    assert names[-2:] == ["learning the detail", "choosing among samples"]
    pipe = DPSpectralPipeline.from_pretrained(out / "pipeline")
    heads = [run["ledger_head"] for run in report["mechanism"]["earlier_runs"]]
    own = report["accounting"]["ledger"]["head"]
    assert pipe.critic.config.private_runs == heads and pipe.model.config.private_runs == [own]
    assert pipe.super_resolution.config.private_runs == [*heads, own]
    learned = SpectralSuperResolution.from_pretrained(out / "super_resolution").state_dict()
    public = SpectralSuperResolution.from_pretrained(tmp_path / "detail").state_dict()
    used = pipe.super_resolution.state_dict()
    assert all(torch.equal(used[name], value) for name, value in learned.items())
    assert any(not torch.equal(public[name], value) for name, value in learned.items())
    assert run(with_photos, tmp_path, "--resume").returncode == 0
    again = SpectralSuperResolution.from_pretrained(out / "super_resolution").state_dict()
    assert all(torch.equal(again[name], value) for name, value in learned.items())


def test_the_floor_has_the_public_networks_detail(with_photos, tmp_path, monkeypatch):
    """Epsilon 0 would be false for a network that learned from what a private mean weighed, or an earlier run made."""
    given = []

    def drawn(pipeline, model, count, seed, batch_size):
        given.append((pipeline.super_resolution, model))
        return torch.zeros(2, 1, 16, 16), torch.zeros(2).long()

    monkeypatch.setattr(controls, "draw_images", drawn)
    monkeypatch.setattr(controls, "classifier_accuracy", lambda *args, **settings: 0.5)
    monkeypatch.setattr(controls, "through_codec", lambda *args: (None, torch.zeros(2)))
    monkeypatch.setattr(controls, "real_images", lambda *args: (None, torch.zeros(2)))
    monkeypatch.setattr(controls, "trained_without_privacy", lambda *args: of_half_the_side().with_classes(2))
    private, public = of_half_the_side().with_classes(2), of_half_the_side().with_classes(2)
    detail, learned = enlarging(), enlarging()
    processor = SpectralImageProcessor(image_size=16, num_channels=1)
    pipeline = DPSpectralPipeline(private, processor, learned)
    args = SimpleNamespace(output_dir=str(tmp_path / "training"), use_cpu=True, target_epsilon=1.0)
    section = with_photos["data"]
    controls.compare(section, section, pipeline, public, detail, None, args, (None, torch.zeros(2)))
    assert [network is learned for network, _ in given] == [True, False, True] and given[1] == (detail, public)
    given.clear()
    public.config.private_runs = ["ab" * 32]  # counted, or training would have refused it
    rows = controls.compare(section, section, pipeline, public, detail, None, args, (None, torch.zeros(2)))
    assert len(given) == 2 and not any("epsilon 0" in row["metric"] for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"public_source": None}, r"critic has \['public', 'public_steps'\]; the photos that a private mean"),
        ({"public": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_photos_that_cannot_be_read_or_named_end_the_run_before_it_spends(
    with_photos, tmp_path, monkeypatch, change, message
):
    section = {name: value for name, value in {**with_photos["critic"], **change}.items() if value is not None}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_here({**with_photos, "critic": section}, tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_photos_none_of_which_can_be_read_end_the_run_before_it_spends(with_photos, tmp_path, monkeypatch):
    Dataset.from_dict({"image": [b"no image"]}).to_parquet(tmp_path / "photos" / "train.parquet")
    with pytest.raises(ValueError, match=r"critic.public=.*photos': no image in 'image' can be read \(1 rows"):
        run_here(with_photos, tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_private_training_cannot_start_from_what_another_mean_shaped(with_photos, tmp_path, monkeypatch):
    enlarging(private_runs=["ab" * 32]).save_pretrained(tmp_path / "detail")
    with pytest.raises(ValueError, match="model.super_resolution=.* came out of the private run 'abababababab'"):
        run_here(with_photos, tmp_path, monkeypatch)
    taught = of_half_the_side().with_classes(10)
    taught.config.private_runs = ["cd" * 32]
    taught.save_pretrained(tmp_path / "prior")
    with pytest.raises(ValueError, match="model.prior=.* came out of the private run 'cdcdcdcdcdcd'"):
        run_here(with_photos, tmp_path, monkeypatch)


def test_detail_that_no_token_needs_is_refused(with_photos, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "prior")
    with pytest.raises(ValueError, match="is another, or does nothing here"):
        run_here(with_photos, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("change", "sampling", "message"),
    [
        ({"target_epsilon": 8.0}, 2, "critic.target_epsilon=8.0 is a part of training.target_epsilon=8.0"),
        ({"target_epsilon": None}, 2, r"critic lacks \['target_epsilon'\]; examples/configs/faces.yaml explains"),
        ({"share": 0.1}, 2, r"critic of kind mean takes no \['share'\]"),
        ({"kind": "typical"}, 2, "critic.kind='typical' is unknown; use one of classes, mean"),
        ({}, 1, "chooses among sampling.attempts images; give 2 or more"),
    ],
)
def test_what_cannot_work_is_refused_before_any_image_is_read(
    with_mean, tmp_path, monkeypatch, change, sampling, message
):
    section = {name: value for name, value in {**with_mean["critic"], **change}.items() if value is not None}
    broken = {**with_mean, "critic": section, "sampling": {"attempts": sampling}}
    broken["data"] = {**with_mean["data"], "source": str(tmp_path / "nowhere")}
    with pytest.raises(ValueError, match=message):
        run_here(broken, tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_a_model_with_text_has_no_one_mean(with_mean, tmp_path, monkeypatch):
    text = {"text_encoder": "x", "text_encoder_source": "x"}
    broken = {**with_mean, "model": {**with_mean["model"], **text}}
    broken["data"] = {**with_mean["data"], "caption_column": "caption"}
    broken["card"] = {**with_mean["card"], "prompts": ["x"]}
    with pytest.raises(ValueError, match="would draw all prompts towards one mean"):
        run_here(broken, tmp_path, monkeypatch)
