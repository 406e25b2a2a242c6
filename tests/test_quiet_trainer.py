"""What leaves a run by itself: nothing that depends on a row, no key of the noise, no password, no upload."""

import json
import os
from pathlib import Path

import card_reports
import pytest
import torch
from conftest import tiny_model
from training_parts import Rows, arguments
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_spectral_dp import DPSpectralPipeline, DPTrainer, PrivacyCard, SpectralImageProcessor
from hf_spectral_dp.codec import codec_fingerprint
from hf_spectral_dp.privacy.ledger import LedgerError
from hf_spectral_dp.quiet_trainer import PUBLIC_LOGS, UNPROTECTED_LOSS

SAVING = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


class Tracker(TrainerCallback):
    """Keeps what a tracker is given: everything but the objects that every callback gets."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append({"history": [dict(entry) for entry in state.log_history], "flos": state.total_flos,
                          "tokens": state.num_input_tokens_seen, "best": state.best_metric})  # fmt: skip


def run(folder: Path, rows: Rows | None = None, **changes) -> tuple[DPTrainer, Tracker, dict]:
    tracker = Tracker()
    trainer = DPTrainer(tiny_model(), arguments(folder, **{**SAVING, **changes}), rows or Rows(), callbacks=[tracker])
    return trainer, tracker, trainer.train().metrics


def test_logs_states_and_metrics_do_not_depend_on_the_rows(tmp_path):
    """Two data sets of equal size, other rows, other batches: everything that is told about the run is equal."""
    told = []
    for seed in range(2):
        trainer, tracker, metrics = run(tmp_path / str(seed), Rows(seed=seed))
        states = [json.loads(path.read_text()) for path in sorted((tmp_path / str(seed)).glob("*/trainer_state.json"))]
        assert len(states) == 3
        told.append((tracker.seen, states, metrics, trainer.state.log_history))
    assert told[0] == told[1]
    assert set(told[0][2]) <= PUBLIC_LOGS
    assert all(set(entry) <= PUBLIC_LOGS | {"step"} for entry in told[0][3]) and len(told[0][3]) == 7


def test_report_and_pipeline_do_not_depend_on_the_rows(tmp_path):
    """So no histogram of labels, no count of rows left out, no codebook or constant taken from private images."""
    facts = []
    for seed in range(2):
        rows = Rows(seed=seed)
        if seed:
            rows.rows[:, 0] = rows.rows[0, 0]  # one class only
            rows.report = {"images": 60, "undecodable": 1234, "unlabelled": 7}
        trainer, _, _ = run(tmp_path / str(seed), rows, save_strategy="no")
        report = trainer.privacy_report()
        head = report["accounting"]["ledger"].pop("head")  # of random numbers
        folder = tmp_path / str(seed) / "pipeline"
        processor = SpectralImageProcessor(image_size=16, num_channels=1)
        DPSpectralPipeline(trainer.merged_model(), processor).save_pretrained(folder)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        config = files["model/config.json"]
        assert config.count(head.encode()) == 1
        files["model/config.json"] = config.replace(head.encode(), b"")
        weights = files.pop("model/model.safetensors")
        facts.append((report, files, codec_fingerprint(trainer.model.codec)))
        facts[-1][1]["size of the weights"] = len(weights)
    assert facts[0] == facts[1] and facts[0][2] == codec_fingerprint(tiny_model().codec)


@pytest.mark.parametrize("kind", ["buffer", "replaced buffer", "frozen weight", "batch norm"])
def test_what_a_forward_pass_learns_beside_the_gradients_is_refused(tmp_path, kind):
    model = tiny_model()
    norm = torch.nn.BatchNorm1d if kind == "batch norm" else torch.nn.InstanceNorm1d
    model.beside = norm(3, affine=False, track_running_stats=True)
    model.frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    loss = model.per_example_loss

    def learning(input_ids):
        first = input_ids[:, :3].float()
        with torch.no_grad():
            match kind:
                case "buffer":
                    model.beside.running_mean.copy_(first.mean(0))
                case "replaced buffer":
                    model.beside.running_var = first.mean(0)
                case "frozen weight":
                    model.frozen.add_(first.mean(0))
                case "batch norm":
                    model.beside(torch.cat([first, first]))
        return loss(input_ids)

    model.per_example_loss = learning
    trainer = DPTrainer(model, arguments(tmp_path, **{**SAVING, "save_steps": 1}), Rows())
    refusal = "beside is a BatchNorm1d" if kind == "batch norm" else "(beside|frozen).* changed while private rows"
    with pytest.raises(ValueError, match=refusal):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def written(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def holding(files: dict[str, bytes], key: bytes) -> list[str]:
    """Files in which a key can be read: as it is, turned around, in hexadecimal or in decimal digits."""
    number = int.from_bytes(key, "little")
    forms = [key, key[::-1], key.hex().encode(), key[::-1].hex().encode(), str(number).encode()]
    return [name for name, content in files.items() if any(form in content.lower() for form in map(bytes.lower, forms))]


@pytest.fixture
def keys(monkeypatch) -> list[bytes]:
    """All keys that noise and sampling take from the operating system."""
    taken, original = [], os.urandom
    monkeypatch.setattr(
        "hf_spectral_dp.privacy.noise.os.urandom", lambda size: (taken.append(original(size)), taken[-1])[1]
    )
    return taken


@pytest.mark.parametrize("philox", [False, True])
def test_no_key_is_ever_written(tmp_path, keys, monkeypatch, philox):
    if philox:
        monkeypatch.setattr("hf_spectral_dp.privacy.noise._PHILOX_DEVICES", ("cpu",))
    run(tmp_path)
    assert len(keys) >= 2 + 6 * philox and len(set(keys)) == len(keys)
    files = written(tmp_path)
    assert any(name.endswith("training_args.bin") for name in files) and len(files) > 15
    assert [name for key in keys for name in holding(files, key)] == []
    for number, form in enumerate((keys[0], keys[0].hex().encode(), str(int.from_bytes(keys[0], "little")).encode())):
        assert holding({"planted": b"..." + form + b"..."}, keys[0]) == ["planted"], number  # the search can find


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_noise_differs_across_steps_and_resumes_and_is_rekeyed(tmp_path, keys):
    """Four steps, then again from the second checkpoint: steps 3 and 4 are repeated, with other noise."""
    drawn = []

    def trainer(*callbacks: TrainerCallback) -> DPTrainer:
        made = DPTrainer(tiny_model(), arguments(tmp_path, **SAVING), Rows(), callbacks=list(callbacks))
        add = made._noise.add_

        def record(tensors):
            tensors = list(tensors)
            before = [tensor.clone() for tensor in tensors]
            add(tensors)
            drawn.append(torch.cat([(new - old).flatten() for new, old in zip(tensors, before, strict=True)]))

        made._noise.add_ = record
        return made

    trainer(StopAt(4)).train()
    first = len(keys)
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(drawn) == 6 and len(set(keys)) == len(keys)
    # Each run has its own, and each of six steps two for coins: those of reading the rows, and of the model.
    assert len(keys) == first + (first - 2 * 4) + 2 * 2
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 6 / len(one) ** 0.5


def test_passwords_stay_out_of_the_checkpoints(tmp_path):
    trainer, _, _ = run(tmp_path, hub_token="hf_verysecret")
    assert trainer.args.hub_token == "hf_verysecret"
    files = written(tmp_path)
    assert not [name for name, content in files.items() if b"hf_verysecret" in content]
    [path] = [path for path in files if path.endswith("checkpoint-6/training_args.bin")]
    loaded = torch.load(path, weights_only=False)
    assert loaded.hub_token is None and loaded.target_epsilon == 8.0


@pytest.mark.parametrize(
    "name",
    [
        "evaluate", "predict", "prediction_step", "evaluation_loop", "hyperparameter_search", "push_to_hub",
        "init_hf_repo", "create_model_card", "_push_from_checkpoint",
    ],
)  # fmt: skip
def test_what_measures_or_uploads_is_refused(tmp_path, name):
    trainer = DPTrainer(tiny_model(), arguments(tmp_path), Rows())
    with pytest.raises(ValueError, match=rf"DPTrainer\.{name} is refused: .{{20}}"):
        getattr(trainer, name)("anything")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        lambda args: args.set_push_to_hub("me/model"),
        lambda args: args.set_evaluate("steps", steps=1),
        lambda args: setattr(args, "include_num_input_tokens_seen", "all"),
        lambda args: setattr(args, "gradient_accumulation_steps", 2),
    ],
)
def test_what_is_refused_cannot_be_set_afterwards(tmp_path, change):
    args = arguments(tmp_path)
    trainer = DPTrainer(tiny_model(), args, Rows())
    change(args)
    with pytest.raises(ValueError, match="cannot be used with DPTrainer"):
        trainer.train()
    assert not list(tmp_path.iterdir())  # nothing was charged


@pytest.mark.parametrize(
    "tracker, variable",
    [("wandb", "WANDB_LOG_MODEL"), ("clearml", "CLEARML_LOG_MODEL"), ("mlflow", "HF_MLFLOW_LOG_ARTIFACTS")],
)
def test_a_tracker_that_uploads_checkpoints_is_refused(tmp_path, monkeypatch, tracker, variable):
    args = arguments(tmp_path)
    args.report_to = [tracker]
    monkeypatch.setenv(variable, "false")
    args.refuse_what_breaks_the_guarantee()
    monkeypatch.setenv(variable, "checkpoint")
    with pytest.raises(ValueError, match=f"{variable}='checkpoint' lets {tracker} upload"):
        args.refuse_what_breaks_the_guarantee()
    args.report_to = []
    args.refuse_what_breaks_the_guarantee()
    given = object.__new__(INTEGRATION_TO_CALLBACK[tracker])  # as callbacks=[MLflowCallback()] gives it
    given._auto_end_run = False  # or it would end a run of MLflow when it goes
    with pytest.raises(ValueError, match=f"lets {tracker} upload"):
        args.refuse_what_breaks_the_guarantee([given])


def test_a_logged_loss_is_asked_for_and_marked(tmp_path):
    losses = []
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, **SAVING, log_private_loss=True), Rows())
    note = trainer.note
    trainer.note = lambda values: (losses.append(values.detach()), note(values))
    with pytest.warns(UserWarning, match="guarantee does not cover it") as warned:
        trainer.train()
    assert len([warning for warning in warned if "log_private_loss" in str(warning.message)]) == 1
    logged = [entry[UNPROTECTED_LOSS] for entry in trainer.state.log_history if UNPROTECTED_LOSS in entry]
    assert len(logged) == 6 and "loss" not in trainer.state.log_history[0]
    assert min(map(float, map(torch.min, losses))) <= min(logged) <= max(logged) <= max(float(x.max()) for x in losses)

    report = {**trainer.privacy_report(), **card_reports.PUBLISHED}
    readme = PrivacyCard(report).render()
    assert "- **Not covered:** the loss on private rows was logged" in readme and "all logs: no" in readme
    silent = {**report, "data_accesses": report["data_accesses"][:1]}
    with pytest.raises(ValueError, match="training.private_loss_logged=True, but data_accesses lists no"):
        PrivacyCard(silent)
    quiet_report = {**card_reports.report(), "data_accesses": report["data_accesses"][:1]}
    assert "**Not covered:**" not in PrivacyCard(quiet_report).render()

    quiet = DPTrainer(tiny_model(), arguments(tmp_path, **SAVING), Rows())
    with pytest.raises(LedgerError, match="log_private_loss"):
        quiet.train(resume_from_checkpoint=True)  # else the mark would be gone with the second half of the run
