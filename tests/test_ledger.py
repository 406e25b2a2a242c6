"""The ledger: whatever is torn, flipped, killed or full, the file never counts fewer charges than were returned."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hf_spectral_dp.privacy import ledger as module
from hf_spectral_dp.privacy.ledger import BudgetExhausted, LedgerError, PrivacyLedger, read_ledger

HEADER = {"sampling_rate": 0.1, "noise_multiplier": 1.25, "data": {"rows": 5000, "fingerprint": "ab" * 32}}
# The module needs the standard library only, so children load it alone and start quickly.
LOAD = f"""
import importlib.util, json, sys, time
spec = importlib.util.spec_from_file_location("ledger", {module.__file__!r})
ledger = importlib.util.module_from_spec(spec)
sys.modules["ledger"] = ledger
spec.loader.exec_module(ledger)
HEADER = {HEADER!r}
"""


def written(path: Path, charges: int, max_charges: int = 100) -> Path:
    with PrivacyLedger.create(path, HEADER, max_charges) as ledger:
        for _ in range(charges):
            ledger.charge()
    return path


def reopened(path: Path, max_charges: int = 100, expected_head: str | None = None) -> tuple[int, str]:
    with PrivacyLedger.open(path, HEADER, max_charges, expected_head) as ledger:
        return ledger.charged, ledger.head


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_charges_are_counted_over_runs(path):
    with PrivacyLedger.create(path, HEADER, 5) as ledger:
        assert (ledger.charged, ledger.header) == (0, HEADER)
        assert [ledger.charge(), ledger.charge()] == [1, 2]
        head = ledger.head
    with PrivacyLedger.open(path, HEADER, 5, expected_head=head) as ledger:
        assert (ledger.charged, ledger.head) == (2, head)
        assert ledger.charge() == 3 and ledger.head != head
    assert reopened(path, 5, expected_head=head)[0] == 3  # a checkpoint may be older than the ledger, not younger


def test_a_charge_is_on_disk_before_it_returns(path, monkeypatch):
    """Through the eyes of another file descriptor, and with the order of system calls."""
    calls = []
    for name in ("write", "fsync"):
        original = getattr(os, name)
        monkeypatch.setattr(module.os, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    with PrivacyLedger.create(path, HEADER, 5) as ledger:
        assert calls == ["write", "fsync", "fsync"]  # the file, then its folder
        for expected in range(1, 6):
            calls.clear()
            assert ledger.charge() == expected == read_ledger(path)["charged"]
            assert calls == ["write", "fsync"]


def test_the_budget_ends_before_anything_is_written(path):
    with PrivacyLedger.create(path, HEADER, 3) as ledger:
        for _ in range(3):
            ledger.charge()
        content = path.read_bytes()
        for _ in range(2):
            with pytest.raises(BudgetExhausted, match="max_charges=3"):
                ledger.charge()
        assert path.read_bytes() == content and ledger.charged == 3
    with PrivacyLedger.open(path, HEADER, 3) as ledger, pytest.raises(BudgetExhausted):
        ledger.charge()


def test_records_hold_nothing_but_the_chain(path):
    lines = [json.loads(line) for line in written(path, 3).read_text().splitlines()]
    assert [set(line) for line in lines[1:]] == [{"index", "kind", "nonce", "previous", "hash"}] * 3
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert all(line["previous"] == before["hash"] for before, line in zip(lines, lines[1:], strict=False))
    assert path.stat().st_mode & 0o077 == 0  # nobody else's to read


def test_ledgers_of_one_plan_differ_from_the_first_record(tmp_path):
    """Or a new ledger, charged as often, would pass for the old one, and a published head would confirm a guess."""
    one, two = (written(tmp_path / name, 2) for name in ("a", "b"))
    pairs = zip(one.read_text().splitlines(), two.read_text().splitlines(), strict=True)
    assert all(json.loads(a)["hash"] != json.loads(b)["hash"] for a, b in pairs)
    with pytest.raises(LedgerError, match="never reached expected_head"):
        reopened(one, expected_head=reopened(two)[1])


def test_two_branches_of_one_ledger_differ(path, tmp_path):
    """An old copy put back and charged on has as many records, but not the checkpoint's head."""
    copy = written(path, 3).read_bytes()
    with PrivacyLedger.open(path, HEADER, 100) as ledger:
        ledger.charge()
        head = ledger.head
    path.write_bytes(copy)
    with PrivacyLedger.open(path, HEADER, 100) as ledger:
        ledger.charge()
    with pytest.raises(LedgerError, match="never reached expected_head"):
        reopened(path, expected_head=head)


def test_cut_at_every_byte_of_the_last_record(path):
    """A torn record counts as a charge; a missing one is noticed through the checkpoint's head."""
    content = written(path, 4).read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    head = reopened(path)[1]
    for length in range(start + 1, len(content)):
        path.write_bytes(content[:length])
        assert read_ledger(path)["charged"] == 4 and read_ledger(path)["recovered"] == 1
        assert reopened(path)[0] == 4
        repaired = path.read_bytes()
        assert repaired.startswith(content[:start]) and b'"recovered"' in repaired[start:]
        assert reopened(path)[0] == 4 and path.read_bytes() == repaired  # once is enough
        with PrivacyLedger.open(path, HEADER, 100) as ledger:
            assert ledger.charge() == 5
        with pytest.raises(LedgerError, match="expected_head"):
            reopened(path, expected_head=head)
    path.write_bytes(content[:start])
    with pytest.raises(LedgerError, match="expected_head"):
        reopened(path, expected_head=head)


def test_cut_anywhere_else_is_noticed_by_the_head_and_never_crashes(path):
    content = written(path, 4).read_bytes()
    head = reopened(path)[1]
    for length in range(0, len(content) - 1, 5):
        path.write_bytes(content[:length])
        with pytest.raises(LedgerError):
            reopened(path, expected_head=head)


def test_a_crash_during_the_repair_loses_nothing(path):
    """Every mixture of a half-written recovered record over a torn one, at every length of both."""
    content = written(path, 3).read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    path.write_bytes(content[:-1])
    reopened(path)
    recovered = path.read_bytes()[start:]
    assert len(recovered) > len(content) - start  # so it covers any tear
    for torn in range(1, len(content) - start, 40):
        for done in range(0, len(recovered) + 1, 7):
            path.write_bytes(content[:start] + recovered[:done] + content[start:-1][:torn][done:])
            assert reopened(path)[0] == 3


def test_two_thousand_bit_flips(path):
    """Each is refused, or (in the last line's end) counted as a torn record; none lowers the count."""
    content, generator = written(path, 12).read_bytes(), random.Random(0)
    head, last = reopened(path)[1], len(content) - 1
    flips = [(last, bit) for bit in range(8)] + [
        (generator.randrange(last), generator.randrange(8)) for _ in range(1992)
    ]
    with path.open("r+b", buffering=0) as file:  # written in place, which is quicker than a new file
        for place, bit in flips:
            os.pwrite(file.fileno(), bytes([content[place] ^ 1 << bit]), place)
            with pytest.raises(LedgerError):
                reopened(path, expected_head=head)
            if place < last:
                with pytest.raises(LedgerError, match="altered|no complete header"):
                    reopened(path)
            else:
                assert read_ledger(path)["charged"] == reopened(path)[0] == 12
            os.pwrite(file.fileno(), content, 0)
            os.ftruncate(file.fileno(), len(content))
    assert reopened(path)[1] == head


def test_forged_records_are_refused(path):
    """Well-formed lines that do not continue the chain: doubled, removed, swapped, foreign, unflagged, overlong."""
    lines = written(path, 4).read_bytes().splitlines(keepends=True)
    foreign = written(path.with_name("other"), 4).read_bytes().splitlines(keepends=True)
    skipping = module._seal(module._entry("charge", 6, json.loads(lines[4])["hash"]))
    unknown = module._seal(module._entry("refund", 5, json.loads(lines[4])["hash"]))
    variants = [
        [*lines, lines[-1]],
        [*lines[:2], *lines[3:]],
        [*lines[:2], lines[3], lines[2], lines[4]],
        [*lines[:4], foreign[4]],
        [foreign[0], *lines[1:]],
        lines[1:],
        [*lines, skipping],
        [*lines, unknown],
        [*lines, b"\n"],
        [*lines, b"[1]\n"],
        [*lines, b"[" * 100_000 + b"\n"],
        [*lines, b"\xff\xfe\n"],
        [*lines, b"{" + b" " * 1000],
        [lines[0].replace(b'"max_charges":100', b'"max_charges":999'), *lines[1:]],
    ]
    for variant in variants:
        path.write_bytes(b"".join(variant))
        for look in (lambda: reopened(path), lambda: read_ledger(path)):
            with pytest.raises(LedgerError, match="altered.*backup"):
                look()


def test_nothing_may_follow_the_last_planned_charge(path):
    content = written(path, 3, max_charges=3).read_bytes()
    fourth = module._seal(module._entry("charge", 4, reopened(path, 3)[1]))
    for more, named in ((fourth[:10], "altered"), (fourth, "4 charges of max_charges=3")):
        path.write_bytes(content + more)
        with pytest.raises(LedgerError, match=named):
            reopened(path, 3)


def test_another_plan_is_refused(path):
    written(path, 1)
    changed = [{**HEADER, "sampling_rate": 0.2}, {"sampling_rate": 0.1}, {**HEADER, "more": None}]
    for header, named in zip(changed, ("sampling_rate", "data", "more"), strict=True):
        with pytest.raises(LedgerError, match=f"header differs in.*{named}") as caught:
            PrivacyLedger.open(path, header, 100)
        assert "abab" not in str(caught.value)  # a fingerprint of the data stays out of logs
    with pytest.raises(LedgerError, match="header differs in"):  # equal to Python, not to an auditor
        PrivacyLedger.open(path, {**HEADER, "data": {"rows": 5000.0, "fingerprint": "ab" * 32}}, 100)
    with pytest.raises(LedgerError, match="max_charges=101 differs from the 100"):
        PrivacyLedger.open(path, HEADER, 101)
    assert reopened(path)[0] == 1  # a refused open leaves no lock behind


def test_what_cannot_be_opened_or_created(path, tmp_path):
    with pytest.raises(LedgerError, match="is missing.*checkpoint"):
        reopened(path)
    with pytest.raises(LedgerError, match="cannot be read"):
        read_ledger(path)
    with pytest.raises(LedgerError, match="choose a folder that exists"):
        PrivacyLedger.create(tmp_path / "no" / "ledger", HEADER, 1)
    with pytest.raises(LedgerError, match="cannot be opened"):
        PrivacyLedger.open(tmp_path, HEADER, 1)
    with pytest.raises(ValueError, match="max_charges=0"):
        PrivacyLedger.create(path, HEADER, 0)
    for header in ({"rate": float("nan")}, {"path": tmp_path}):
        with pytest.raises(ValueError, match="plain, finite JSON"):
            PrivacyLedger.create(path, header, 1)
    assert not path.exists()
    content = written(path, 2).read_bytes()
    with pytest.raises(LedgerError, match="exists, and its charges count"):
        PrivacyLedger.create(path, HEADER, 100)
    assert path.read_bytes() == content
    path.write_bytes(b"")  # creating was cut short
    with pytest.raises(LedgerError, match="no complete header.*delete the file"):
        reopened(path)


@pytest.mark.parametrize("broken", ["write", "short write", "fsync"])
def test_a_full_disk_ends_the_ledger_not_the_guarantee(path, monkeypatch, broken):
    ledger = PrivacyLedger.create(path, HEADER, 100)
    ledger.charge()
    write = os.write

    def full(*arguments):
        if broken == "short write":
            return write(arguments[0], arguments[1][:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, broken.split()[-1], full)
        with pytest.raises(LedgerError, match="No space left.*open the ledger again"):
            ledger.charge()
    for _ in range(3):  # the disk has room again, but what it holds is unknown
        with pytest.raises(LedgerError, match="open it again"):
            ledger.charge()
    assert ledger.charged == 1
    ledger.close()
    assert reopened(path)[0] == (1 if broken == "write" else 2)


def test_an_interrupt_within_a_charge_ends_the_ledger_too(path, monkeypatch):
    ledger = PrivacyLedger.create(path, HEADER, 100)

    def interrupted(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.charge()
    with pytest.raises(LedgerError):
        ledger.charge()
    ledger.close()
    assert reopened(path)[0] == 1


@pytest.mark.parametrize("broken", ["write", "fsync"])
def test_a_ledger_that_cannot_be_created_leaves_nothing(path, monkeypatch, broken):
    def full(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, broken, full)
        with pytest.raises(LedgerError, match="Input/output error"):
            PrivacyLedger.create(path, HEADER, 100)
    assert not path.exists()
    written(path, 1)


def test_a_ledger_deleted_or_changed_while_open_is_noticed(tmp_path):
    def append(path: Path) -> None:
        with path.open("ab") as file:
            file.write(b"x")

    harms = [Path.unlink, append, lambda path: os.truncate(path, 10), lambda path: path.with_name("b").replace(path)]
    for index, harm in enumerate(harms):
        (tmp_path / "b").write_bytes(b"")
        ledger = PrivacyLedger.create(tmp_path / str(index), HEADER, 100)
        ledger.charge()
        harm(tmp_path / str(index))
        with pytest.raises(LedgerError, match="deleted or changed"):
            ledger.charge()
        ledger.close()


def test_one_holder_at_a_time_even_within_a_process(path):
    ledger = PrivacyLedger.create(path, HEADER, 100)
    with pytest.raises(LedgerError, match="locked"):
        reopened(path)
    assert read_ledger(path)["charged"] == 0
    ledger.charge()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.charge()
    assert reopened(path)[0] == 1


def test_threads_charge_one_after_the_other(path):
    with PrivacyLedger.create(path, HEADER, 1000) as ledger:
        returned: list[int] = []
        threads = [
            threading.Thread(target=lambda: returned.extend(ledger.charge() for _ in range(50))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(returned) == list(range(1, 201))
    assert reopened(path, 1000)[0] == 200


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_a_forked_child_neither_charges_nor_keeps_the_lock(path, end):
    ledger = PrivacyLedger.create(path, HEADER, 100)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ledger.charge()
        except LedgerError:
            os.write(writing, b"refused")
            signal.pause()  # lives on, as a data loader's worker would
        os._exit(1)
    try:
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            assert pipe.read(7) == b"refused"
        with pytest.raises(LedgerError, match="locked"):
            reopened(path)  # the child's end of the ledger is not ours
        assert ledger.charge() == 1
        ledger.close() if end == "closed" else ledger._file.close()  # a dying process unlocks nothing itself
        assert reopened(path)[0] == 1
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_closing_releases_the_lock_whoever_inherited_the_file(path):
    """A program started by a C library gets copies of all descriptors, and no Python hook runs in it."""
    ledger = PrivacyLedger.create(path, HEADER, 100)
    with subprocess.Popen(["sleep", "60"], pass_fds=[ledger._file.fileno()]) as child:
        ledger.close()
        assert reopened(path)[0] == 0
        child.kill()


def test_two_processes_race_for_the_lock_and_one_wins(path):
    """Twenty races from a common starting time; the winner charges once, the loser not at all."""
    written(path, 0)
    code = LOAD + (
        f"for line in sys.stdin:\n"
        f"    while time.monotonic() < float(line): pass\n"
        f"    try: held = ledger.PrivacyLedger.open({str(path)!r}, HEADER, 100)\n"
        f"    except ledger.LedgerError as error: held = print('locked' in str(error) and 'lost', flush=True)\n"
        f"    else: print('won', held.charge(), flush=True)\n"
        f"    sys.stdin.readline()\n"
        f"    held and held.close()\n"
        f"    print('ready', flush=True)\n"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]

    def say(line: str) -> list[str]:
        for racer in racers:
            racer.stdin.write(f"{line}\n")
            racer.stdin.flush()
        return [racer.stdout.readline().strip() for racer in racers]

    try:
        for race in range(20):
            assert sorted(say(str(time.monotonic() + 0.005))) == ["lost", f"won {race + 1}"]
            assert say("") == ["ready", "ready"]
    finally:
        for racer in racers:
            racer.communicate()
    assert reopened(path)[0] == 20


def test_killed_at_random_moments(path):
    """kill -9 in the middle of charging, fifteen times on one ledger: on disk at least what was returned."""
    written(path, 0, 10**6)
    code = LOAD + (
        f"held = ledger.PrivacyLedger.open({str(path)!r}, HEADER, 10**6)\n"
        f"print(held.charged, flush=True)\n"
        f"while True: print(held.charge(), flush=True)\n"
    )
    generator, on_disk = random.Random(0), 0
    for _ in range(15):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        first = int(child.stdout.readline())
        time.sleep(generator.uniform(0, 0.03))
        child.kill()
        reported = [first, *(int(line) for line in child.communicate()[0].splitlines() if line)]
        assert first == on_disk
        assert reported == list(range(first, first + len(reported)))
        on_disk = read_ledger(path)["charged"]
        assert reported[-1] <= on_disk <= reported[-1] + 2  # one charge under way, one whose report was cut short
        assert reopened(path, 10**6)[0] == on_disk
    assert on_disk > 15
