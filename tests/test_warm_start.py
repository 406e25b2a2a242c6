"""The main job with a critic: both runs count, public images teach the classes, a run goes on where it was."""

import shutil
from pathlib import Path

import critics
import pytest
import torch
import warm_start
import yaml
from conftest import tiny_model
from critic_parts import network
from example_jobs import images, of_one_budget, run, run_here, tiny_job

from hf_spectral_dp import ClassCritic, DPSpectralPipeline, DPTrainingArguments, SpectralImageProcessor
from hf_spectral_dp.feature_rows import RowsInMemory
from hf_spectral_dp.privacy.ledger import read_ledger
from hf_spectral_dp.token_store import build_token_store


@pytest.fixture
def job(tmp_path) -> dict:
    return tiny_job(tmp_path)


@pytest.fixture
def with_critic(job, tmp_path) -> dict:
    network().save_pretrained(tmp_path / "network")
    (tmp_path / "photos").mkdir()
    images(50, 2).to_parquet(tmp_path / "photos" / "train.parquet")
    section = {
        "target_epsilon": 2.0, "public": str(tmp_path / "photos"), "public_source": "noise", "max_steps": 3,
        "network": str(tmp_path / "network"), "network_source": "none", "public_steps": 3, "share": 0.2,
    }  # fmt: skip
    return {**job, "critic": section, "sampling": {"attempts": 2}, "evaluation": {}}


@pytest.mark.slow
def test_critic_and_training_share_one_budget(with_critic, tmp_path):
    done = run(with_critic, tmp_path)
    assert done.returncode == 0, done.stderr
    report, _ = of_one_budget(tmp_path / "out", charged=(3, 4))
    assert {"role": "photos that a private critic chose", "source": "noise"} in report["public_data"]
    assert {"role": "network that the critic looks through", "source": "none"} in report["public_data"]
    pipe = DPSpectralPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert pipe.critic is not None and pipe.config.attempts == 2


@pytest.mark.slow
def test_a_run_goes_on_with_the_critic_that_it_paid_for(with_critic, tmp_path):
    """The critic's own ledger lets nobody train it twice; a later stage that is missing is made again."""
    assert run(with_critic, tmp_path).returncode == 0
    ledger = tmp_path / "out" / "critic_training" / "privacy_ledger.jsonl"
    head = read_ledger(ledger)["head"]
    shutil.rmtree(tmp_path / "out" / "public_model")
    assert run(with_critic, tmp_path, "--resume").returncode == 0
    assert read_ledger(ledger)["head"] == head
    shutil.rmtree(tmp_path / "out" / "public_model")
    shutil.rmtree(tmp_path / "out" / "training")  # killed before private training began
    (tmp_path / "out" / "pipeline").rename(tmp_path / "before")
    assert run(with_critic, tmp_path, "--resume").returncode == 0
    of_one_budget(tmp_path / "out", charged=(3, 4))
    shutil.rmtree(tmp_path / "out" / "training")
    shutil.rmtree(tmp_path / "out" / "critic")  # killed while the critic was trained: its ledger refuses to begin again
    shutil.rmtree(tmp_path / "out" / "public_model")
    again = run(with_critic, tmp_path, "--resume")
    assert again.returncode != 0 and "its charges count" in again.stderr
    assert not (tmp_path / "out" / "training" / "privacy_ledger.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_epsilon": 8.0}, "critic.target_epsilon=8.0 is a part of training.target_epsilon=8.0"),
        ({"public_source": None}, "critic lacks"),
        ({"photos": "x"}, "critic has unknown fields"),
        ({"share": 1.5}, r"critic.share=1.5 must be in \(0, 1\]"),
        ({"public_steps": 0}, "critic.public_steps=0 must be a whole number of at least 1"),
        ({"target_epsilon": "1"}, "critic.target_epsilon='1' must be a number above 0, without quotes"),
    ],
)
def test_what_cannot_work_is_refused_before_any_image_is_read(with_critic, tmp_path, monkeypatch, change, message):
    section = {name: value for name, value in {**with_critic["critic"], **change}.items() if value is not None}
    broken = {**with_critic, "critic": section, "data": {**with_critic["data"], "source": str(tmp_path / "nowhere")}}
    with pytest.raises(ValueError, match=message):
        run_here(broken, tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_a_critic_needs_labels(with_critic, tmp_path, monkeypatch):
    data = {name: value for name, value in with_critic["data"].items() if name != "label_column"}
    with pytest.raises(ValueError, match="a critic tells classes apart, and data.label_column names none"):
        run_here({**with_critic, "data": data, "evaluation": {}}, tmp_path, monkeypatch)


def test_one_claim_needs_one_relation(with_critic, tmp_path, monkeypatch):
    """Noticed before the critic spends, not when the plan of the training is made."""
    training = {**with_critic["training"], "sampling": "truncated_poisson", "max_batch_size": 30}
    with pytest.raises(ValueError, match="training.sampling='truncated_poisson' is accounted under another relation"):
        run_here({**with_critic, "training": training}, tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_weights": [1.0]}, r"scale_weights=\[1.0\] for a model of"),
        ({"expected_batch_size": 61}, "expected_batch_size=61 is larger than the data"),
        ({"optim": "sgd", "learning_rate": -1.0}, "Invalid learning rate: -1.0"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "could not convert string to float: 'much'"),
    ],
)
def test_what_training_would_refuse_is_refused_before_the_critic_spends(
    with_critic, tmp_path, monkeypatch, change, message
):
    """Rows that only the store can count included; the critic's budget would be lost."""
    data = {name: value for name, value in with_critic["data"].items() if name != "num_examples"}
    broken = {**with_critic, "data": data, "training": {**with_critic["training"], **change}}
    with pytest.raises(ValueError, match=message):
        run_here(broken, tmp_path, monkeypatch)
    assert not (tmp_path / "out" / "critic_training").exists()


def test_a_critic_is_as_secure_as_the_run_that_it_belongs_to():
    args = DPTrainingArguments(
        output_dir="x", target_epsilon=10.0, expected_batch_size=8, use_cpu=True, secure_mode=True
    )
    assert critics.private_arguments({"target_epsilon": 1.0}, args, Path("x")).secure_mode


def test_a_critic_names_the_runs_that_its_rows_were_shown_by(tmp_path):
    """Its own ledger does not count them; taken elsewhere, it would hide what they cost."""
    args = DPTrainingArguments(output_dir="x", target_epsilon=10.0, expected_batch_size=8, use_cpu=True)
    critic = ClassCritic.on(network(), 2)
    rows = RowsInMemory(torch.cat([torch.arange(40.0)[:, None] % 2, torch.randn(40, len(critic.mean))], 1))
    model = tiny_model()
    model.config.private_runs = ["ab" * 32]
    critics.trained(critic, rows, {"target_epsilon": 1.0, "max_steps": 1}, args, tmp_path, model, None)
    own = read_ledger(critics.ledger_of(tmp_path))["head"]
    assert ClassCritic.from_pretrained(tmp_path / "critic").config.private_runs == [own, "ab" * 32]


def test_every_photo_stands_for_the_class_that_it_was_chosen_for(tmp_path):
    model = tiny_model().eval()
    processor = SpectralImageProcessor(image_size=16, num_channels=1)
    store = build_token_store(
        iter([{"image": image} for image in images(6, 0)["image"]]), model, processor, tmp_path / "store"
    )
    chosen = warm_start.Chosen(store, torch.tensor([[5, 1], [1, 0], [3, 3]]), model)
    rows = warm_start.Rows(chosen, model.config, warm_start.CLASS_DROPOUT)
    assert len(rows) == 6
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [rows[index] for _ in range(60) for index in range(6)]
    assert all(torch.equal(row["input_ids"], row["labels"]) for row in found)
    first = torch.stack([row["input_ids"][0] for row in found]).view(60, 6)
    null, classes = model.config.null_token_id, model.config.class_token_ids
    assert 0.04 < first.eq(null).float().mean() < 0.2
    for index, label in enumerate((0, 0, 1, 1, 2, 2)):
        assert set(first[:, index].tolist()) <= {null, classes[label]}
    tokens = torch.stack([row["input_ids"][1:] for row in found[:6]])
    assert torch.equal(tokens, store[torch.tensor([5, 1, 1, 0, 3, 3])]["input_ids"][:, 1:])


def test_the_settings_of_the_recipe_are_those_of_the_config():
    """cifar10.yaml explains defaults; they must be the ones that hold."""
    config = Path(warm_start.__file__).parent / "configs" / "cifar10.yaml"
    section = yaml.safe_load(config.read_text())["critic"]
    args = DPTrainingArguments(output_dir="x", target_epsilon=10.0, expected_batch_size=8, use_cpu=True)
    assert (section["share"], section["public_steps"]) == (warm_start.SHARE, warm_start.PUBLIC_STEPS)
    short = {"target_epsilon": section["target_epsilon"]}
    for name in ("learning_rate", "max_steps", "target_epsilon"):
        chosen = [getattr(critics.private_arguments(some, args, Path("x")), name) for some in (section, short)]
        assert chosen[0] == chosen[1] == section[name]
