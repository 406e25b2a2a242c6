"""The card's figures: no fact is missing, no false one survives `verify`, no file is half written."""

import json
import os
import random
import re
from pathlib import Path

import jinja2
import numpy as np
import pytest
from card_reports import OPEN, OPEN_BELOW, PLAN, PLANS, changed, contents, fields_of, report, save_pipeline, value_at

from hf_spectral_dp import card as module
from hf_spectral_dp.card import PrivacyCard


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_pipeline(tmp_path / "pipeline")


# -- no fact is missing or impossible --------------------------------------------------------------------------------


REQUIRED = {
    (plan.sampling, path)
    for plan in PLANS
    for path in fields_of(report(plan))
    if path not in OPEN and path[:-1] not in OPEN_BELOW and (plan is PLAN or path[0] == "mechanism")
}


@pytest.mark.parametrize("sampling, path", sorted(REQUIRED, key=str), ids=str)
def test_every_missing_fact_is_refused_by_name(sampling, path):
    (plan,) = (plan for plan in PLANS if plan.sampling == sampling)
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    with pytest.raises(ValueError, match=re.escape(f"- {name} is missing, and nothing fills it in: ") + r"\S"):
        PrivacyCard(changed(report(plan), path))


@pytest.mark.parametrize("path", [path for path in fields_of(report()) if len(path) < 4], ids=str)
def test_no_field_may_be_empty_or_of_another_type(path):
    empty_is_said = {"post_processing", "public_components", "outside_guarantee", "evaluation"}
    for value in ("", "  ", [], {}, object()):
        if path in OPEN or (path[0] in empty_is_said and (value == [] or path[-1] == "note")):
            continue
        with pytest.raises(ValueError, match=r"refused:\n- \S+(=.*;| is missing, .*:) \S"):
            PrivacyCard(changed(report(), path, value))


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("guarantee", "delta"), 1 / 5000, "guarantee.delta=0.0002 must be below 1/num_examples = 0.0002; state"),
        (("guarantee", "delta"), 0, "guarantee.delta=0: .*minimum of 0; In"),
        (("guarantee", "epsilon"), -1.0, "guarantee.epsilon=-1.0: .*minimum of 0; Finite"),
        (("guarantee", "epsilon"), float("nan"), "guarantee.epsilon=nan must be finite"),
        (("guarantee", "epsilon"), float("inf"), "guarantee.epsilon=inf must be finite"),
        (("guarantee", "profile", 2, "epsilon"), float("inf"), r"guarantee.profile\[2\].epsilon=inf must be finite"),
        (("guarantee", "epsilon"), True, "guarantee.epsilon=True: .*not of type 'number'"),
        (("guarantee", "epsilon"), np.float32(1), "guarantee.epsilon=.*is a float32, not a plain JSON value"),
        (("guarantee", "adjacency"), "replace-one", "guarantee.adjacency='replace-one': .*not one of .*; What"),
        (("guarantee", "adjacency"), "zero-out-one", "='zero-out-one' must be 'add-or-remove-one', .*'poisson'"),
        (("guarantee", "profile"), [PLAN.profile()[0]] * 5, "guarantee.profile=.*non-unique"),
        (("guarantee", "profile"), PLAN.profile()[:4], "guarantee.profile=.*too short; Epsilon at five"),
        (("guarantee", "note"), "x", "Additional properties are not allowed .*'note'"),
        (("mechanism", "sampling"), "shuffle", "mechanism.sampling='shuffle': .*not one of .*; .*shuffled"),
        (("mechanism", "sampling"), "truncated_poisson", "mechanism: max_batch_size=None must be at least .* 250 with"),
        (("mechanism", "sampling"), "single_pass", "adjacency='add-or-remove-one' must be 'zero-out-one'"),
        (("mechanism", "max_batch_size"), 300, "mechanism: max_batch_size=300 is for .*'truncated_poisson'"),
        (("mechanism", "sampling_rate"), 1.1, "mechanism.sampling_rate=1.1: .*maximum of 1; In"),
        (("mechanism", "charged_steps"), 7, "mechanism.charged_steps=7 must not exceed planned_steps=4; the ledger"),
        (("mechanism", "charged_steps"), 0, "mechanism.charged_steps=0: .*minimum of 1; .*needs no card"),
        (("mechanism", "charged_steps"), 4.0, "mechanism.charged_steps=4.0: .*'integer'"),
        (("mechanism", "expected_batch_size"), 251.0, r"expected_batch_size=251.0 must be sampling_rate .* = 250.0;"),
        (("mechanism", "num_examples"), 5001, "expected_batch_size=250.0 must be sampling_rate"),
        (("mechanism", "event", "type"), "NoOpDpEvent", "mechanism.event.type='NoOpDpEvent'"),
        (("mechanism", "event", "event", "event", "noise_multiplier"), 0, "noise_multiplier=0: .*minimum of 0; The"),
        (("ledger", "head"), "ab" * 32 + "\n", "ledger.head='abab"),
        (("artifacts",), {"model.safetensors": "f00"}, r"artifacts.model.safetensors='f00'"),
        (("schema_version",), 2, "schema_version=2: 1 was expected"),
    ],
)
def test_an_impossible_fact_is_refused_with_field_value_rule_and_remedy(path, value, message):
    with pytest.raises(ValueError, match=message):
        PrivacyCard(changed(report(), path, value))


def test_all_that_is_wrong_is_said_at_once():
    wrong = changed(changed(report(), ("guarantee", "epsilon"), -1), ("data",))
    with pytest.raises(ValueError, match=r"- data is missing(.|\n)*- guarantee.epsilon=-1"):
        PrivacyCard(wrong)


def test_a_card_cannot_be_changed():
    fields = report()
    card = PrivacyCard(fields)
    fields["guarantee"]["epsilon"] = 0.0
    card.report["guarantee"]["epsilon"] = 0.0
    assert card.report == report()
    with pytest.raises(AttributeError):
        card.report = fields


# -- no false figure survives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.sampling)
def test_a_true_card_is_not_contradicted(tmp_path, plan):
    folder = save_pipeline(tmp_path / "pipeline", plan)
    card = PrivacyCard.load(folder)
    assert card.verify() == card.verify(folder) == []
    assert card.report == {**report(plan), "artifacts": card.report["artifacts"]}
    assert set(card.report["artifacts"]) == {"model/model.safetensors", "model/config.json", "model_index.json"}
    assert len(card.checks(folder)) == 5


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.sampling)
def test_hundreds_of_single_edits_are_all_found(tmp_path, plan):
    """Every edit that flatters the guarantee, and every hash: refused when loaded, or contradicted by `verify`."""
    folder = save_pipeline(tmp_path / "pipeline", plan)
    original = json.loads((folder / "privacy.json").read_text())
    generator = random.Random(0)

    def lower(value: float) -> float:
        # Two units of the last recorded place or more; one is left to the processor's rounding.
        return value - generator.uniform(2.01e-4, value)

    def less(value: float) -> float:
        return value * generator.uniform(0.01, 0.99)

    def more(value: float) -> float:
        return value * generator.uniform(1.001, 3)

    def other_digit(digest: str) -> str:
        place = generator.randrange(64)
        return digest[:place] + ("1" if digest[place] == "0" else "0") + digest[place + 1 :]

    def other_count(value: int) -> int:
        return value + generator.choice([-1, 1]) * generator.randrange(1, value)

    event = ("mechanism", "event")
    steps = [path for path in fields_of(original) if path[:3] == (*event, "event")]
    in_event = [path for path in steps if isinstance(value_at(original, path), float)]
    edits = [
        (("guarantee", "epsilon"), lower),
        (("guarantee", "delta"), less),
        (("guarantee", "epsilon_without_amplification"), lower),
        *((("guarantee", "profile", index, "epsilon"), lower) for index in range(len(plan.profile()))),
        *((("guarantee", "profile", index, "delta"), less) for index in range(len(plan.profile()))),
        (("mechanism", "noise_multiplier"), more),
        (("mechanism", "sampling_rate"), less),
        (("mechanism", "num_examples"), other_count),
        (("mechanism", "expected_batch_size"), more),
        (("mechanism", "charged_steps"), generator.randrange),
        (("mechanism", "planned_steps"), generator.randrange),
        ((*event, "count"), generator.randrange),
        *((path, more if path[-1] == "noise_multiplier" else less) for path in in_event),
        (("ledger", "records"), other_count),
        *((("artifacts", name), other_digit) for name in original["artifacts"]),
    ]
    for index in range(300 if plan is PLAN else 75):
        path, edit = edits[index % len(edits)]
        value = edit(value_at(original, path))
        (folder / "privacy.json").write_text(json.dumps(changed(original, path, value)))
        try:
            card = PrivacyCard.load(folder)
        except ValueError:
            continue
        assert card.verify(folder), f"{path}={value} was not found"


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("guarantee", "epsilon"), 0.01, r"guarantee.epsilon=0.01 is below .* \(recorded with dp-accounting"),
        (("guarantee", "profile", 0, "epsilon"), 0.0, r"guarantee.profile\[0\].epsilon=0.0 is below"),
        (("guarantee", "epsilon_without_amplification"), 0.1, "epsilon_without_amplification=0.1 is below"),
        (("mechanism", "noise_multiplier"), 5.1, "event.event.event.noise_multiplier=5.0, but .* imply 5.1"),
        (("mechanism", "charged_steps"), 3, "mechanism.event.count=4, but .* imply 3"),
        (("mechanism", "event", "event", "sampling_probability"), 0.04, "sampling_probability=0.04, but .* imply 0.05"),
        (("ledger", "records"), 5, "ledger.records=5, but mechanism.charged_steps=4"),
    ],
)
def test_a_contradiction_is_said_in_plain_words(path, value, message):
    found = PrivacyCard(changed(report(), path, value)).verify()
    assert any(re.search(message, line) for line in found), found


def test_epsilon_may_be_higher_than_needed():
    assert PrivacyCard(changed(report(), ("guarantee", "epsilon"), PLAN.epsilon() + 1)).verify() == []


def test_changed_missing_and_added_files_are_found(folder):
    card = PrivacyCard.load(folder)
    (folder / "model" / "model.safetensors").write_bytes(bytes(255))
    (folder / "model" / "config.json").unlink()
    (folder / "model" / "adapter.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    found = card.verify(folder)
    assert len(found) == 3
    assert found[0].startswith("model/config.json is on the card, but not in")
    assert found[1].startswith("model/adapter.safetensors is in") and found[1].endswith("but not on the card.")
    assert found[2].startswith("model/model.safetensors changed: SHA-256 ")
    assert card.verify() == []


def test_a_readme_that_says_something_else_is_found(folder):
    card, readme = PrivacyCard.load(folder), folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text + "\n## More\n\nAdded by hand.\n", encoding="utf-8")
    assert card.verify(folder) == []
    readme.write_text(text.replace(f"ε = {PLAN.epsilon()}", "ε = 0.01"), encoding="utf-8")
    assert re.match("README.md does not say: Training was", *card.verify(folder))
    card.save_readme(folder)
    assert readme.read_text(encoding="utf-8") == text
    readme.unlink()
    assert len(card.verify(folder)) == 1


# -- files -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="privacy.json does not exist; .*save"):
        PrivacyCard.load(tmp_path)
    path, text = folder / "privacy.json", (folder / "privacy.json").read_text()
    for damaged in (text[:-5], "", text.replace('"epsilon":', '"epsilon": 0.1, "epsilon":', 1), "[" * 100_000):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="is no readable JSON"):
            PrivacyCard.load(folder)
    for value in ("NaN", "1e999"):
        path.write_text(text.replace(f'"epsilon": {PLAN.epsilon()}', f'"epsilon": {value}', 1))
        with pytest.raises(ValueError, match="guarantee.epsilon=.* must be finite"):
            PrivacyCard.load(folder)
    path.write_text(json.dumps(report()))
    with pytest.raises(ValueError, match="artifacts is missing in .*save"):
        PrivacyCard.load(folder)


def test_a_folder_without_weights_gets_no_card(tmp_path):
    with pytest.raises(ValueError, match="holds no .safetensors file; save the pipeline there first"):
        PrivacyCard(report()).save(tmp_path)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("again", [False, True])
def test_nothing_is_half_written(folder, monkeypatch, function, again):
    if not again:
        (folder / "privacy.json").unlink()
        (folder / "README.md").unlink()
    before = contents(folder)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(OSError, match="No space left"):
            PrivacyCard(changed(report(), ("data", "name"), "others")).save(folder)
    assert contents(folder) == before


def test_a_card_that_cannot_be_rendered_is_not_written(folder, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(module, "_certainty", lambda epsilon: jinja2.StrictUndefined(name="certainty"))
    with pytest.raises(jinja2.UndefinedError, match="certainty"):
        PrivacyCard(changed(report(), ("data", "name"), "others")).save(folder)
    assert contents(folder) == before


def test_saved_files_have_ordinary_permissions(folder):
    (folder / "plain").write_text("")
    assert (folder / "privacy.json").stat().st_mode == (folder / "plain").stat().st_mode
