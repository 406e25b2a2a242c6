"""A run that counts earlier ones: the budget is that of all of them, and card, page and `verify` say so."""

import dataclasses
import re

import numpy as np
import pytest
from card_reports import COMPOSED, PUBLISHED, changed, fields_of, forged, report
from conftest import tiny_model
from training_parts import Rows, arguments

from hf_spectral_dp import DPTrainer
from hf_spectral_dp.card import PrivacyCard
from hf_spectral_dp.privacy.budget import PrivacyBudget, event_to_dict, round_up
from hf_spectral_dp.privacy.consequences import gaussian_dp
from hf_spectral_dp.privacy.ledger import LedgerError, PrivacyLedger, read_ledger
from hf_spectral_dp.privacy_report import statement
from hf_spectral_dp.trainer import LEDGER
from hf_spectral_dp.verification import ledger_contradictions

# -- the card --------------------------------------------------------------------------------------------------------


def test_every_figure_of_the_card_is_that_of_all_runs_together():
    card = PrivacyCard(report(COMPOSED))
    claim = card.report["claim"]
    assert card.verify() == [] and claim["epsilon"] == COMPOSED.epsilon()
    assert claim["epsilon"] > dataclasses.replace(COMPOSED, earlier=()).epsilon()
    assert claim["gaussian_dp"]["mu"] == gaussian_dp(COMPOSED)
    assert claim["statement"].startswith("Training, together with 2 earlier private runs on the same data, was (ε")
    names = [stage["name"] for stage in card.report["stages"]]
    assert names[0] == "start from public weights or those of an earlier run"
    assert names.count("earlier private run 2 on the same data") == 1


@pytest.mark.parametrize("path", [path for path in fields_of(report(COMPOSED)) if "earlier_runs" in path], ids=str)
def test_every_missing_fact_of_an_earlier_run_is_refused(path):
    with pytest.raises(ValueError, match=rf"{path[-1]} is missing, and nothing fills it in: \S"):
        PrivacyCard(changed(report(COMPOSED), path))


FEWER = report(COMPOSED)["mechanism"]["earlier_runs"][1:]


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("mechanism", "earlier_runs"), FEWER, r"accounting.event.events\[2\].* imply None"),
        (("mechanism", "earlier_runs", 0, "noise_multiplier"), 21.0, r"events\[0\].*noise_multiplier=20.0, but .* 21"),
        (("mechanism", "earlier_runs", 0, "rate"), 0.9, r"events\[0\].*sampling_probability=1.0, but .* imply 0.9"),
        (("mechanism", "earlier_runs", 1, "steps"), 1, r"events\[1\].count=3, but the mechanism's other .* imply 1"),
        (("claim", "epsilon"), dataclasses.replace(COMPOSED, earlier=()).epsilon(), "claim.epsilon=.* is below"),
    ],
)
def test_no_earlier_run_can_be_talked_down(path, value, message):
    found = PrivacyCard(forged(report(COMPOSED), path, value)).verify()
    assert any(re.search(message, line) for line in found), found


@pytest.mark.parametrize("earlier", [COMPOSED.earlier[:1], tuple(dataclasses.replace(run, noise_multiplier=30.0)
                                                                 for run in COMPOSED.earlier)])  # fmt: skip
def test_an_event_that_agrees_does_not_help_the_forger(earlier):
    """Mechanism and event both tell the cheaper story; the figures are still those of the true one, or too low."""
    fields = report(dataclasses.replace(COMPOSED, earlier=earlier))
    fields["claim"] = {**fields["claim"], "epsilon": round_up(fields["claim"]["epsilon"] - 0.01)}
    fields["claim"]["statement"] = statement(fields)
    assert any(line.startswith("claim.epsilon=") for line in PrivacyCard(fields).verify())


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("mechanism", "earlier_runs", 0, "ledger_head"), "01" * 32, "0101.* ends more than one run; list every run"),
        (("mechanism", "earlier_runs", 1, "ledger_head"), "ab" * 32, "abab.* ends more than one run"),
        (("mechanism", "earlier_runs", 1, "sampling"), "single_pass", "mechanism: sampling='poisson' is accounted"),
        (("mechanism", "earlier_runs", 1, "steps"), 0, r"earlier_runs\[1\].steps=0: .*minimum of 1"),
    ],
)
def test_an_impossible_earlier_run_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        PrivacyCard(changed(report(COMPOSED), path, value))


def test_the_page_names_every_run_and_a_stranger_recomputes_the_whole():
    text = PrivacyCard(report(COMPOSED)).render()
    assert "looked at the same data before, 2 time(s)" in text
    for index, run in enumerate(COMPOSED.earlier):
        assert f"| {run.steps} steps, poisson sampling at rate {run.sampling_rate}, noise multiplier" in text
        assert f"clipping norm 0.5; ledger ends at {f'{index:02}' * 32} |" in text
    (snippet,) = re.findall(r"```python\n(import dp_accounting.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    assert round_up(names["epsilon"]) == COMPOSED.epsilon()
    assert "earlier" not in PrivacyCard(report()).render().lower()


# -- the trainer -----------------------------------------------------------------------------------------------------


@pytest.fixture
def first(tmp_path):
    """The folder of a run of two steps on full batches."""
    args = arguments(tmp_path / "first", target_epsilon=2.0, expected_batch_size=60, max_steps=2)
    DPTrainer(tiny_model(), args, Rows()).train()
    return tmp_path / "first"


def second(folder, *ledgers) -> DPTrainer:
    args = arguments(folder, save_strategy="steps", save_steps=3, earlier_ledgers=[str(path) for path in ledgers])
    return DPTrainer(tiny_model(), args, Rows())


def test_what_an_earlier_run_gave_away_stands_on_the_card(tmp_path):
    """A loss that was logged, and noise of a weaker generator: the claim is of both runs."""
    args = arguments(
        tmp_path / "first", target_epsilon=2.0, expected_batch_size=60, max_steps=2, log_private_loss=True
    )
    DPTrainer(tiny_model(), args, Rows()).train()
    ledger = tmp_path / "first" / LEDGER
    after = second(tmp_path / "second", ledger)
    after.train()
    found = after.privacy_report()
    assert found["training"]["private_loss_logged"] and not found["trust"]["adversary"]["sees_logs"]
    assert "the loss on private rows was logged during training" in [one["what"] for one in found["data_accesses"]]
    third = second(tmp_path / "third", tmp_path / "second" / LEDGER)  # which counts the first
    assert third.privacy_report()["training"]["private_loss_logged"]
    fields = {**report(), **found}
    ledger = tmp_path / "second" / LEDGER
    assert ledger_contradictions(fields, ledger) == []
    silent = forged(fields, ("training", "private_loss_logged"), False)
    assert "loss of private rows was logged" in " ".join(ledger_contradictions(silent, ledger))
    persons = {**fields, "unit": {**fields["unit"], "level": "person"}}
    assert "for units of level 'row', but unit.level='person'" in " ".join(ledger_contradictions(persons, ledger))


def test_noise_of_a_weaker_generator_stands_on_the_card(tmp_path, first):
    header = read_ledger(first / LEDGER)["header"]
    with PrivacyLedger.create(tmp_path / LEDGER, {**header, "noise": "philox"}, 2) as ledger:
        ledger.charge()
    randomness = second(tmp_path / "second", tmp_path / LEDGER).privacy_report()["randomness"]
    assert randomness["generator"].startswith("Philox")
    strong = second(tmp_path / "third", first / LEDGER).privacy_report()["randomness"]
    assert not strong["generator"].startswith("Philox")


def test_two_runs_share_one_budget(tmp_path, first):
    without = arguments(tmp_path).plan(60)
    trainer = second(tmp_path / "second", first / LEDGER)
    assert trainer.plan.noise_multiplier > without.noise_multiplier
    assert trainer.epsilon_spent == trainer.plan.earlier[0].epsilon()
    trainer.train()
    alone = dataclasses.replace(trainer.plan, earlier=()).epsilon()
    assert max(alone, 1.9) < trainer.epsilon_spent <= 8 and trainer.epsilon_spent > 7.9
    run = trainer.privacy_report()
    (earlier,) = run["mechanism"]["earlier_runs"]
    assert earlier["steps"] == 2 and earlier["rate"] == 1.0
    assert earlier["ledger_head"] == read_ledger(first / LEDGER)["head"]
    assert run["accounting"]["ledger"]["records"] == run["mechanism"]["charged_steps"] == 6
    fields, ledger = {**run, **PUBLISHED}, tmp_path / "second" / LEDGER
    assert PrivacyCard(fields).verify(ledger=ledger) == []
    # A forger whose card agrees with itself is left with the ledger, which knows of the first run.
    fields["accounting"]["event"] = event_to_dict(dataclasses.replace(trainer.plan, earlier=()).event(6))
    forgery = PrivacyCard(forged(fields, ("mechanism", "earlier_runs"), []))
    assert forgery.verify() == []  # it claims more than it would have to
    names = re.findall(r"was opened for (\w+)=", " ".join(forgery.verify(ledger=ledger)))
    assert names == ["earlier", "earlier_runs"]


def test_a_third_run_counts_both_and_none_twice(tmp_path, first):
    trainer = second(tmp_path / "second", first / LEDGER)
    trainer.train()
    third = arguments(tmp_path, target_epsilon=9.0, earlier_ledgers=[str(tmp_path / "second" / LEDGER)])
    runs = third.earlier_runs()
    assert [run["plan"].steps for run in runs] == [2, 6] and not any(run["plan"].earlier for run in runs)
    assert runs[0]["ledger_head"] == read_ledger(first / LEDGER)["head"]
    both = dataclasses.replace(runs[1]["plan"], earlier=(runs[0]["plan"],))
    assert both.epsilon() == trainer.epsilon_spent
    for more in (first / LEDGER, tmp_path / "second" / LEDGER):
        third.earlier_ledgers = [str(tmp_path / "second" / LEDGER), str(more)]
        with pytest.raises(LedgerError, match="which is counted already; name every run once"):
            third.plan(60)


def own_loop(path, charges: int) -> PrivacyLedger:
    """The ledger of a loop that is not the trainer's."""
    plan = PrivacyBudget(1.0).calibrate(num_examples=60, sampling_rate=1.0, steps=5)
    ledger = PrivacyLedger.create(path, {"plan": plan.to_dict(), "clipping_norm": 1.0}, plan.steps)
    for _ in range(charges):
        ledger.charge()
    return ledger


class PersonRows(Rows):
    """Sixty persons with one row each: as many units as rows, but of another kind."""

    units = np.arange(60)
    unit = "all rows with one value of 'who'"


def test_runs_with_another_kind_of_privacy_unit_are_refused(tmp_path, first):
    """Both ways, though the numbers of units agree."""
    args = arguments(tmp_path / "second", earlier_ledgers=[str(first / LEDGER)])
    with pytest.raises(LedgerError, match="unit of that run is a row, of this one all rows of a person"):
        DPTrainer(tiny_model(), args, PersonRows())
    persons = arguments(tmp_path / "persons", target_epsilon=2.0, expected_batch_size=60, max_steps=1)
    DPTrainer(tiny_model(), persons, PersonRows()).train()
    with pytest.raises(LedgerError, match="unit of that run is all rows of a person, of this one a row"):
        second(tmp_path / "second", tmp_path / "persons" / LEDGER)
    args = arguments(tmp_path / "third", earlier_ledgers=[str(tmp_path / "persons" / LEDGER)])
    assert DPTrainer(tiny_model(), args, PersonRows()).plan.earlier[0].steps == 1


def test_a_run_that_goes_on_is_noticed(tmp_path):
    with own_loop(tmp_path / "ledger", 1) as ledger:
        trainer = second(tmp_path / "second", ledger.path)
        trainer.train()
        waiting = second(tmp_path / "other", ledger.path)
        ledger.charge()
        with pytest.raises(LedgerError, match="earlier_ledgers were charged since this trainer was made"):
            waiting.train()
        assert not (tmp_path / "other" / LEDGER).exists()
        with pytest.raises(LedgerError, match=r"header differs in \['earlier_runs'\]"):
            second(tmp_path / "second", ledger.path).train(resume_from_checkpoint=True)


def test_ledgers_that_cannot_be_counted_are_refused_and_unused_ones_skipped(tmp_path):
    own_loop(tmp_path / "unused", 0).close()
    assert second(tmp_path / "second", tmp_path / "unused").plan.earlier == ()
    with pytest.raises(LedgerError, match="missing cannot be read"):
        second(tmp_path / "second", tmp_path / "missing")
    PrivacyLedger.create(tmp_path / "plain", {"rate": 0.1}, 3).close()
    with pytest.raises(LedgerError, match=r"plain does not say what its charges cost \(KeyError\('plan'\)\); name the"):
        second(tmp_path / "second", tmp_path / "plain")
    header = read_ledger(tmp_path / "unused")["header"]
    PrivacyLedger.create(tmp_path / "long", header, 300).close()
    with pytest.raises(LedgerError, match=r"long does not say what its charges cost .*max_charges=300 of a plan of"):
        second(tmp_path / "second", tmp_path / "long")
    own_loop(tmp_path / "ledger", 2).close()
    with pytest.raises(ValueError, match="num_examples=61, but an earlier run had 60"):
        arguments(tmp_path, earlier_ledgers=[str(tmp_path / "ledger")]).plan(61)
    content = (tmp_path / "ledger").read_bytes()
    (tmp_path / "ledger").write_bytes(content.replace(b'"num_examples":60', b'"num_examples":61'))
    with pytest.raises(LedgerError, match="ledger is altered"):
        second(tmp_path / "second", tmp_path / "ledger")
