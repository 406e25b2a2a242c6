"""The mutants fit the code as it is, and a mutant that does not is an error, not a kill."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutants import apply
from benchmarks.mutations import AUDIT, HARMLESS, MUTANTS, Mutant

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", (*MUTANTS, HARMLESS), ids=lambda mutant: mutant.name)
def test_every_mutant_applies_and_names_real_killers(mutant, tmp_path):
    package = tmp_path / "hf_spectral_dp"
    shutil.copytree(ROOT / "src" / "hf_spectral_dp", package, ignore=shutil.ignore_patterns("checkpoints"))
    apply(mutant, package)
    changed = {name for name, *_ in (*mutant.replaced, *mutant.appended)}
    for name in changed:
        text = (package / name).read_text("utf-8")
        assert text != (ROOT / "src" / "hf_spectral_dp" / name).read_text("utf-8")
        ast.parse(text)
    assert changed and mutant.killers
    for killer in set(mutant.killers) - {AUDIT}:
        file, _, test = killer.partition("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text("utf-8")


def test_there_are_enough_and_their_names_differ():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12
    assert sum(mutant.quick for mutant in MUTANTS) >= 8


def test_a_fragment_that_is_gone_is_an_error(tmp_path):
    (tmp_path / "x.py").write_text("a = 1\na = 1\n")
    for fragment in ("b = 2", "a = 1"):
        with pytest.raises(LookupError, match="not once"):
            apply(Mutant("x", replaced=(("x.py", fragment, ""),)), tmp_path)


@pytest.mark.slow
def test_a_mutant_is_killed_in_a_process_of_its_own(tmp_path):
    """One end to end; `python -m benchmarks.mutants` does all of them."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.mutants", "--quick", "--only", "noise missing", "--out", str(report)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    (row,) = json.loads(report.read_text())["rows"]
    assert row["check"] == "noise missing on one parameter" and row["tried"] == 1 and row["failed"] == 0
    assert row["killed_by"].startswith("mechanism audit: canaries in a crowd")
