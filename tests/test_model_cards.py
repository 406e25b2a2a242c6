"""Every checkpoint in the package has a card in model_cards/ that speaks of the very files that are shipped."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
from card_reports import report, save_pipeline

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "model_cards"))

import build  # noqa: E402
import reports  # noqa: E402

SHIPPED = sorted(path.name for path in build.CHECKPOINTS.iterdir() if path.is_dir())


def test_the_cards_are_up_to_date(tmp_path):
    build.build(tmp_path)
    assert build.contents(tmp_path) == build.contents(build.HERE), "run `python model_cards/build.py`"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_names_the_hash_of_every_shipped_file(name):
    text = (build.HERE / name / "README.md").read_text(encoding="utf-8")
    for path in (build.CHECKPOINTS / name).iterdir():
        if path.suffix in (".safetensors", ".json"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() in text, path.name
    assert (build.HERE / name / "privacy.json").exists() or "no privacy claim" in text


@pytest.mark.parametrize("name", reports.GENERATORS)
def test_the_reports_speak_of_the_shipped_files_and_fetch_nothing(name, monkeypatch):
    text = (build.HERE / name / "README.md").read_text(encoding="utf-8")
    for kind in reports.REAL:
        page = build.HERE / name / reports.FOLDER / kind / "index.html"
        assert f"({page.relative_to(page.parents[2]).as_posix()})" in text
        assert page.stat().st_size < 1_000_000 and not re.search(r"(src|href)=\"(?!data:|#)", page.read_text())
    monkeypatch.setattr(reports, "measured_files", lambda name: {name: "other weights"})
    with pytest.raises(ValueError, match=f"other files.*reports.py {name}"):
        reports.summary(name)


def test_a_report_is_measured_on_the_shipped_generator(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "IMAGES", 60)
    reports.write_reports("digits", tmp_path, kinds=("drawn",), num_images=50, seeds=1, steps=1)
    assert "made from public images only" in (tmp_path / "drawn" / "index.html").read_text()
    assert json.loads((tmp_path / "measured.json").read_text()) == reports.measured_files("digits")


def test_a_checkpoint_that_says_nothing_of_its_data_stops_the_build(tmp_path, monkeypatch):
    (tmp_path / "mute").mkdir()
    (tmp_path / "mute" / "README.md").write_text("---\nlicense: mit\n---\n# Weights\n")
    monkeypatch.setattr(build, "CHECKPOINTS", tmp_path)
    with pytest.raises(ValueError, match="must say that it was trained on public data, and its license"):
        build.build(tmp_path / "out")


def test_a_private_checkpoint_is_shown_with_its_card_or_not_at_all(tmp_path, monkeypatch):
    folder = save_pipeline(tmp_path / "checkpoints" / "private")
    monkeypatch.setattr(build, "CHECKPOINTS", tmp_path / "checkpoints")
    build.build(tmp_path / "out")
    shown = json.loads((tmp_path / "out" / "private" / "privacy.json").read_text())
    assert shown["claim"] == report()["claim"]
    (folder / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="is not what its card says: model/model.safetensors changed"):
        build.build(tmp_path / "again")
