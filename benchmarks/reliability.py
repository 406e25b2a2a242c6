"""Does the guarantee survive? Crashes, full disks, damaged files, races and random schedules, as numbers.

Every row is one property: `tried` cases, `failed` of them. All files are real, and so is the code: training, ledger and
checkpoints are those of the package, unchanged. `crashes` and `disk_faults` describe how runs are killed and broken.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks import crashes, disk_faults, hostile_images
from benchmarks.crashes import FINISHED, REFUSED, STEPS, Row, complaint, ended, new_run, start, trainer_in
from benchmarks.report import write_report
from hf_spectral_dp.checkpoint_files import STATE, CheckpointError, verify
from hf_spectral_dp.privacy import ledger as ledger_module
from hf_spectral_dp.privacy.budget import PrivacyBudget, PrivacyPlan
from hf_spectral_dp.privacy.ledger import BudgetExhausted, LedgerError, PrivacyLedger, read_ledger
from hf_spectral_dp.trainer import LEDGER

HEADER = {"sampling_rate": 0.1, "noise_multiplier": 1.25}
PLANNED = 100

# -- damage -----------------------------------------------------------------------------------------------------------


def refusal(action: Callable[[], Any], error: type[Exception]) -> str:
    """ "" if `action` is refused with `error`, else what happened instead."""
    try:
        return f"not noticed: {action()}"
    except error:
        return ""
    except Exception as other:
        return f"{type(other).__name__} instead of {error.__name__}: {other}"


def reopened(path: Path, head: str | None = None) -> tuple[int, str]:
    with PrivacyLedger.open(path, HEADER, PLANNED, head) as ledger:
        return ledger.charged, ledger.head


def written_ledger(path: Path, charges: int) -> tuple[bytes, str]:
    with PrivacyLedger.create(path, HEADER, PLANNED) as ledger:
        for _ in range(charges):
            ledger.charge()
        return path.read_bytes(), ledger.head


def flips_in_a_ledger(base: Path, count: int) -> Row:
    """A bit flipped anywhere: refused. In the very last byte it makes a torn record: counted, but no head names it."""
    complaints = []
    with new_run(base) as folder:
        path = folder / "ledger"
        content, head = written_ledger(path, 12)
        last = len(content) - 1
        for number in range(count):
            place = last if number < 8 else random.randrange(last)
            bit = number % 8 if number < 8 else random.randrange(8)
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            wrong = refusal(partial(reopened, path, head), LedgerError)
            if place < last:
                wrong = wrong or refusal(partial(reopened, path), LedgerError)
            elif (charged := reopened(path)[0]) != 12:
                wrong = wrong or f"{charged} charges of 12"
            if wrong:
                complaints.append(f"byte {place}, bit {bit}: {wrong}")
    return crashes.report("bit flip in a ledger", count, complaints)


def cuts_of_a_ledger(base: Path) -> Row:
    """The last record cut at every byte: counted as a charge, and its loss noticed by the checkpoint that names it."""
    complaints = []
    with new_run(base) as folder:
        path = folder / "ledger"
        content, head = written_ledger(path, 4)
        first = content[:-1].rindex(b"\n") + 1
        for length in range(first, len(content)):
            path.write_bytes(content[:length])
            wrong = refusal(partial(reopened, path, head), LedgerError)
            expected = 3 if length == first else 4
            if read_ledger(path)["charged"] != expected or reopened(path)[0] != expected:
                wrong = wrong or f"{reopened(path)[0]} charges"
            if wrong:
                complaints.append(f"cut to {length}: {wrong}")
    return crashes.report("ledger cut at every byte of its last record", len(content) - first, complaints)


def trained(base: Path, folder: Path) -> Path:
    """The last checkpoint of a new run in `folder`."""
    assert ended(start(lambda: crashes.train(folder), base / "log")) == FINISHED, (base / "log").read_text()
    return folder / f"checkpoint-{STEPS}"


def flips_in_a_checkpoint(base: Path, count: int) -> Row:
    """A bit flipped anywhere in any file of a checkpoint."""
    complaints = []
    with new_run(base) as folder:
        checkpoint = trained(base, folder)
        contents = {path: path.read_bytes() for path in sorted(checkpoint.iterdir())}
        for _ in range(count):
            path = random.choice(list(contents))
            place, bit = random.randrange(len(contents[path])), random.randrange(8)
            with path.open("r+b", buffering=0) as file:
                os.pwrite(file.fileno(), bytes([contents[path][place] ^ 1 << bit]), place)
                if wrong := refusal(partial(verify, checkpoint), CheckpointError):
                    complaints.append(f"{path.name}, byte {place}, bit {bit}: {wrong}")
                os.pwrite(file.fileno(), contents[path][place : place + 1], place)
        verify(checkpoint)
    return crashes.report("bit flip in a checkpoint", count, complaints)


def cuts_of_a_checkpoint(base: Path, lengths: int) -> Row:
    """Its seal cut at every byte, its other files at `lengths` places; a file deleted, one added."""
    complaints, tried = [], 0
    with new_run(base) as folder:
        checkpoint = trained(base, folder)
        for path in sorted(checkpoint.iterdir()):
            content = path.read_bytes()
            step = 1 if path.name == STATE else max(1, len(content) // lengths)
            for length in [*range(0, len(content), step), len(content) - 1]:
                path.write_bytes(content[:length])
                tried += 1
                if wrong := refusal(partial(verify, checkpoint), CheckpointError):
                    complaints.append(f"{path.name} cut to {length}: {wrong}")
            path.unlink()
            tried += 1
            if wrong := refusal(partial(verify, checkpoint), CheckpointError):
                complaints.append(f"{path.name} deleted: {wrong}")
            path.write_bytes(content)
        verify(checkpoint)
        (checkpoint / "pytorch_model.bin").write_bytes(b"")
        if wrong := refusal(partial(verify, checkpoint), CheckpointError):
            complaints.append(f"a file added: {wrong}")
    return crashes.report("checkpoint cut, or a file missing or added", tried + 1, complaints)


# -- races ------------------------------------------------------------------------------------------------------------


def races(base: Path, count: int) -> Row:
    """Two processes create or open one ledger at the same instant and charge it; one wins, the other is told why."""
    complaints = []
    board = mmap.mmap(-1, 3 * 8)  # the round that has begun, and the last answer of each racer

    def say(place: int, value: int) -> None:
        board[8 * place : 8 * place + 8] = value.to_bytes(8, "little")

    def hear(place: int) -> int:
        return int.from_bytes(board[8 * place : 8 * place + 8], "little")

    def race(place: int, folder: Path) -> None:
        held = None
        for number in range(1, count + 1):
            while hear(0) < number:
                time.sleep(0)
            path = folder / str(number)
            try:
                if number % 2:
                    held = PrivacyLedger.create(path, HEADER, PLANNED)
                else:
                    held = PrivacyLedger.open(path, HEADER, PLANNED)
                held.charge()
                answer = 1
            except LedgerError as error:
                answer = 2 if "locked" in str(error) or "exists" in str(error) else 3
            say(place, 4 * number + answer)
            while hear(3 - place) // 4 < number:  # the winner holds on until the other has tried
                time.sleep(0)
            if held is not None:
                held.close()
            held = None

    with new_run(base) as folder:
        for number in range(2, count + 1, 2):
            PrivacyLedger.create(folder / str(number), HEADER, PLANNED).close()
        racers = [start(partial(race, place, folder), base / f"log-{place}") for place in (1, 2)]
        deadline = time.monotonic() + 10 * count
        for number in range(1, count + 1):
            say(0, number)
            while min(hear(1), hear(2)) // 4 < number and time.monotonic() < deadline:
                time.sleep(0)
            answers = sorted(hear(place) - 4 * number for place in (1, 2))
            charged = read_ledger(folder / str(number))["charged"]
            if answers != [1, 2] or charged != 1:
                complaints.append(f"race {number}: answers {answers}, {charged} charges")
        for racer in racers:
            if ended(racer) != FINISHED:
                complaints.append((base / "log-1").read_text()[-500:] + (base / "log-2").read_text()[-500:])
    return crashes.report("two processes, one ledger", count, complaints)


def trainers_race(base: Path, count: int) -> Row:
    """Two trainers start in one folder at the same instant: never more is applied than one run may."""
    complaints = []
    for _ in range(count):
        ready = mmap.mmap(-1, 2)

        def run(place: int, folder: Path, ready: mmap.mmap = ready) -> None:
            trainer = trainer_in(folder)
            ready[place] = 1
            while not all(ready[:2]):
                time.sleep(0)
            trainer.train()

        with new_run(base) as folder:
            both = [start(partial(run, place, folder), base / f"log-{place}") for place in (0, 1)]
            statuses = sorted(ended(child) for child in both)
            wrong = "" if statuses == [FINISHED, REFUSED] else f"ended with {statuses}"
            if wrong := wrong or complaint(folder):
                complaints.append(wrong)
    return crashes.report("two trainers, one folder", count, complaints)


# -- random schedules -------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


@contextmanager
def crashing(moment: str) -> Iterator[None]:
    """Ends the next append at a moment of it, with a real and maybe torn record on disk."""
    write, fsync = os.write, os.fsync

    def dying_write(descriptor: int, line: bytes) -> int:
        if moment == "torn":
            write(descriptor, line[: random.randrange(1, len(line))])
        if moment in ("before", "torn"):
            raise Crash
        return write(descriptor, line)

    def dying_fsync(descriptor: int) -> None:
        if moment == "not flushed":
            raise Crash
        fsync(descriptor)

    ledger_module.os.write, ledger_module.os.fsync = dying_write, dying_fsync  # type: ignore[assignment]
    try:
        yield
        if moment == "not applied":
            raise Crash
    finally:
        ledger_module.os.write, ledger_module.os.fsync = write, fsync


def schedule(path: Path, plan: PrivacyPlan) -> str:
    """One run with random crashes, until its budget is spent; what went wrong, "" if nothing did."""
    header, steps, applied, rate = {"plan": plan.to_dict()}, plan.steps, 0, random.choice((0.0, 0.1, 0.5, 0.9))
    head: str | None = None
    ledger: PrivacyLedger | None = PrivacyLedger.create(path, header, steps)
    while True:
        moment = random.choice(("before", "torn", "not flushed", "not applied")) if random.random() < rate else "none"
        try:
            if ledger is None:
                with crashing(moment):  # which meets the repair, if there is one
                    ledger = PrivacyLedger.open(path, header, steps, head)
            else:
                with crashing(moment):
                    ledger.charge()
                applied += 1
                if random.random() < 0.3:
                    head = ledger.head  # a checkpoint
        except Crash:
            if ledger is not None:
                ledger._file.close()  # as the system does it for a dead process
            ledger = None
        except BudgetExhausted:
            break
        found = read_ledger(path)["charged"]
        if not applied <= found <= steps:
            return f"{applied} applied, {found} charged, {steps} planned"
        rate *= 0.98  # it ends
    assert ledger is not None
    ledger.close()
    if refusal(partial(PrivacyLedger.open, path, header, steps + 1), LedgerError):
        return "a larger plan was let in"
    found = read_ledger(path)["charged"]
    spent = plan.epsilon(found)
    if spent > plan.target_epsilon or not applied <= found:
        return f"epsilon {spent} of {plan.target_epsilon}, {applied} applied, {found} charged"
    return ""


def schedules(base: Path, count: int, plans: int, largest: float) -> Row:
    """Random plans with random crashes, torn records, crashes within the repair, and resumes: never over budget."""
    complaints, chosen = [], []
    for _ in range(plans):
        budget = PrivacyBudget(random.uniform(0.3, largest))
        chosen.append(
            budget.calibrate(
                num_examples=random.randint(10, 10**6),
                sampling_rate=random.uniform(0.3, 1),
                steps=random.randint(1, 25),
            )
        )
    with new_run(base) as folder:
        for _ in range(count):
            path = folder / "ledger"
            try:
                wrong = schedule(path, random.choice(chosen))
            except LedgerError as error:
                wrong = f"a sound ledger was refused: {error}"
            if wrong:
                complaints.append(wrong)
            path.unlink()
    return crashes.report("random schedule with crashes", count, complaints, plans=plans)


# -- resuming ---------------------------------------------------------------------------------------------------------


class _Snapshots(TrainerCallback):
    """Copies the folder of a run as it is after every save."""

    def __init__(self, folder: Path, target: Path):
        self._folder, self._target = folder, target

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        shutil.copytree(self._folder, self._target / f"after-{state.global_step}")


def resume_everywhere(base: Path) -> Row:
    """A run goes on from every checkpoint, as if it had ended there: same steps, same charges, same accounting."""
    complaints, answers = [], []

    def run(folder: Path, resume: bool, answer: Path, target: Path | None = None) -> None:
        trainer = trainer_in(folder, save_total_limit=None)
        if target is not None:
            trainer.add_callback(_Snapshots(folder, target))
        trainer.train(resume_from_checkpoint=resume or None)
        report = trainer.privacy_report()
        chain = read_ledger(folder / LEDGER)
        facts = {"claim": report["claim"], "mechanism": report["mechanism"], "charged": chain["charged"]}
        facts |= {"step": trainer.state.global_step, "recovered": chain["recovered"]}
        answer.write_text(json.dumps(facts))

    with new_run(base) as folder:
        work = [(folder / "whole", False, folder / "answer-0", folder)]
        work += [(folder / f"after-{step}", True, folder / f"answer-{step}", None) for step in range(1, STEPS + 1)]
        for place, resume, answer, target in work:
            status = ended(start(partial(run, place, resume, answer, target), base / "log"))
            if status != FINISHED:
                complaints.append(f"{answer.name}: ended with {status}: {(base / 'log').read_text()[-1000:]}")
                continue
            answers.append(json.loads(answer.read_text()))
            if answers[-1] != answers[0]:
                complaints.append(f"{answer.name} differs from the run that was never interrupted")
        if not answers or answers[0]["charged"] != STEPS or answers[0]["step"] != STEPS:
            complaints.append(f"{answers[:1]}")
    return crashes.report("resume from every checkpoint", STEPS, complaints)


# -- all of it --------------------------------------------------------------------------------------------------------

Check = Callable[[Path], Row]


def checks(quick: bool, seconds: float) -> list[Check]:
    """The long ones first."""
    long = not quick
    return [
        partial(crashes.kill_at_random, kills=1000 if long else 50, seconds=seconds),
        partial(crashes.kill_at_named_points, rounds=10 if long else 1),
        disk_faults.io_error_at_every_call,
        partial(schedules, count=10_000 if long else 500, plans=20 if long else 3, largest=8.0 if long else 1.0),
        partial(flips_in_a_checkpoint, count=10_000 if long else 500),
        partial(flips_in_a_ledger, count=10_000 if long else 500),
        partial(cuts_of_a_checkpoint, lengths=500 if long else 20),
        partial(disk_faults.io_error_in_the_ledger, rounds=10 if long else 1),
        partial(races, count=200),
        partial(trainers_race, count=50 if long else 3),
        resume_everywhere,
        cuts_of_a_ledger,
        disk_faults.full_disk,
        disk_faults.read_only_disk,
        *([lambda base: hostile_images.run(5000)] if long else []),
        # Further checks go here: anything that takes a folder to work in and returns a row.
    ]


def run_all(work: list[Check], base: Path, workers: int) -> list[Row]:
    """The rows of all checks, each run in a child of its own, `workers` of them at a time."""

    def run(number: int) -> None:
        folder = base / f"check-{number}"
        folder.mkdir()
        crashes.own_counter()
        began = time.monotonic()
        row = work[number](folder)
        row["seconds"] = round(time.monotonic() - began, 1)
        (folder / "row").write_text(json.dumps(row))

    started = running = 0
    while started < len(work) or running:
        if started < len(work) and running < workers:
            if os.fork() == 0:
                try:
                    run(started)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(0)
            started, running = started + 1, running + 1
        else:
            os.wait()
            running -= 1
    rows = [base / f"check-{number}" / "row" for number in range(len(work))]
    if not all(row.exists() for row in rows):
        raise SystemExit("a check ended without a result; see its error above.")
    return [json.loads(row.read_text()) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases; within 50 seconds on two cores")
    parser.add_argument("--out", help="file for the JSON report")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=crashes.MEMORY) as folder:
        base = Path(folder)
        seconds = crashes.warm_up(base)
        rows = run_all(checks(chosen.quick, seconds), base, workers=len(os.sched_getaffinity(0)))
    write_report("python -m benchmarks.reliability" + " --quick" * chosen.quick, rows, chosen.out)
    if any(row["failed"] for row in rows):
        raise SystemExit("a check failed; see above.")


if __name__ == "__main__":
    main()
