"""The write-ahead ledger: every noisy update is on disk before it happens, so a crash can only over-count.

A ledger is a JSONL file. Its first record holds the plan (`header`, `max_charges`), every further one is one charge,
that is one application of the mechanism. A record carries its index, a random nonce, the hash of its predecessor and
its own SHA-256, so no byte can change unnoticed. It carries no time and nothing that depends on the data. The nonces
make every ledger unlike any other of the same plan, and keep its published hash from confirming a guess of the header.

What it cannot notice alone: whole records missing from the end, or a consistent older copy put back. A checkpoint
therefore names the ledger's `head`, and `open(..., expected_head=...)` refuses a ledger that never reached it. Nobody
who can rewrite the file *and* the checkpoints is stopped: the chain guards against accidents, not against the owner.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

_FORMAT = 1
_REMEDY = "restore it from a backup; without one, what was spent is unknown and no epsilon can be claimed for this run"


class LedgerError(RuntimeError):
    """The ledger cannot vouch for what was spent."""


class BudgetExhausted(RuntimeError):
    """All planned charges are spent; one more would exceed the budget."""


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _seal(record: Mapping[str, Any]) -> bytes:
    """The line of a record: canonical JSON with the hash of everything else in it, `previous` included."""
    digest = hashlib.sha256(_json(record).encode()).hexdigest()
    return _json({**record, "hash": digest}).encode() + b"\n"


def _entry(kind: str, index: int, previous: str, **fields: Any) -> dict[str, Any]:
    return {"index": index, "kind": kind, "nonce": secrets.token_hex(16), "previous": previous, **fields}


def _is_genuine(record: Any, line: bytes, index: int, previous: str) -> bool:
    if not isinstance(record, dict):
        return False
    kinds = ("charge", "recovered") if index else ("header",)
    in_place = record.get("index") == index and record.get("previous") == previous and record.get("kind") in kinds
    return in_place and _seal({key: value for key, value in record.items() if key != "hash"}) == line


@dataclass
class _Chain:
    """What a file holds: its verified records, the bytes they take, and how many bytes of a torn one follow."""

    header: dict[str, Any]
    max_charges: int
    heads: list[str]  # the hash of every record, the header's first
    size: int
    recovered: int = 0
    torn: int = 0

    @property
    def charged(self) -> int:
        return len(self.heads) - 1


def _read(file: BinaryIO, path: Path) -> _Chain:
    """All records, verified byte by byte.

    A last line without its end is a record that a crash tore, unless it is longer than a record can be.
    """
    chain: _Chain | None = None
    for index, line in enumerate(file):
        previous = chain.heads[-1] if chain else ""
        if not line.endswith(b"\n"):
            if chain is None:
                break
            longest = len(_seal(_entry("recovered", index, previous)))
            if index <= chain.max_charges and len(line) < longest:
                chain.torn = len(line)
                return chain
            raise LedgerError(f"{path} is altered: {len(line)} bytes after record {index - 1} are none; {_REMEDY}.")
        try:
            record = json.loads(line)
            genuine = _is_genuine(record, line, index, previous)
        except (ValueError, RecursionError):
            genuine = False
        if not genuine:
            raise LedgerError(f"{path} is altered: record {index} does not continue the chain; {_REMEDY}.")
        if chain is None:
            if record["format"] != _FORMAT:
                raise LedgerError(f"{path} has format {record['format']}, this version reads {_FORMAT}; use its own.")
            chain = _Chain(record["header"], record["max_charges"], [record["hash"]], len(line))
        else:
            chain.heads.append(record["hash"])
            chain.size += len(line)
            chain.recovered += record["kind"] == "recovered"
    if chain is None:
        raise LedgerError(
            f"{path} holds no complete header. If creating it was cut short, nothing was charged: delete the file and"
            f" create it again. Otherwise {_REMEDY}."
        )
    if chain.charged > chain.max_charges:
        raise LedgerError(f"{path} holds {chain.charged} charges of max_charges={chain.max_charges}; {_REMEDY}.")
    return chain


def read_ledger(path: str | Path) -> dict[str, Any]:
    """Verifies a ledger without locking or changing it; works beside a run that is charging it.

    Returns:
        {"header", "max_charges", "charged", "recovered", "head", "heads"}. A torn last record counts in `charged` and
        in `recovered` (charges of which a crash left only a part), while `head` is the hash of the last whole record
        and `heads` holds those of all, in their order.

    Raises:
        LedgerError: the file is missing or altered.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            chain = _read(file, path)
    except OSError as error:
        raise LedgerError(f"{path} cannot be read ({error.strerror}); name the ledger of the run.") from error
    torn = int(chain.torn > 0)
    return {
        "header": chain.header,
        "max_charges": chain.max_charges,
        "charged": chain.charged + torn,
        "recovered": chain.recovered + torn,
        "head": chain.heads[-1],
        "heads": list(chain.heads),
    }


def _locked(path: Path, flags: int) -> BinaryIO:
    """The file, opened for reading and writing and locked; the lock ends with the file object or the process.

    Raises:
        LedgerError: another holder has the lock, or the file system has none.
        OSError: the file cannot be opened.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | flags, 0o600), "r+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise LedgerError(f"{path} is locked: another run is charging it; wait for its end or stop it.") from error
    except OSError as error:
        file.close()
        raise LedgerError(f"{path} cannot be locked ({error.strerror}); use a file system with flock.") from error
    return file


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(eq=False)
class PrivacyLedger:
    """The charges of one training run, on disk. Made by `create`, continued by `open`; one process at a time.

    Use: `charge()` returns, then the noise is drawn and the update applied. With several ranks, one holds the ledger
    and the others wait for its charge.

    Formal guarantee:
        At any instant, charges on disk >= noisy updates applied, and charges <= max_charges. `charge` returns only
        after its record was written and fsync'd, so whatever happens later finds it: a record followed by a crash is
        a charge that was spent, whether or not its update was applied. It is never given back, because when the crash
        came may depend on the data; a resumed run draws fresh rows and fresh noise and pays again. A torn record was
        never returned to anybody, and is counted all the same: `open` writes a whole record, marked "recovered", over
        it. That record is longer than any torn one, so there is no instant at which the tear is gone and the charge
        not counted. Assumptions: fsync means what it says; updates are applied only after `charge` returned; nobody
        replaces the file by an older copy (see the module; `expected_head` notices that).

    Attributes:
        path: the file.
        header: the plan as it was given to `create`, in plain JSON values.
        max_charges: the number of charges that the plan allows.
        charged: charges on disk, including recovered ones. After a failed `charge` one more may be on disk.
        head: SHA-256 (hex) of the last record. It says nothing about the header to who does not know the file.
    """

    path: Path
    header: dict[str, Any] = field(repr=False)  # may hold a fingerprint of the data
    max_charges: int
    charged: int
    head: str
    _file: BinaryIO = field(repr=False)
    _size: int = field(repr=False)
    _unusable: bool = field(default=False, repr=False)  # a record may be on disk or not, nobody knows

    def __post_init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        _ledgers.add(self)

    @classmethod
    def create(cls, path: str | Path, header: Mapping[str, Any], max_charges: int) -> "PrivacyLedger":
        """Starts a ledger in an existing folder.

        Args:
            path: a file that does not exist yet.
            header: the facts that fix what one charge is (rate, noise multiplier, clipping norm, data fingerprint ...);
                `open` wants the same. Plain JSON values.
            max_charges: >= 1, the planned number of steps.

        Raises:
            ValueError: max_charges or header is not what it must be.
            LedgerError: the file exists, or cannot be written.
        """
        path = Path(path)
        if max_charges < 1:
            raise ValueError(f"max_charges={max_charges} must be at least 1; it is the planned number of steps.")
        header = _plain(header)
        try:
            file = _locked(path, os.O_CREAT | os.O_EXCL)
        except FileExistsError as error:
            raise LedgerError(
                f"{path} exists, and its charges count; continue it with PrivacyLedger.open, or give a new run on the"
                " same data its own folder, with this ledger in earlier_ledgers."
            ) from error
        except OSError as error:
            raise LedgerError(f"{path} cannot be created ({error.strerror}); choose a folder that exists.") from error
        ledger = cls(path, header, max_charges, charged=-1, head="", _file=file, _size=0)
        try:
            ledger._append("header", format=_FORMAT, header=header, max_charges=max_charges)
            _sync_folder(path)
        except BaseException as error:
            ledger.close()
            with suppress(OSError):
                path.unlink()  # nothing was charged yet
            if isinstance(error, OSError):
                raise LedgerError(f"{path.parent} cannot be synced ({error.strerror}).") from error
            raise
        return ledger

    @classmethod
    def open(
        cls, path: str | Path, header: Mapping[str, Any], max_charges: int, expected_head: str | None = None
    ) -> "PrivacyLedger":
        """Continues a ledger, after verifying every byte of it; a torn last record is counted as a charge.

        Args:
            path: the file.
            header: as given to `create`.
            max_charges: as given to `create`.
            expected_head: the `head` that a checkpoint names; the ledger must have reached it.

        Raises:
            ValueError: header holds more than plain JSON values.
            LedgerError: the ledger is missing, locked, altered, of another plan, or behind `expected_head`.
        """
        path = Path(path)
        header = _plain(header)
        try:
            file = _locked(path, 0)
        except FileNotFoundError as error:
            raise LedgerError(
                f"{path} is missing, so what the run has spent is unknown; put back the ledger that was written with"
                " the checkpoint, or start a new run from public weights."
            ) from error
        except OSError as error:
            raise LedgerError(f"{path} cannot be opened ({error.strerror}); make it readable and writable.") from error
        try:
            with open(file.fileno(), "rb", closefd=False) as stream:
                chain = _read(stream, path)
            _check_plan(chain, path, header, max_charges)
            if expected_head is not None and expected_head not in chain.heads:
                raise LedgerError(
                    f"{path} never reached expected_head={expected_head[:12]}...: it is older than the checkpoint or"
                    " of another run; put back the ledger that was written with the checkpoint."
                )
            ledger = cls(path, chain.header, max_charges, chain.charged, chain.heads[-1], file, chain.size)
            if chain.torn:
                ledger._append("recovered")
        except BaseException:
            file.close()
            raise
        return ledger

    def charge(self) -> int:
        """Spends one application of the mechanism. Call it before the noise of that application is drawn.

        Returns:
            The number of charges so far, this one included; it is on disk.

        Raises:
            BudgetExhausted: max_charges are spent; nothing was written.
            LedgerError: the record could not be written, or one before could not, or the ledger was closed (a forked
                child's always is), deleted or changed by somebody else. Apply no update; open the ledger again.
        """
        with self._one_at_a_time:
            self._check_usable()
            if self.charged >= self.max_charges:
                raise BudgetExhausted(
                    f"max_charges={self.max_charges} are spent in {self.path}; one more step would exceed the budget."
                    " Stop here, or plan a new run with a larger budget."
                )
            self._append("charge")
            return self.charged

    def close(self) -> None:
        """Releases the lock. Every later charge raises LedgerError."""
        if not self._file.closed:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # also where a forked child still holds a copy of the descriptor
            self._file.close()

    def __enter__(self) -> "PrivacyLedger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._file.closed:
            raise LedgerError(f"{self.path} is closed in this process; open it again.")
        if self._unusable:
            raise LedgerError(f"{self.path}: an earlier record could not be written; mend the cause, open it again.")
        status = os.fstat(self._file.fileno())
        if status.st_nlink == 0 or status.st_size != self._size:
            raise LedgerError(f"{self.path} was deleted or changed while it was open; {_REMEDY}.")

    def _append(self, kind: str, **fields: Any) -> None:
        """Writes and syncs one record. Unless that ends well, the ledger stays unusable, whatever ended it.

        After a failed fsync the system may drop the data and report success the next time: no retry is safe.
        """
        line = _seal(_entry(kind, self.charged + 1, self.head, **fields))
        self._unusable = True
        try:
            os.lseek(self._file.fileno(), self._size, os.SEEK_SET)
            if os.write(self._file.fileno(), line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise LedgerError(
                f"{self.path}: {kind} record could not be written ({error.strerror}), so nothing may be applied; mend"
                " the cause and open the ledger again, which counts what reached the disk."
            ) from error
        self._size += len(line)
        self.charged += 1
        self.head = json.loads(line)["hash"]
        self._unusable = False


def _plain(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header as JSON will give it back."""
    try:
        return json.loads(_json(dict(header)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"header must hold plain, finite JSON values only: {error}.") from error


def _check_plan(chain: _Chain, path: Path, header: Mapping[str, Any], max_charges: int) -> None:
    # Names only: a header may hold a fingerprint of the data, and errors end up in logs.
    ours, theirs = ({(key, _json(value)) for key, value in plan.items()} for plan in (header, chain.header))
    if differing := {key for key, _ in ours ^ theirs}:
        raise LedgerError(
            f"{path} belongs to another plan, its header differs in {sorted(differing)}; resume with the settings and"
            " the data of the run that made it, or start a new run with a ledger of its own."
        )
    if chain.max_charges != max_charges:
        raise LedgerError(
            f"max_charges={max_charges} differs from the {chain.max_charges} of {path}; a plan cannot change while it"
            " is spent: resume with the same number of steps, or start a new run with a ledger of its own."
        )


_ledgers: "weakref.WeakSet[PrivacyLedger]" = weakref.WeakSet()


def _close_inherited() -> None:
    """In a forked child: it must neither charge nor hold the parent's lock beyond the parent's life."""
    for ledger in _ledgers:
        ledger._file.close()  # unlike `close`, this leaves the parent its lock


os.register_at_fork(after_in_child=_close_inherited)


__all__ = ["BudgetExhausted", "LedgerError", "PrivacyLedger", "read_ledger"]
