"""Bugs put into a copy of the package on purpose, and what notices them: ``python -m benchmarks.mutants``.

Each mutant is the real source with one change: a fragment replaced, or a few lines appended to a module that change
what one of its functions does (so that the mutant survives a rewrite of the function's body). The copy is imported in
a process of its own, where the mechanism audit and the tests that ought to notice run against it. A mutant counts as
killed only by a refuted audit or a failed assertion: one that cannot be applied, or that merely crashes, is an error.
The same killers must pass on the code as it is, and the audits must hold what they promise: rows "unmutated".
`--quick`: fewer mutants, 2 * 10^4 trials in place of 10^5, and for the mechanism's mutants the audit alone.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Before torch: more threads than cores only slow each other down, and none may be running when processes fork.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from benchmarks.mutations import AUDIT, HARMLESS, MUTANTS, Mutant  # noqa: E402
from benchmarks.report import write_report  # noqa: E402

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Effort:
    """How hard the killers try."""

    trials: int
    lone_trials: int
    steps: int  # to memorise rows
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


def _named(killer: str, found: Sequence[str]) -> list[str]:
    """One line for all that one killer found."""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [f"{killer}: {', '.join(found[:3])}{more}"] if found else []


def _audit(effort: Effort) -> list[str]:
    """Findings that refute the claim."""
    from hf_spectral_dp.privacy.audit import mechanism_audit

    audit = mechanism_audit(trials=effort.trials, lone_trials=effort.lone_trials)
    return _named("mechanism audit", [finding.check for finding in audit.findings if finding.refuted])


def _tests(names: Sequence[str]) -> list[str]:
    """Failed tests, in one line. An error where none ran, or one crashed."""
    import pytest

    failures = _Failures()
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    code = pytest.main([*options, *(f"{ROOT}/tests/{name}" for name in names)], plugins=[failures])
    if failures.crashed or not failures.asserted + [""] * failures.passed:
        raise RuntimeError(f"pytest ended with {code}; not by an assertion: {failures.crashed or names}")
    return _named("tests", failures.asserted)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No output of this process or of libraries in C."""
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere:
        for descriptor in (1, 2):
            os.dup2(nowhere.fileno(), descriptor)
        try:
            yield
        finally:
            sys.stdout.flush()
            for descriptor in (1, 2):
                os.dup2(kept[descriptor - 1], descriptor)


def _import_from(source: Path) -> None:
    sys.path[:0] = [str(source), str(ROOT / "tests")]
    os.chdir(ROOT)
    import hf_spectral_dp

    if Path(hf_spectral_dp.__file__).parents[1] != source:
        raise RuntimeError(f"{hf_spectral_dp.__file__} was imported, not the copy in {source}")


def attack(mutant: Mutant, effort: Effort) -> tuple[bool, str]:
    """Was the mutant killed, and by what?"""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        apply(mutant, source / "hf_spectral_dp")
        _import_from(source)
        killers = _audit(effort) if AUDIT in mutant.killers else []
        tests = [name for name in mutant.killers if name != AUDIT]
        if tests and (effort.tests_too or AUDIT not in mutant.killers):
            killers += _tests(tests)
    return bool(killers), "; ".join(killers) or "nothing"


# -- what the audits promise, on the code as it is ---------------------------------------------------------------------


def _right_code_passes(effort: Effort) -> tuple[bool, str]:
    alarms = _audit(effort)
    return not alarms, "; ".join(alarms)


def _weak_noise_is_refuted(effort: Effort) -> tuple[bool, str]:
    from hf_spectral_dp.privacy.audit import mechanism_audit

    audit = mechanism_audit(0.95, 1.0, effort.trials, effort.lone_trials)
    return audit.refuted, f"mu >= {audit.mu_lower_bound:.3f}"


def _one_run_stays_below(epsilon: float, effort: Effort) -> tuple[bool, str]:
    from hf_spectral_dp.self_audit import one_run_audit

    audit = one_run_audit(epsilon)
    return not audit.refuted, f"{audit.lower_bound:.2f}"


def _one_run_catches_the_twin(effort: Effort) -> tuple[bool, str]:
    from hf_spectral_dp.self_audit import one_run_audit

    audit = one_run_audit(2.0, noise=False)
    return audit.lower_bound >= 3, f"{audit.lower_bound:.2f}"


def _membership_of_the_twin(effort: Effort) -> tuple[bool, str]:
    from hf_spectral_dp.self_audit import membership_audit

    private, twin = (membership_audit(1.0, noise, steps=effort.steps) for noise in (True, False))
    best = max(result.low for result in twin)
    text = f"AUROC {private[0].auroc:.2f} with privacy, {twin[0].auroc:.2f} without"
    return best > 0.9 and private[0].high < twin[0].low, text


def _wrapper_is_harmless(effort: Effort) -> tuple[bool, str]:
    killed, text = attack(HARMLESS, effort)
    return not killed, text if killed else ""


def _tests_pass(names: Sequence[str], effort: Effort) -> tuple[bool, str]:
    failed = _tests(names)
    return not failed, "; ".join(failed)


def promises(mutants: Sequence[Mutant], quick: bool) -> dict[str, tuple[Callable[[Effort], tuple[bool, str]], int]]:
    """For the code as it is: what to check, and how often."""
    used = {name for mutant in mutants for name in mutant.killers if not quick or AUDIT not in mutant.killers}
    times = 1 if quick else 5
    one_run = {
        f"unmutated: one-run audit, epsilon = {epsilon:g}: lower bound <= epsilon": (
            partial(_one_run_stays_below, epsilon),
            times,
        )
        for epsilon in ((2.0,) if quick else (1.0, 2.0, 4.0))
    }
    return {
        "unmutated: the tests above pass": (partial(_tests_pass, sorted(used - {AUDIT})), 1),
        "unmutated: mechanism audit accepts": (_right_code_passes, 2 if quick else 20),
        "unmutated: mechanism audit told of 1/0.95 of the noise refutes": (_weak_noise_is_refuted, 1 if quick else 20),
        **one_run,
        "unmutated: one-run audit of the non-private twin: lower bound >= 3": (_one_run_catches_the_twin, times),
        "unmutated: membership inference catches the non-private twin": (_membership_of_the_twin, 1 if quick else 3),
    }


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


Job = tuple[str, Callable[[], tuple[bool, str]], bool]  # name, what to do, on the code as it is


def _in_a_process(job: Callable[[], tuple[bool, str]], imports: bool) -> tuple[bool, str, float]:
    """What a job found, and its seconds; whatever else ends it is no kill and no pass."""
    started = time.perf_counter()
    with _quiet():
        try:
            if imports:
                _import_from(ROOT / "src")
            good, text = job()
        except Exception as error:
            good, text = False, f"error: {type(error).__name__}: {error}"
    return good, text, time.perf_counter() - started


def run(effort: Effort, quick: bool, only: str) -> list[dict[str, Any]]:
    """Rows of all mutants, then of the code as it is; `failed` counts survivors, errors and broken promises."""
    _preload()
    mutants = [mutant for mutant in MUTANTS if mutant.quick or not quick]
    jobs: list[Job] = [(mutant.name, partial(attack, mutant, effort), False) for mutant in mutants]
    jobs += [(f"unmutated: {HARMLESS.name}", partial(_wrapper_is_harmless, effort), False)]
    for name, (check, times) in promises(mutants, quick).items():
        jobs += [(name, partial(check, effort), True)] * times
    jobs = [job for job in jobs if only in job[0]]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
        results = [pool.apply_async(_in_a_process, (job, imports)) for _, job, imports in jobs]
        found = [(name, *result.get(timeout=3600)) for (name, _, _), result in zip(jobs, results, strict=True)]
    rows = []
    for name in dict.fromkeys(name for name, _, _ in jobs):
        these = [row for row in found if row[0] == name]
        rows.append(
            {
                "check": name,
                "tried": len(these),
                "failed": sum(not good for _, good, _, _ in these),
                "killed_by": "; ".join(dict.fromkeys(text for _, _, text, _ in these if text)),
                "seconds": round(sum(seconds for *_, seconds in these), 1),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer mutants and trials; within 50 seconds on 2 cores")
    parser.add_argument("--only", default="", help="only the rows whose name contains this")
    parser.add_argument("--out", help="file for the JSON report")
    arguments = parser.parse_args()
    effort = Effort(20_000, 60, 100, False) if arguments.quick else Effort(100_000, 200, 300, True)
    rows = run(effort, arguments.quick, arguments.only)
    command = "python -m benchmarks.mutants" + " --quick" * arguments.quick
    command += f" --only {arguments.only!r}" if arguments.only else ""
    write_report(command, rows, arguments.out)
    return int(not rows or any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
