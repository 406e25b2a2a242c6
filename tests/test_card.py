"""The card's figures: no fact is missing, no false one survives `verify`, no file is half written."""

import hashlib
import json
import os
import re
from pathlib import Path

import jinja2
import numpy as np
import pytest
from card_reports import PLAN, PLANS, changed, contents, fields_of, forged, report, save_pipeline

from hf_spectral_dp import card as module
from hf_spectral_dp.card import PrivacyCard
from hf_spectral_dp.report_rules import SCHEMA


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_pipeline(tmp_path / "pipeline")


# -- no fact is missing or impossible --------------------------------------------------------------------------------


REQUIRED = {
    (plan.sampling, path)
    for plan in PLANS
    for path in fields_of(report(plan))
    if plan is PLAN or path[0] in ("mechanism", "sampling", "accounting")
}


def named(path: tuple) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]


def test_the_schema_leaves_nothing_open():
    def objects(node):
        if isinstance(node, dict):
            if node.get("type") in ("object", ["object", "null"]):
                yield node
            for value in node.values():
                yield from objects(value)
        elif isinstance(node, list):
            for value in node:
                yield from objects(value)

    found = list(objects(SCHEMA))
    assert len(found) > 25
    for node in found:
        closed = node.get("additionalProperties") is False or "allOf" in node  # the event: closed by each of its kinds
        assert closed and (set(node["required"]) == set(node["properties"]) or "released" in node["properties"]
                           or "allOf" in node), node  # fmt: skip


@pytest.mark.parametrize("sampling, path", sorted(REQUIRED, key=str), ids=str)
def test_every_missing_fact_is_refused_by_name(sampling, path):
    (plan,) = (plan for plan in PLANS if plan.sampling == sampling)
    with pytest.raises(ValueError, match=re.escape(f"- {named(path)} is missing, and nothing fills it in: ") + r"\S"):
        PrivacyCard(changed(report(plan), path))


@pytest.mark.parametrize("path", [path for path in fields_of(report()) if len(path) < 4], ids=str)
def test_no_field_may_be_empty_or_of_another_type(path):
    empty_is_said = {
        ("public_data",), ("audit",), ("utility",), ("utility", 0, "note"), ("audit", 0, "note"),
        ("mechanism", "earlier_runs"),
    }  # fmt: skip
    for value in ("", "  ", [], {}, object()):
        if path in empty_is_said and (value == [] or path[-1] == "note"):
            continue
        with pytest.raises(ValueError, match=r"refused:\n- \S+(=.*;| is missing, .*:) \S"):
            PrivacyCard(changed(report(), path, value))


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("claim", "delta"), 1 / 5000, "claim.delta=0.0002 must be below 1/num_units = 0.0002; state"),
        (("claim", "delta"), 0, "claim.delta=0: .*minimum of 0; In"),
        (("claim", "epsilon"), -1.0, "claim.epsilon=-1.0: .*minimum of 0; Finite"),
        (("claim", "epsilon"), float("nan"), "claim.epsilon=nan must be finite"),
        (("claim", "epsilon"), float("inf"), "claim.epsilon=inf must be finite"),
        (("claim", "epsilon"), 0.5, "claim.statement=.*must be what the other fields say: .*0.5"),
        (("claim", "statement"), "Nobody can learn anything.", "claim.statement='Nobody.*must be what the other"),
        (("claim", "profile", 2, "epsilon"), float("inf"), r"claim.profile\[2\].epsilon=inf must be finite"),
        (("claim", "epsilon"), True, "claim.epsilon=True: .*not of type 'number'"),
        (("claim", "epsilon"), np.float32(1), "claim.epsilon=.*is a float32, not a plain JSON value"),
        (("adjacency", "relation"), "replace-one", "adjacency.relation='replace-one': .*not one of .*; add-or"),
        (("adjacency", "relation"), "zero-out-one", "='zero-out-one' must be 'add-or-remove-one', .*'poisson'"),
        (("claim", "profile"), [PLAN.profile()[0]] * 5, "claim.profile=.*non-unique"),
        (("claim", "profile"), PLAN.profile()[:4], "claim.profile=.*too short; Epsilon at five"),
        (("claim", "note"), "x", "Additional properties are not allowed .*'note'"),
        (("claim", "attack", "advantage"), 1.5, "claim.attack.advantage=1.5: .*maximum of 1"),
        (("sampling", "used"), "shuffle", "sampling.used='shuffle': .*not one of .*; .*shuffled"),
        (("sampling", "used"), "truncated_poisson", "sampling.assumed='poisson' must equal used='truncated_poisson'"),
        (("sampling", "max_batch_size"), 300, "mechanism: max_batch_size=300 is for .*'truncated_poisson'"),
        (("sampling", "rate"), 1.1, "sampling.rate=1.1: .*maximum of 1; In"),
        (("mechanism", "charged_steps"), 7, "mechanism.charged_steps=7 must not exceed planned_steps=4; the ledger"),
        (("mechanism", "charged_steps"), 0, "mechanism.charged_steps=0: .*minimum of 1; .*needs no card"),
        (("mechanism", "charged_steps"), 4.0, "mechanism.charged_steps=4.0: .*'integer'"),
        (("mechanism", "divisor"), 200.0, "mechanism.divisor=200.0 must be sampling.expected_batch_size=250.0"),
        (("mechanism", "clipping_norm"), 2.0, r"noise_standard_deviation=5.0 must be .* = 10.0"),
        (("sampling", "expected_batch_size"), 251.0, r"expected_batch_size=251.0 must be rate \* num_units = 250.0;"),
        (("adjacency", "num_units"), 5001, "expected_batch_size=250.0 must be rate"),
        (("accounting", "event", "type"), "NoOpDpEvent", "accounting.event.type='NoOpDpEvent'"),
        (("accounting", "event", "event", "event", "noise_multiplier"), 0, "noise_multiplier=0: .*minimum of 0; All"),
        (("accounting", "ledger", "head"), "ab" * 32 + "\n", "accounting.ledger.head='abab"),
        (("released",), [{"path": "model.safetensors", "sha256": "f00", "bytes": 1}], r"released\[0\].sha256='f00'"),
        (("trust", "adversary", "sees_logs"), False, "trust.adversary.sees_logs=True would be true"),
        (("license",), "mit\ntags: [x]", "license='mit"),
        (("utility", 0, "accounted"), True, r"utility\[0\].accounted=True with private=True"),
        (("hyperparameter_tuning", "data"), "private", "hyperparameter_tuning.accounted=True with data='private'"),
        (("data", "name"), "a\ud800", "data.name holds half of a character pair"),
        (("schema_version",), 2, "schema_version=2: 3 was expected"),
    ],
)
def test_an_impossible_fact_is_refused_with_field_value_rule_and_remedy(path, value, message):
    with pytest.raises(ValueError, match=message):
        PrivacyCard(changed(report(), path, value))


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "model/../../x.json", "model\\x.json", ".hidden", "model/.git/config", "",
     "model//config.json", "model/", "a\nb", "C:x", "model.safetensors\n", "~/x"],
)  # fmt: skip
def test_a_path_out_of_the_folder_is_refused(name):
    entry = {"path": name, "sha256": "ab" * 32, "bytes": 1}
    with pytest.raises(ValueError, match=r"released\[0\].path=.*Below the folder"):
        PrivacyCard({**report(), "released": [entry]})


def test_a_file_has_one_hash():
    entries = [{"path": "model/config.json", "sha256": digest * 32, "bytes": 1} for digest in ("ab", "cd")]
    with pytest.raises(ValueError, match="released lists model/config.json more than once"):
        PrivacyCard({**report(), "released": entries})


def test_all_that_is_wrong_is_said_at_once():
    wrong = changed(changed(report(), ("claim", "epsilon"), -1), ("data",))
    with pytest.raises(ValueError, match=r"- claim.epsilon=-1(.|\n)*- data is missing"):
        PrivacyCard(wrong)


def test_a_card_cannot_be_changed():
    fields = report()
    card = PrivacyCard(fields)
    fields["claim"]["epsilon"] = 0.0
    card.report["claim"]["epsilon"] = 0.0
    assert card.report == report()
    with pytest.raises(AttributeError):
        card.report = fields


# -- no false figure survives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.sampling)
def test_a_true_card_is_not_contradicted(tmp_path, plan):
    folder = save_pipeline(tmp_path / "pipeline", plan)
    card = PrivacyCard.load(folder)
    assert card.verify() == card.verify(folder) == []
    assert card.report == {**report(plan), "released": card.report["released"]}
    names = [entry["path"] for entry in card.report["released"]]
    assert names == ["model/config.json", "model/model.safetensors", "model_index.json"]
    assert len(card.checks(folder)) == 7


# That a thousand random edits are all found: test_verification.py.


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("claim", "epsilon"), 0.01, r"claim.epsilon=0.01 is below .* \(recorded with dp-accounting"),
        (("claim", "profile", 0, "epsilon"), 0.0, r"claim.profile\[0\].epsilon=0.0 is below"),
        (("claim", "epsilon_without_amplification"), 0.1, "epsilon_without_amplification=0.1 is below"),
        (("claim", "gaussian_dp", "mu"), 0.3, "gaussian_dp.mu=0.3 is below 0.4"),
        (("claim", "attack", "advantage"), 0.001, "attack.advantage=0.001 is below"),
        (("claim", "attack", "true_positive_rates", 1, "true_positive_rate"), 0.0, r"rates\[1\].* is below"),
        (("claim", "groups", 2, "epsilon"), 0.1, r"claim.groups\[2\].epsilon=0.1 is below"),
        (("mechanism", "noise_multiplier"), 5.1, "event.event.event.noise_multiplier=5.0, but .* imply 5.1"),
        (("mechanism", "charged_steps"), 3, "accounting.ledger.records=4, but mechanism.charged_steps=3"),
        (("mechanism", "planned_steps"), 5, "accounting.event.count=4, but .* imply 5"),
        (("accounting", "event", "event", "sampling_probability"), 0.04, "=0.04, but .* imply 0.05"),
        (("accounting", "ledger", "records"), 5, "ledger.records=5, but mechanism.charged_steps=4"),
    ],
)
def test_a_contradiction_is_said_in_plain_words(path, value, message):
    found = PrivacyCard(forged(report(), path, value)).verify()
    assert any(re.search(message, line) for line in found), found


def test_epsilon_may_be_higher_than_needed():
    assert PrivacyCard(forged(report(), ("claim", "epsilon"), PLAN.epsilon() + 1)).verify() == []


def test_changed_missing_and_added_files_are_found(folder):
    card = PrivacyCard.load(folder)
    (folder / "model" / "model.safetensors").write_bytes(bytes(255))
    (folder / "model" / "config.json").unlink()
    (folder / "model" / "pytorch_model.bin").write_bytes(b"")
    found = card.verify(folder)
    assert len(found) == 3
    assert found[0].startswith("model/config.json is on the card, but not in")
    assert found[1].startswith("model/pytorch_model.bin is in") and found[1].endswith("but not on the card.")
    assert found[2].startswith("model/model.safetensors changed: SHA-256 ")
    assert card.verify() == []


def test_a_readme_that_says_something_else_is_found(folder):
    card, readme = PrivacyCard.load(folder), folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.replace(f"ε = {PLAN.epsilon()}", "ε = 0.01", 1), encoding="utf-8")
    (found,) = card.verify(folder)
    assert re.match(r"README.md, line \d+, says '.*ε = 0.01.*, not '.*`hf-spectral-dp card` renders it", found)
    for other in (text + "\n## More\n\nAdded by hand.\n", text.replace("\n", "\r\n"), text[:-1], ""):
        readme.write_bytes(other.encode())
        assert len(card.verify(folder)) == 1
    card.save_readme(folder)
    assert readme.read_text(encoding="utf-8") == text
    readme.unlink()
    assert card.verify(folder)[0].startswith("README.md cannot be read (No such file")


def test_the_readme_states_the_hash_of_the_report(folder):
    digest = hashlib.sha256((folder / "privacy.json").read_bytes()).hexdigest()
    assert PrivacyCard.load(folder).sha256 == digest and digest in (folder / "README.md").read_text()
    (folder / "privacy.json").write_text(json.dumps(PrivacyCard.load(folder).report))  # the same facts, another text
    assert PrivacyCard.load(folder).verify(folder)[0].startswith("privacy.json, line 1, says")


# -- files -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="privacy.json does not exist, so nothing .*save"):
        PrivacyCard.load(tmp_path)
    path, text = folder / "privacy.json", (folder / "privacy.json").read_text()
    for damaged in ("[]", "3", "null"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="holds a (list|int|NoneType), not a report"):
            PrivacyCard.load(folder)
    for damaged in (text[:-5], "", text.replace('"epsilon":', '"epsilon": 0.1, "epsilon":', 1), "[" * 100_000):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="is no readable JSON"):
            PrivacyCard.load(folder)
    for value in ("NaN", "1e999"):
        path.write_text(text.replace(f'"epsilon": {PLAN.epsilon()}', f'"epsilon": {value}', 1))
        with pytest.raises(ValueError, match="claim.epsilon=.* must be finite"):
            PrivacyCard.load(folder)
    path.write_text(json.dumps(report()))
    with pytest.raises(ValueError, match="released is missing in .*save"):
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
