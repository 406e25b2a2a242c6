"""DPTrainer: the update is what the mechanism says, nothing private is written, a resumed run pays for all steps."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import tiny_model, wild
from peft import LoraConfig, get_peft_model
from torch import nn
from training_parts import Rows, arguments
from transformers import TrainerCallback

from hf_spectral_dp import DPTrainer, privacy_report
from hf_spectral_dp.privacy.ledger import LedgerError, read_ledger
from hf_spectral_dp.trainer import LEDGER


def test_a_run_spends_its_budget_and_reports_it(tmp_path):
    trainer = DPTrainer(tiny_model(), arguments(tmp_path), Rows())
    trainer.train()
    report = trainer.privacy_report()
    assert 0.99 * 8 < report["claim"]["epsilon"] <= 8
    assert report["claim"]["epsilon"] == trainer.plan.epsilon(6) == trainer.epsilon_spent
    assert report["mechanism"]["charged_steps"] == report["accounting"]["ledger"]["records"] == 6
    ledger = read_ledger(tmp_path / LEDGER)
    assert ledger["charged"] == 6 and ledger["head"] == report["accounting"]["ledger"]["head"]
    json.dumps(report, allow_nan=False)


def test_a_run_from_a_source_folder_keeps_its_report(tmp_path, monkeypatch):
    """The budget is spent by then: that the package is not installed is no reason to lose what was proven."""
    known = privacy_report.metadata.version

    def version(name: str) -> str:
        if name == "hf_spectral_dp":
            raise privacy_report.metadata.PackageNotFoundError(name)
        return known(name)

    trainer = DPTrainer(tiny_model(), arguments(tmp_path), Rows())
    trainer.train()
    monkeypatch.setattr(privacy_report.metadata, "version", version)
    software = {entry["name"]: entry["version"] for entry in trainer.privacy_report()["software"]}
    assert software["hf_spectral_dp"] == "not installed" and software["torch"] == torch.__version__


@pytest.mark.parametrize("scale_weights", [None, [1.0, 0.5, 0.25]])
def test_without_noise_the_step_is_the_clipped_mean(tmp_path, monkeypatch, scale_weights):
    """All rows in every batch, no noise: plain SGD on the mean of gradients clipped one by one."""
    model, rows = tiny_model(), Rows(9)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for row in rows.rows:
        model.zero_grad()
        model.per_example_loss(row[None], scale_weights=scale_weights).sum().backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected[name] -= 0.5 * parameter.grad * min(1.0, 0.3 / float(norm)) / 9
    model.zero_grad()
    args = arguments(
        tmp_path, expected_batch_size=9, max_steps=1, clipping_norm=0.3, optim="sgd", learning_rate=0.5,
        lr_scheduler_type="constant", scale_weights=scale_weights,
    )  # fmt: skip
    trainer = DPTrainer(model, args, rows)
    monkeypatch.setattr(trainer._noise, "add_", lambda tensors: None)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=2e-6)


def test_the_noise_has_the_planned_scale(tmp_path):
    """A learning rate of 1 on no signal (a clipping norm far below the noise) shows the noise itself."""
    before = tiny_model()
    args = arguments(tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant")
    trainer = DPTrainer(tiny_model(), args, Rows())
    sizes = []
    original = trainer._noise.add_
    trainer._noise.add_ = lambda tensors: (sizes.append(1), original(tensors))[1]
    trainer.train()
    assert sizes == [1]  # once per step, not per micro-batch
    moved = torch.cat(
        [(b - a).flatten() for a, b in zip(before.parameters(), trainer.model.parameters(), strict=True)]
    ).detach()
    planned = trainer.plan.noise_multiplier * args.clipping_norm / trainer.plan.expected_batch_size
    # 5,000 draws give 1 % accuracy; the clipped mean adds at most 1 / sqrt(5,000) of its norm per coordinate.
    assert float(moved.std()) == pytest.approx(planned, rel=0.06)


def test_neither_seed_nor_global_state_fixes_noise_or_batches(tmp_path):
    weights = []
    for run in range(2):
        trainer = DPTrainer(tiny_model(), arguments(tmp_path / str(run), seed=1, data_seed=1), Rows())
        torch.manual_seed(0)
        trainer.train()
        weights.append(trainer.model.lm_head.weight.detach().clone())
    assert not torch.allclose(weights[0], weights[1])


def test_no_hook_on_backward_sees_a_private_loss(tmp_path, monkeypatch):
    """Comet logs the value of every tensor that `backward` is called on: the bare loss of a part of a batch."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **given: pytest.fail("a loss was shown"))
    DPTrainer(tiny_model(), arguments(tmp_path), Rows()).train()


def test_an_empty_batch_is_still_a_noisy_charged_step(tmp_path):
    args = arguments(tmp_path, expected_batch_size=None, sampling_rate=1e-6, max_steps=3)
    trainer = DPTrainer(tiny_model(), args, Rows())
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert read_ledger(tmp_path / LEDGER)["charged"] == 3
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_no_noise_is_drawn_unless_it_was_paid_for(tmp_path):
    """A ledger that refuses the second charge: one step, one helping of noise, and the weights stay where they were."""
    trainer = DPTrainer(tiny_model(), arguments(tmp_path), Rows())
    events, weights, charge, add = [], [], trainer._charge, trainer._noise.add_

    def charged_once():
        weights.append(trainer.model.lm_head.weight.detach().clone())
        if "charge" in events:
            raise LedgerError("refused")
        charge()
        events.append("charge")

    trainer._charge = charged_once
    trainer._noise.add_ = lambda tensors: (events.append("noise"), add(tensors))[1]
    with pytest.raises(LedgerError, match="refused"):
        trainer.train()
    assert events == ["charge", "noise"]
    assert torch.equal(trainer.model.lm_head.weight, weights[-1]) and not torch.equal(weights[0], weights[1])


def test_nothing_private_is_logged_or_stored(tmp_path):
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, save_strategy="steps", save_steps=3), Rows())
    output = trainer.train()
    allowed = {"learning_rate", "epoch", "epsilon", "step", "train_runtime", "train_steps_per_second"}
    assert all(set(entry) <= allowed for entry in trainer.state.log_history)
    assert set(output.metrics) <= allowed and np.isnan(output.training_loss)
    assert len(states := list(tmp_path.glob("checkpoint-*/trainer_state.json"))) == 2
    for path in states:
        text = path.read_text()
        assert not re.search(r'"(loss|train_loss|grad_norm|eval_loss)"', text)
        assert json.loads(text)["total_flos"] == 0
    spent = [entry["epsilon"] for entry in trainer.state.log_history]
    assert spent == sorted(spent) and spent[-1] == trainer.epsilon_spent


def test_a_resumed_run_continues_the_ledger(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2, "ema_decay": 0.5}
    DPTrainer(tiny_model(), arguments(tmp_path, **args), Rows()).train()
    # As if the machine had died after the fourth step: the charges of steps 5 and 6 stay.
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, **args), Rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert read_ledger(tmp_path / LEDGER)["charged"] == 6
    assert trainer.privacy_report()["mechanism"]["charged_steps"] == 6
    assert trainer.state.global_step == 4  # nothing left to spend


def test_an_interrupted_run_reaches_its_end(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2}
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, **args), Rows())
    charge, calls = trainer._charge, []

    def interrupted():
        charge()
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    trainer._charge = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = DPTrainer(tiny_model(), arguments(tmp_path, **args), Rows())
    again.train(resume_from_checkpoint=True)
    # Charged: two saved steps, two lost ones, two more.
    assert again.state.global_step == 4 and read_ledger(tmp_path / LEDGER)["charged"] == 6


def test_every_copy_of_a_private_model_is_marked(tmp_path):
    """Also of a run that did not end: whoever takes a checkpoint, or what lies in memory, has private weights."""
    args = {"save_strategy": "steps", "save_steps": 2}
    trainer = DPTrainer(model := tiny_model(), arguments(tmp_path, **args), Rows())
    charge = trainer._charge
    trainer._charge = lambda: 1 / 0 if trainer._charged == 5 else charge()
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    heads = read_ledger(tmp_path / LEDGER)["heads"]
    assert len(heads) == 6 and model.config.private_runs == [heads[5]]
    for step in (2, 4):
        config = json.loads((tmp_path / f"checkpoint-{step}" / "config.json").read_text())
        assert config["private_runs"] == [heads[step]]
    DPTrainer(model, arguments(tmp_path, **args), Rows()).train(resume_from_checkpoint=True)  # its own run may go on
    assert model.config.private_runs == [read_ledger(tmp_path / LEDGER)["head"]]


def test_a_run_that_ends_early_claims_what_was_planned(tmp_path):
    """Whoever ended it may have looked at what it released: epsilon of the charged steps alone is not proven then."""

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = DPTrainer(tiny_model(), arguments(tmp_path / "run"), Rows(), callbacks=[Stops()])
    assert trainer.plan.claimed(0) == 0
    trainer.train()
    report = trainer.privacy_report()
    assert report["mechanism"]["charged_steps"] == 2 and report["accounting"]["ledger"]["records"] == 2
    assert report["claim"]["epsilon"] == trainer.plan.epsilon() > trainer.epsilon_spent
    (run,) = arguments(tmp_path, earlier_ledgers=[str(tmp_path / "run" / LEDGER)]).earlier_runs()
    assert run["plan"].steps == 6  # and so does who counts it later


def test_what_a_private_run_made_is_trained_on_only_if_that_run_counts(tmp_path):
    DPTrainer(model := tiny_model(), arguments(tmp_path / "first"), Rows()).train()
    (head,) = model.config.private_runs
    with pytest.raises(ValueError, match=f"came out of the private run '{head[:12]}', and nothing here would count"):
        DPTrainer(model, arguments(tmp_path / "second"), Rows()).train()
    assert not (tmp_path / "second" / LEDGER).exists() and model.config.private_runs == [head]
    counted = arguments(tmp_path / "third", target_epsilon=12.0, earlier_ledgers=[str(tmp_path / "first" / LEDGER)])
    DPTrainer(model, counted, Rows()).train()
    assert model.config.private_runs == [read_ledger(tmp_path / "third" / LEDGER)["head"]]


def test_a_ledger_is_never_ignored(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 3}
    DPTrainer(tiny_model(), arguments(tmp_path, **args), Rows()).train()
    with pytest.raises(LedgerError, match="exists"):
        DPTrainer(tiny_model(), arguments(tmp_path, **args), Rows()).train()
    other = Rows(60, seed=1)
    other.fingerprint = "other"
    for dataset, changes in ((other, {}), (Rows(), {"target_epsilon": 9.0}), (Rows(), {"clipping_norm": 2.0})):
        with pytest.raises(LedgerError):
            DPTrainer(tiny_model(), arguments(tmp_path, **args, **changes), dataset).train(resume_from_checkpoint=True)
    (tmp_path / LEDGER).unlink()
    with pytest.raises(LedgerError, match="missing"):
        DPTrainer(tiny_model(), arguments(tmp_path, **args), Rows()).train(resume_from_checkpoint=True)


def test_average_by_hand(tmp_path):
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, ema_decay=0.9), Rows())
    expected = tiny_model().lm_head.weight.detach().clone()
    follow = trainer._follow

    def both():
        expected.mul_(0.9).add_(0.1 * trainer.model.lm_head.weight.detach())
        follow()

    trainer.callback_handler.callbacks[-1]._follow = both
    trainer.train()
    torch.testing.assert_close(trainer.model.lm_head.weight.detach(), expected)


def test_low_rank_adapters_train_alone_and_merge(tmp_path):
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, lora_rank=2), Rows())
    frozen = trainer.model.get_base_model().lm_head.weight.detach().clone()
    trainer.train()
    assert all("lora" in name for name in trainer._clipper.parameters)
    merged = trainer.merged_model()
    assert torch.equal(merged.lm_head.weight, frozen)
    before = tiny_model().model.layers[0].self_attn.q_proj.weight
    assert not torch.allclose(merged.model.layers[0].self_attn.q_proj.weight, before)
    assert trainer.privacy_report()["training"]["adapter"] == {"type": "lora", "rank": 2}


def test_half_precision_is_for_adapters_too(tmp_path):
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, lora_rank=2, bf16=True, max_steps=1), Rows())
    seen = set()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, given, result: seen.add(result.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}


def test_half_precision_that_the_launcher_asks_for_is_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision='fp16' cannot be used"):
        arguments(tmp_path)


def test_adapters_that_the_user_put_in_are_reported(tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=3, target_modules=["q_proj"]))
    trainer = DPTrainer(adapted, arguments(tmp_path), Rows())
    trainer.train()
    assert trainer.privacy_report()["training"]["adapter"] == {"type": "lora", "rank": 3}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_epsilon": None}, "target_epsilon=None"),
        ({"target_epsilon": 0.0}, "epsilon=0.0"),
        ({"sampling_rate": 0.1}, "exactly one"),
        ({"expected_batch_size": None, "sampling_rate": 1.2}, "sampling_rate=1.2"),
        ({"clipping_norm": -1.0}, "clipping_norm=-1.0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"scale_weights": [1.0, -0.5, 0.0]}, r"scale_weights=\[1.0, -0.5, 0.0\] must be finite, at least 0"),
        ({"scale_weights": []}, r"scale_weights=\[\] must be"),
        ({"scale_weights": 0.5}, "scale_weights=0.5 must be .*: a list of numbers"),
        ({"earlier_ledgers": "ledger.jsonl"}, "earlier_ledgers='ledger.jsonl' must be a list of files"),
        ({"max_steps": "240"}, "max_steps='240' must be a whole number, without quotes"),
        ({"max_steps": 3.5}, "max_steps=3.5 must be a whole number"),
        ({"target_epsilon": "8"}, "target_epsilon='8' must be a number, without quotes"),
        ({"clipping_norm": True}, "clipping_norm=True must be a number"),
        ({"use_cpu": "no"}, "use_cpu='no' must be true or false"),
        ({"lora_rank": -1}, "lora_rank=-1"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size=8 .* give expected_batch_size for the mean"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 .* clipping_norm is for each example"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "do_eval=True"),
        ({"push_to_hub": True}, "push_to_hub=True"),
        ({"fp16": True}, "fp16=True"),
        ({"torch_compile": True}, "torch_compile=True"),
        ({"save_only_model": True}, "save_only_model=True"),
        ({"save_strategy": "epoch"}, "save_strategy=.*save by steps"),
        ({"logging_strategy": "epoch"}, "logging_strategy=.*log by steps"),
        ({"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}, "load_best_model"),
        ({"save_on_each_node": True}, "save_on_each_node=True"),
        ({"fsdp": "full_shard"}, "deepspeed and fsdp are not supported"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"debug": "underflow_overflow"}, "debug=.*what layers make of private rows"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"expected_batch_size": 61}, "expected_batch_size=61 is larger than the data, num_examples=60"),
        ({"target_delta": 0.1}, "delta=0.1"),
        ({"scale_weights": [1.0, 0.5]}, "a model of 3 scales; give one for each"),
    ],
)
def test_arguments_that_do_not_fit_the_data_are_refused_before_it_is_read(tmp_path, changes, message):
    rows = Rows()
    rows.rows = rows.rows[:0]
    rows.__class__ = type("Unread", (Rows,), {"__len__": lambda self: 60})
    with pytest.raises(ValueError, match=message):
        DPTrainer(tiny_model(), arguments(tmp_path, **changes), rows)


def test_data_without_a_row_are_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="num_examples=0 must be at least 1; check the source"):
        DPTrainer(tiny_model(), arguments(tmp_path), Rows(0))


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be sampled by index"):
        DPTrainer(tiny_model(), arguments(tmp_path), iter([]))


@pytest.mark.parametrize("name", ["eval_dataset", "data_collator", "compute_metrics"])
def test_what_another_trainer_takes_is_refused_in_words(tmp_path, name):
    with pytest.raises(TypeError, match=f"takes no {name}: .* examples/evaluate.py measures a"):
        DPTrainer(tiny_model(), arguments(tmp_path), Rows(), **{name: object()})


def noiseless_step(model, args, rows: Rows) -> torch.Tensor:
    """The clipped sum of all rows, as the trainer takes it."""
    trainer = DPTrainer(model, args, rows)
    trainer._noise.add_ = lambda tensors: None
    before = torch.cat([p.detach().flatten().clone() for p in trainer._clipper.parameters.values()])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer._clipper.parameters.values()])
    return (before - after) * trainer.plan.expected_batch_size


@pytest.mark.parametrize("kind", ["none", "attention dropout", "dropout of adapters", "noise on embeddings"])
def test_what_the_model_draws_at_random_follows_no_public_seed(tmp_path, kind):
    """Were masks given by the seed, one row less would move them, and with them the share of every other row."""
    step = {
        "expected_batch_size": None, "sampling_rate": 1.0, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0,
        "lr_scheduler_type": "constant", "seed": 1,
    }  # fmt: skip
    sums = []
    for run in range(2):
        model = wild(tiny_model())
        if kind == "attention dropout":
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.2
        if kind == "dropout of adapters":
            lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.2, init_lora_weights=False)
            torch.manual_seed(0)
            model = get_peft_model(model, lora)
        more = {"neftune_noise_alpha": 5.0} if kind == "noise on embeddings" else {}
        sums.append(noiseless_step(model, arguments(tmp_path / str(run), **step, **more), Rows(30)))
    same = float((sums[0] - sums[1]).norm()) < 1e-4
    assert same == (kind == "none")


def test_a_loss_in_which_rows_see_each_other_is_refused_before_anything_is_charged(tmp_path):
    model = tiny_model()
    alone = model.per_example_loss
    model.per_example_loss = lambda input_ids: alone(input_ids) / len(input_ids)
    trainer = DPTrainer(model, arguments(tmp_path), Rows())
    with pytest.raises(ValueError, match="depends on the examples beside it"):
        trainer.train()
    assert trainer.epsilon_spent == 0 and read_ledger(tmp_path / LEDGER)["charged"] == 0


def test_a_layer_that_is_dropped_for_a_whole_batch_is_refused_before_anything_is_charged(tmp_path):
    model = tiny_model()
    alone = model.per_example_loss
    model.per_example_loss = lambda input_ids: alone(input_ids) * (not model.training or float(torch.rand(())) < 0.5)
    trainer = DPTrainer(model, arguments(tmp_path), Rows())
    with pytest.raises(ValueError, match="draws at random for several examples at once"):
        trainer.train()
    assert trainer.epsilon_spent == 0 and read_ledger(tmp_path / LEDGER)["charged"] == 0


def test_weights_that_are_unfrozen_after_the_trainer_was_made_are_refused(tmp_path):
    model = tiny_model()
    model.model.requires_grad_(False)
    trainer = DPTrainer(model, arguments(tmp_path), Rows())
    model.model.requires_grad_(True)
    with pytest.raises(ValueError, match="was frozen, or another tensor"):
        trainer.train()
    assert not (tmp_path / LEDGER).exists()


def test_a_model_inside_a_wrapper_is_marked_and_refused(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.public = inner, tiny_model().requires_grad_(False)

        def per_example_loss(self, input_ids):
            return self.inner.per_example_loss(input_ids)

    wrapper = Wrapper(tiny_model())
    trainer = DPTrainer(wrapper, arguments(tmp_path / "first"), Rows())
    trainer.train()
    assert wrapper.inner.config.private_runs == [read_ledger(tmp_path / "first" / LEDGER)["head"]]
    assert wrapper.public.config.private_runs is None
    with pytest.raises(ValueError, match="came out of the private run"):
        DPTrainer(Wrapper(wrapper.inner), arguments(tmp_path / "second"), Rows()).train()
