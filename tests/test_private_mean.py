"""The main job with a private mean: both runs count, the pipeline chooses, a run goes on where it was."""

import pytest
from test_critic import network
from test_examples import job, run, run_here  # noqa: F401  (job is a fixture)
from test_warm_start import of_one_budget

from hf_spectral_dp import DPSpectralPipeline, MeanCritic
from hf_spectral_dp.privacy.ledger import read_ledger


@pytest.fixture
def with_mean(job, tmp_path) -> dict:  # noqa: F811
    network().save_pretrained(tmp_path / "network")
    section = {"kind": "mean", "target_epsilon": 2.0, "network": str(tmp_path / "network")}
    return {**job, "critic": section, "sampling": {"attempts": 2}, "evaluation": {}}


@pytest.mark.slow
def test_mean_and_training_share_one_budget_and_a_run_goes_on(with_mean, tmp_path):
    done = run(with_mean, tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    report, head = of_one_budget(out, charged=(1, 4))
    assert [stage["name"] for stage in report["stages"]].count("choosing among samples") == 1
    assert {entry["role"] for entry in report["public_data"]} == {"codec and prior", "super-resolution"}
    pipe = DPSpectralPipeline.from_pretrained(out / "pipeline")
    assert isinstance(pipe.critic, MeanCritic) and pipe.critic.exponent.abs().sum() > 0
    assert pipe.config.attempts == 2
    assert run(with_mean, tmp_path, "--resume").returncode == 0
    assert read_ledger(out / "critic" / "training" / "privacy_ledger.jsonl")["head"] == head


@pytest.mark.parametrize(
    ("change", "sampling", "message"),
    [
        ({"target_epsilon": 8.0}, 2, "critic.target_epsilon=8.0 is a part of training.target_epsilon=8.0"),
        ({"target_epsilon": None}, 2, r"critic lacks \['target_epsilon'\]; examples/configs/faces.yaml explains"),
        ({"public": "x"}, 2, r"critic of kind mean takes no \['public'\]"),
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
