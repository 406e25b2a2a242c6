"""The short form of `benchmarks.reliability` holds, and catches a trainer, a ledger or a save that is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# At least so many cases of each; the long form has more of them.
CHECKS = {
    "kill -9 at a random moment": 50,
    "kill -9 at a named point": 40,
    "I/O error at each call of a save": 100,
    "I/O error in the ledger": 3,
    "random schedule with crashes": 500,
    "bit flip in a checkpoint": 500,
    "bit flip in a ledger": 500,
    "checkpoint cut, or a file missing or added": 500,
    "two processes, one ledger": 200,
    "two trainers, one folder": 3,
    "resume from every checkpoint": 4,
    "ledger cut at every byte of its last record": 200,
    "full disk": 10,
    "read-only disk": 0,  # no case where this process may not mount
}

# Each is wrong in one way; the checks must say so.
SABOTAGE = """
import json, sys, tempfile
from functools import partial
from pathlib import Path

from benchmarks import crashes, disk_faults, reliability
from hf_spectral_dp import checkpoint_files, saving_trainer, trainer
from hf_spectral_dp.privacy.ledger import PrivacyLedger

def point(name):
    crashes.POINTS[:] = [crashes.NAMED[name]]
    return partial(crashes.kill_at_named_points, rounds=1)

def charged_late(base):
    def charge(self):  # the one before is paid when the next one comes
        if self._charged:
            self._ledger.charge()
        self._charged += 1
    trainer.DPTrainer._charge = charge
    return point("noise added")(base)

def forgotten_on_resume(base):
    def fresh(path, header, max_charges, expected_head=None):
        path.unlink()
        return PrivacyLedger.create(path, header, max_charges)
    PrivacyLedger.open = fresh
    return point("weights changed")(base)

def saved_in_place(base):
    saving_trainer.staging = lambda folder: folder
    saving_trainer.publish = lambda staged, target, **facts: (staged / checkpoint_files.STATE).write_bytes(
        checkpoint_files._seal({"format": 1, "files": {}, **facts})
    )
    saving_trainer.clear_staging = lambda folder: None
    return point("weights saved")(base)

def rotated_first(base):
    save = saving_trainer.SavingTrainer._save_whole
    def wrong(self, model, trial):
        checkpoint_files.rotate(Path(self.args.output_dir), 1)
        return save(self, model, trial)
    saving_trainer.SavingTrainer._save_whole = wrong
    return disk_faults.full_disk(base)

def sizes_only(base):
    class Same:
        hexdigest = staticmethod(lambda: "0" * 64)
    checkpoint_files.hashlib.file_digest = lambda file, kind: Same
    return reliability.flips_in_a_checkpoint(base, 200)

def more_than_planned(base):
    open_ = PrivacyLedger.open.__func__
    def generous(cls, path, header, max_charges, expected_head=None):
        ledger = open_(cls, path, header, max_charges, expected_head)
        ledger.max_charges += 1
        return ledger
    PrivacyLedger.open = classmethod(generous)
    return reliability.schedules(base, 50, 1, 1.0)

def no_lock(base):
    from hf_spectral_dp.privacy import ledger
    ledger.fcntl.flock = lambda *arguments: None
    return reliability.races(base, 50)

with tempfile.TemporaryDirectory(dir=crashes.MEMORY) as folder:
    crashes.warm_up(Path(folder))
    work = [charged_late, forgotten_on_resume, saved_in_place, rotated_first, sizes_only, more_than_planned, no_lock]
    found = {}
    for check in work:  # each in a child of its own, so that none meets another's patch
        answer = Path(folder) / check.__name__
        answer.mkdir()
        run = lambda: (answer / "row").write_text(json.dumps(check(answer)))
        crashes.ended(crashes.start(run, answer / "log"))
        row = answer / "row"
        found[check.__name__] = json.loads(row.read_text())["failed"] if row.exists() else (answer / "log").read_text()
    Path(sys.argv[1]).write_text(json.dumps(found))
"""


def run(*arguments: str) -> None:
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("reliability") / "report.json"
    run("-m", "benchmarks.reliability", "--quick", "--out", str(out))
    report = json.loads(out.read_text())
    return {row["check"]: row for row in report["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_holds(rows, check):
    assert rows[check]["failed"] == 0
    assert rows[check]["tried"] >= CHECKS[check]


@pytest.mark.slow
def test_every_sabotage_is_caught(tmp_path):
    run("-c", SABOTAGE, str(tmp_path / "found"))
    found = json.loads((tmp_path / "found").read_text())
    assert len(found) == 7 and all(isinstance(failed, int) and failed > 0 for failed in found.values()), found
