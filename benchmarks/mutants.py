"""Bugs put into a copy of the package on purpose, and what notices them: ``python -m benchmarks.mutants``.

Each mutant is the real source with one change: a fragment replaced, or a few lines appended to a module that change
what one of its functions does (so that the mutant survives a rewrite of the function's body). The copy is imported in
a process of its own, where the mechanism audit and the tests that ought to notice run against it. A mutant counts as
killed only by a refuted audit or a failed assertion: one that cannot be applied, or that merely crashes, is an error.
The same killers must pass on the code as it is. `--quick`: fewer mutants, 2 * 10^4 trials in place of 10^5, and for
the mechanism's mutants the audit alone.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Before torch: more threads than cores only slow each other down, and none may be running when processes fork.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from benchmarks.mutations import AUDIT, MUTANTS, Mutant  # noqa: E402
from benchmarks.report import write_report  # noqa: E402

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Effort:
    """How hard the killers try."""

    trials: int
    lone_trials: int
    tests_too: bool  # also where the audit should be enough


# -- in the process of one mutant --------------------------------------------------------------------------------------


def apply(mutant: Mutant, package: Path) -> None:
    """Changes a copy of the package.

    Raises:
        LookupError: a fragment that is not there exactly once: the mutant has to follow the code.
    """
    for name, old, new in mutant.replaced:
        path = package / name
        text = path.read_text("utf-8")
        if text.count(old) != 1:
            raise LookupError(f"{mutant.name}: {old!r} occurs {text.count(old)} times in {name}, not once.")
        path.write_text(text.replace(old, new), "utf-8")
    for name, lines in mutant.appended:
        with (package / name).open("a", encoding="utf-8") as file:
            file.write("\n\n" + lines)


class _Failures:
    """A pytest plugin: which tests failed, and whether by an assertion."""

    def __init__(self) -> None:
        self.asserted: list[str] = []
        self.crashed: list[str] = []
        self.passed = 0

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        import pytest

        if call.excinfo is None:
            self.passed += call.when == "call"
            return
        if call.excinfo.errisinstance(pytest.skip.Exception):
            return
        honest = call.when == "call" and call.excinfo.errisinstance((AssertionError, pytest.fail.Exception))
        (self.asserted if honest else self.crashed).append(item.nodeid.removeprefix("tests/"))


def _audit(effort: Effort) -> list[str]:
    """Findings that refute the claim."""
    from hf_spectral_dp.privacy.audit import mechanism_audit

    audit = mechanism_audit(trials=effort.trials, lone_trials=effort.lone_trials)
    return [f"mechanism audit: {finding.check}" for finding in audit.findings if finding.refuted]


def _tests(names: Sequence[str]) -> list[str]:
    """Failed tests. An error where none ran, or one crashed."""
    import pytest

    failures = _Failures()
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    code = pytest.main([*options, *(f"{ROOT}/tests/{name}" for name in names)], plugins=[failures])
    if failures.crashed or not failures.asserted + [""] * failures.passed:
        raise RuntimeError(f"pytest ended with {code}; not by an assertion: {failures.crashed or names}")
    return failures.asserted


def attack(mutant: Mutant, effort: Effort) -> dict[str, Any]:
    """One row: the mutant, and what killed it."""
    started = time.perf_counter()
    row: dict[str, Any] = {"check": mutant.name, "tried": 1}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        stdout, stderr = os.dup(1), os.dup(2)
        try:
            apply(mutant, source / "hf_spectral_dp")
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            sys.path[:0] = [str(source), str(ROOT / "tests")]
            import hf_spectral_dp

            if Path(hf_spectral_dp.__file__).parents[1] != source:
                raise RuntimeError(f"{hf_spectral_dp.__file__} was imported, not the copy in {source}")
            os.chdir(ROOT)
            killers = _audit(effort) if AUDIT in mutant.killers else []
            tests = [name for name in mutant.killers if name != AUDIT]
            if tests and (effort.tests_too or AUDIT not in mutant.killers):
                killers += _tests(tests)
            row |= {"failed": int(not killers), "killed_by": "; ".join(killers) or "nothing"}
        except Exception as error:
            traceback.print_exc()
            row |= {"failed": 1, "killed_by": f"error, not a kill: {type(error).__name__}: {error}"}
        finally:
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


# -- all of them -------------------------------------------------------------------------------------------------------


def _preload() -> None:
    """What all processes need and no mutant changes; they are forked from this one."""
    import datasets  # noqa: F401
    import jsonschema  # noqa: F401
    import opacus  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.trainer  # noqa: F401
    from diffusers import DiffusionPipeline  # noqa: F401
    from dp_accounting.pld import PLDAccountant  # noqa: F401
    from scipy import stats  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    if any(name.split(".")[0] == "hf_spectral_dp" for name in sys.modules):
        raise RuntimeError("the package is imported already; mutants would not be.")


def unmutated(mutants: Sequence[Mutant], audits: int, effort: Effort) -> list[Mutant]:
    """The code as it is, against every killer in use; the first of them stands for all tests."""
    tests = sorted({name for mutant in mutants for name in mutant.killers if name != AUDIT})
    needed = tests if effort.tests_too else [
        name for name in tests if any(name in mutant.killers and AUDIT not in mutant.killers for mutant in mutants)
    ]  # fmt: skip
    return [Mutant("unmutated: tests", killers=tuple(needed)), *[Mutant("unmutated: audit", killers=(AUDIT,))] * audits]


def run(mutants: Sequence[Mutant], audits: int, effort: Effort, processes: int) -> list[dict[str, Any]]:
    """Rows of all mutants, then of the unmutated code: `failed` counts survivors and false alarms."""
    _preload()
    plain = unmutated(mutants, audits, effort)
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        results = pool.imap(partial(attack, effort=effort), [*mutants, *plain], chunksize=1)
        rows = [results.next(timeout=900) for _ in [*mutants, *plain]]
    rows, originals = rows[: len(mutants)], rows[len(mutants) :]
    for name in ("unmutated: tests", "unmutated: audit"):
        these = [row for row in originals if row["check"] == name]
        alarms = [row["killed_by"] for row in these if row["killed_by"] != "nothing"]
        text = "; ".join(alarms) or "nothing, as it should be"
        seconds = round(sum(row["seconds"] for row in these), 1)
        counts = {"tried": len(these), "failed": len(alarms)}
        rows.append({"check": f"{name}, false alarms", **counts, "killed_by": text, "seconds": seconds})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer mutants and trials; within 50 seconds on 2 cores")
    parser.add_argument("--only", help="mutants whose name contains this")
    parser.add_argument("--out", help="file for the JSON report")
    arguments = parser.parse_args()
    effort = Effort(20_000, 100, False) if arguments.quick else Effort(100_000, 400, True)
    mutants = [mutant for mutant in MUTANTS if mutant.quick or not arguments.quick]
    mutants = [mutant for mutant in mutants if arguments.only is None or arguments.only in mutant.name]
    rows = run(mutants, 2 if arguments.quick else 20, effort, processes=len(os.sched_getaffinity(0)))
    command = "python -m benchmarks.mutants" + " --quick" * arguments.quick
    write_report(command, rows, arguments.out)
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
