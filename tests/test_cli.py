"""The command line says the guarantee, every check, and fails when one fails."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from card_reports import PLAN, report, save_pipeline

from hf_spectral_dp import cli
from hf_spectral_dp.card import PrivacyCard
from hf_spectral_dp.cli import main
from hf_spectral_dp.privacy.ledger import PrivacyLedger
from hf_spectral_dp.self_audit import AuditRow


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_pipeline(tmp_path / "pipeline")


def test_verify_prints_the_guarantee_and_every_check(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    card = PrivacyCard.load(folder)
    assert lines == [card.guarantee, *(f"[ok] {name}" for name in card.checks(folder))]


@pytest.mark.parametrize("harm", ["epsilon", "weights", "readme", "link", "hidden"])
def test_verify_fails_on_any_contradiction(folder, capsys, harm):
    if harm == "epsilon":
        fields = json.loads((folder / "privacy.json").read_text())
        fields["claim"]["epsilon"] = 0.01
        (folder / "privacy.json").write_text(json.dumps(fields))
    elif harm == "weights":
        (folder / "model" / "model.safetensors").write_bytes(b"other")
    elif harm == "link":  # is loaded like a folder; its files and marks are nobody's
        (folder / "model").rename(folder.with_name("elsewhere"))
        (folder / "model").symlink_to(folder.with_name("elsewhere"))
    elif harm == "hidden":  # no hash covers it, and the card was made for it
        index = {"weight_map": {"lm_head.weight": ".w.safetensors"}}
        (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        PrivacyCard(report()).save(folder)
    else:
        (folder / "README.md").write_text("epsilon is 0")
    assert main(["verify", str(folder)]) == 1
    shown = capsys.readouterr()
    assert "claim.statement=" in shown.err if harm == "epsilon" else "[FAILED]" in shown.out


def test_verify_reads_the_ledger_if_it_is_at_hand(folder, tmp_path, capsys):
    with PrivacyLedger.create(tmp_path / "ledger.jsonl", {"plan": PLAN.to_dict(), "clipping_norm": 1.0}, 4) as ledger:
        for _ in range(4):
            ledger.charge()
        head = ledger.head
    fields = report()
    fields["accounting"]["ledger"]["head"] = head
    PrivacyCard(fields).save(folder)
    assert main(["verify", str(folder), "--ledger", str(tmp_path / "ledger.jsonl")]) == 0
    fields["accounting"]["ledger"]["head"] = "cd" * 32
    PrivacyCard(fields).save(folder)
    assert main(["verify", str(folder)]) == 0
    assert main(["verify", str(folder), "--ledger", str(tmp_path / "ledger.jsonl")]) == 1
    assert main(["verify", str(folder), "--ledger", str(tmp_path / "none.jsonl")]) == 1
    shown = capsys.readouterr().out
    assert "it is not the ledger of this card" in shown and "none.jsonl cannot be read" in shown


def test_without_a_network_what_lies_in_the_cache_is_checked(folder, monkeypatch, capsys):
    def offline(*given, **named):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(cli, "fetch", lambda *given, **named: str(folder))
    monkeypatch.setattr(cli, "strangers", offline)
    for expected in (0, 1):
        assert main(["verify", "owner/name"]) == expected
        shown = capsys.readouterr()
        assert "not checked, what else the repository holds: offline" in shown.err
        assert "files are those of the card" in shown.out and "nothing else" not in shown.out
        (folder / "model" / "model.safetensors").write_bytes(b"other")


def test_what_is_neither_folder_nor_hub_id_is_refused(folder, capsys):
    assert main(["verify", str(folder / "README.md")]) == 1
    assert "is no Hub id" in capsys.readouterr().err
    assert main(["verify", str(folder), "--revision", "main"]) == 1
    assert "--revision main is for a Hub id" in capsys.readouterr().err


def test_registry_prints_a_record(folder, capsys):
    given = ["--curator", "A hospital", "--intended_use", "teaching", "--region", "Utopia", "--author", "somebody"]
    assert main(["registry", str(folder), *given, "--publication_date", "2026-11-24"]) == 0
    record = yaml.safe_load(capsys.readouterr().out)
    assert record["tier"] == 3
    assert record["deployment"]["privacy_loss"]["privacy_parameters"]["epsilon"] == PLAN.epsilon()
    assert main(["registry", str(folder), *given, "--publication_date", "24.11.2026"]) == 1
    assert "publication_date: '24.11.2026' is not a 'date'" in capsys.readouterr().err
    (folder / "model" / "model.safetensors").write_bytes(b"other")
    assert main(["registry", str(folder), *given, "--publication_date", "2026-11-24"]) == 1
    assert "is not what its card says: model/model.safetensors changed" in capsys.readouterr().err


def test_a_missing_or_invalid_card_fails_without_a_traceback(folder, tmp_path, capsys):
    for command in ("verify", "card"):
        assert main([command, str(tmp_path / "none")]) == 1
        assert "does not exist" in capsys.readouterr().err
    (folder / "privacy.json").write_text(json.dumps({**report(), "claim": {}}))
    for command in ("verify", "card"):
        assert main([command, str(folder)]) == 1
        assert "claim.epsilon is missing" in capsys.readouterr().err


def test_card_renders_the_readme_and_vouches_for_nothing_new(folder):
    readme, card = (folder / "README.md").read_text(), (folder / "privacy.json").read_bytes()
    (folder / "README.md").write_text(readme.replace("ε", "e"))
    (folder / "model" / "model.safetensors").write_bytes(b"other")
    assert main(["card", str(folder)]) == 0
    assert (folder / "README.md").read_text() == readme
    assert (folder / "privacy.json").read_bytes() == card
    assert main(["verify", str(folder)]) == 1  # the weights are still not those of the card


@pytest.mark.parametrize("arguments", [[], ["verify"], ["unknown", "x"]])
def test_wrong_usage_is_explained(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: hf-spectral-dp" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["-h"], ["generate", "verify", "card", "registry", "audit"]),
        (["verify", "-h"], ["FOLDER_OR_HUB_ID", "--revision", "--ledger"]),
        (["generate", "-h"], ["costs no privacy", "--prompt", "--seed", "--out images"]),
    ],
)
def test_help_is_helpful(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(word in shown for word in words)


@pytest.mark.slow
def test_audit_refutes_nothing_here_and_catches_every_control(tmp_path, capsys):
    assert main(["audit", "--quick", "--out", str(tmp_path / "audit.json")]) == 0
    report = json.loads((tmp_path / "audit.json").read_text())
    release, run, *membership = report["rows"]
    assert 0.8 * release["claimed"] < release["shown"] <= release["claimed"] and release["control_caught"]
    assert run["shown"] <= run["claimed"] <= 2 and run["control_shown"] >= 3
    assert len(membership) == 4 and all(row["control_shown"] > 0.5 for row in membership)
    printed = capsys.readouterr().out
    assert printed.count("[not refuted]") == printed.count("caught") == len(report["rows"])


@pytest.mark.parametrize("harm", ["refuted", "control_caught"])
def test_audit_fails_when_a_claim_is_refuted_or_a_control_is_not_caught(harm, monkeypatch, capsys):
    fine = AuditRow("an attack", "epsilon", 2.0, 1.0, 0.95, False, ["something"], "no noise", 4.0, True)
    for row, code in ((fine, 0), (replace(fine, **{harm: not getattr(fine, harm)}), 1)):
        monkeypatch.setattr(cli, "audit_installation", lambda *args, row=row: iter([fine, row]))
        assert main(["audit"]) == code
    assert ("[REFUTED]" in capsys.readouterr().out) == (harm == "refuted")


def test_audit_teaches_and_refuses_early(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    shown = capsys.readouterr().out
    assert "LOWER bound" in shown and "proves nothing" in shown and "--quick" in shown
    assert main(["audit", "--out", str(tmp_path / "missing" / "audit.json")]) == 1
    assert "its folder does not exist" in capsys.readouterr().err
    assert main(["audit", "--device", "foo"]) == 1
    assert "device='foo' cannot be used here" in capsys.readouterr().err
