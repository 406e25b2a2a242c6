"""Resuming a DPTrainer: from whole checkpoints only, under the ledger that paid for them, with fresh noise."""

import json
import shutil

import pytest
import torch
from conftest import tiny_model
from training_parts import Rows, arguments
from transformers import TrainerCallback

from hf_spectral_dp import DPTrainer
from hf_spectral_dp.checkpoint_files import STATE, CheckpointError, verify
from hf_spectral_dp.privacy.ledger import BudgetExhausted, LedgerError, read_ledger
from hf_spectral_dp.trainer import LEDGER

ARGS = {
    "save_strategy": "steps", "save_steps": 1, "logging_strategy": "no", "target_epsilon": 1.0,
    "expected_batch_size": 30,
}  # fmt: skip


class Interrupt(TrainerCallback):
    """As if the process had died: after the step, before its save."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer_in(folder, rows=None, **changes) -> DPTrainer:
    return DPTrainer(tiny_model(), arguments(folder, **{**ARGS, **changes}), rows or Rows())


def interrupted(folder, step: int, **changes) -> None:
    trainer = trainer_in(folder, **changes)
    trainer.add_callback(Interrupt(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def charged(folder) -> int:
    return read_ledger(folder / LEDGER)["charged"]


def test_every_checkpoint_names_the_charges_it_holds(tmp_path):
    trainer_in(tmp_path).train()
    hashes = [json.loads(line)["hash"] for line in (tmp_path / LEDGER).read_text().splitlines()]
    for step in range(1, 7):
        state = verify(tmp_path / f"checkpoint-{step}")
        assert state["charged"] == step and state["ledger_head"] == hashes[step]
        assert not list((tmp_path / f"checkpoint-{step}").glob("rng_state*"))


def test_a_damaged_checkpoint_is_refused_and_passed_over(tmp_path, caplog):
    interrupted(tmp_path, 4)
    weights = tmp_path / "checkpoint-3" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors has changed on disk"):
        trainer_in(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    trainer = trainer_in(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert "resuming from" in caplog.text and "model.safetensors has changed" in caplog.text
    # Charged: two steps that are in checkpoint-2, two that are lost, two more.
    assert charged(tmp_path) == 6 and trainer.state.global_step == 4


def test_a_run_that_died_before_its_first_checkpoint_goes_on_and_has_paid(tmp_path, caplog):
    with pytest.raises(ValueError, match="holds no checkpoint to resume from, no ledger"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    interrupted(tmp_path, 2, save_steps=3)
    assert not list(tmp_path.glob("checkpoint-*"))
    trainer = trainer_in(tmp_path, save_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert "2 charged steps are lost, and stay paid" in caplog.text
    assert charged(tmp_path) == trainer.privacy_report()["mechanism"]["charged_steps"] == 6


def test_a_run_whose_budget_is_charged_and_whose_weights_are_lost_is_not_gone_on_with(tmp_path):
    """The model would be the public one, beside a claim of what was spent."""
    trainer_in(tmp_path, save_strategy="no").train()
    again = trainer_in(tmp_path, save_strategy="no")
    for _ in range(2):  # and the ledger is let go
        with pytest.raises(CheckpointError, match="all 6 steps of .* nothing is left to train"):
            again.train(resume_from_checkpoint=True)
    assert charged(tmp_path) == 6


def test_a_run_made_shorter_by_crashes_ends_with_a_saved_model(tmp_path):
    """The budget ends it before the planned number of steps, where transformers would save nothing."""
    interrupted(tmp_path, 4, save_steps=100)
    trainer = trainer_in(tmp_path, save_steps=100)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2 and charged(tmp_path) == 6
    assert verify(tmp_path / "checkpoint-2")["charged"] == 6
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(saved.lm_head.weight, trainer.model.lm_head.weight)


def test_the_filter_refuses_more_steps_than_the_plan_however_they_are_asked_for(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.args.max_steps = 12
    trainer.args.num_train_epochs = 5
    trainer.train()
    assert trainer.state.global_step == charged(tmp_path) == 6
    assert verify(tmp_path / "checkpoint-6") and trainer.epsilon_spent <= 1.0
    again = trainer_in(tmp_path)
    again.train(resume_from_checkpoint=True)
    again._ledger = again._ledger.open(tmp_path / LEDGER, again._ledger.header, 6)
    with pytest.raises(BudgetExhausted):
        again._charge()


def test_repeated_steps_draw_fresh_noise_and_are_charged_again(tmp_path):
    """All rows in every batch, so that noise is all that may differ between two repetitions of one step."""
    changes = {"expected_batch_size": 60, "optim": "sgd", "max_steps": 6}
    interrupted(tmp_path, 3, **changes)
    assert charged(tmp_path) == 3
    weights = []
    for expected in (4, 5):
        trainer = trainer_in(tmp_path, **changes)
        trainer.add_callback(Interrupt(3))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert charged(tmp_path) == expected
        weights.append(trainer.model.lm_head.weight.detach().clone())
    planned = trainer.plan.noise_multiplier * trainer.args.clipping_norm / 60 * float(trainer._get_learning_rate())
    assert float((weights[0] - weights[1]).std()) > planned / 2


def test_weights_of_a_checkpoint_are_marked_before_the_next_charge(tmp_path):
    """Whoever stops a resumed run before its first step holds private weights."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    interrupted(tmp_path, 3)
    again = trainer_in(tmp_path)
    again.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=True)
    assert again.model.config.private_runs == [read_ledger(tmp_path / LEDGER)["head"]]


def test_an_interrupted_step_leaves_nothing_for_the_next_one(tmp_path):
    """In a notebook the same trainer goes on; an example of the lost batch must not enter the sum of another."""
    trainer = trainer_in(tmp_path)
    losses, calls = trainer._losses, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*arguments)

    trainer._losses = broken
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(calls) == 3 and all(not total.any() for total in trainer._clipper.take().values())
    trainer.train(resume_from_checkpoint=True)
    assert charged(tmp_path) == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_epsilon": 2.0}, "header differs in.*plan"),
        ({"target_delta": 1e-3}, "header differs in.*plan"),
        ({"max_steps": 7}, "header differs in.*plan"),
        ({"expected_batch_size": 20}, "header differs in.*plan"),
        ({"clipping_norm": 2.0}, "header differs in.*clipping_norm"),
        ({"lora_rank": 2}, "header differs in.*trainable"),
    ],
)
def test_another_mechanism_is_refused(tmp_path_factory, changes, message):
    folder = tmp_path_factory.getbasetemp() / "shared-run"
    if not folder.exists():
        trainer_in(folder, save_steps=6).train()
    before = (folder / LEDGER).read_bytes()
    with pytest.raises(LedgerError, match=message):
        trainer_in(folder, **changes).train(resume_from_checkpoint=True)
    assert (folder / LEDGER).read_bytes() == before


def test_adapters_of_another_rank_are_refused(tmp_path):
    trainer_in(tmp_path, lora_rank=2, save_steps=6).train()
    with pytest.raises(LedgerError, match="header differs in.*trainable"):
        trainer_in(tmp_path, lora_rank=3).train(resume_from_checkpoint=True)


def test_averages_that_were_not_saved_are_refused(tmp_path):
    trainer_in(tmp_path, save_steps=6).train()
    with pytest.raises(CheckpointError, match="no averaged weights; resume with ema_decay=0"):
        trainer_in(tmp_path, ema_decay=0.9).train(resume_from_checkpoint=True)


def test_a_ledger_behind_the_checkpoint_is_refused(tmp_path):
    interrupted(tmp_path, 3)
    old = (tmp_path / LEDGER).read_bytes()
    trainer_in(tmp_path).train(resume_from_checkpoint=True)
    (tmp_path / LEDGER).write_bytes(old)
    with pytest.raises(LedgerError, match="never reached expected_head"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)


def test_leftovers_of_a_save_are_cleared_and_never_resumed_from(tmp_path):
    interrupted(tmp_path, 3)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / ".incomplete" / "checkpoint-5")
    trainer = trainer_in(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5 and charged(tmp_path) == 6
    assert not (tmp_path / ".incomplete").exists()


def test_a_failed_save_ends_the_run_and_says_what_to_do(tmp_path, monkeypatch):
    interrupted(tmp_path, 3)
    trainer = trainer_in(tmp_path)

    def full(*arguments, **keywords):
        raise RuntimeError("file write failed")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match="checkpoint-3 could not be saved .file write failed.*Make room"):
            trainer.train(resume_from_checkpoint=True)
    assert not (tmp_path / "checkpoint-3").exists() and not (tmp_path / ".incomplete").exists()
    again = trainer_in(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and charged(tmp_path) == 6


def test_rotation_keeps_the_newest(tmp_path):
    trainer_in(tmp_path, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert all((path / STATE).exists() for path in tmp_path.glob("checkpoint-*"))
