"""RESULTS.md says what the JSON files say."""

import json
import runpy
import sys

import pytest

from benchmarks import results

SCRIPTS = [path.stem for path in sorted(results.HERE.glob("*.py")) if "def main()" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_starts_and_explains_itself(script, monkeypatch, capsys):
    """All that it imports is there, also where no test runs it."""
    if script == "mutants":
        pytest.skip("it must not find the package imported")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(results.HERE / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


def test_results_are_rendered_from_their_sources():
    written = (results.HERE / "RESULTS.md").read_text(encoding="utf-8")
    assert written == results.render(), "run python -m benchmarks.results"


def test_a_picture_stands_beside_the_figures_of_its_own_run(tmp_path):
    for name in ("a.json", "a_gpu.json", "a_ours.png", "a_gpu_ours.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    found = {name: [picture.name for picture in results.pictures(tmp_path / f"{name}.json")] for name in ("a", "a_gpu")}
    assert found == {"a": ["a_ours.png"], "a_gpu": ["a_gpu_ours.png"]}


def test_a_figure_by_hand(tmp_path, monkeypatch):
    case = {"d": 256, "T": 16, "tied": False, "adapter": "none"}
    rows = [
        {**case, "method": "ours", "time_ratio": 1.0444, "memory_ratio": 1},
        {**case, "method": "a|b", "cannot_run": "no"},
    ]
    environment = {"accelerator": None, "processor": "P", "cores": 2, "torch_threads": 1, "packages": {"torch": "2"}}
    report = {"command": "python -m benchmarks.engine", "environment": environment, "rows": rows}
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(report))
    section = results.section(path)
    assert "| d | T | tied | adapter | ours | a|b |" not in section  # a bar would end the cell
    assert "| 256 | 16 | no | none | 1.044 | cannot run |" in section
    path.rename(tmp_path / "noise.json")
    report["rows"] = [{"check": "x", "failed": 0, "value": 0.123456}, {"check": "y|z", "failed": None}]
    (tmp_path / "noise.json").write_text(json.dumps(report))
    assert "| x | 0 | 0.1235 |\n| y\\|z |  |  |" in results.section(tmp_path / "noise.json")
