"""Checkpoint folders: whole or not there, and nothing that differs from its seal is ever loaded."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from hf_spectral_dp import checkpoint_files
from hf_spectral_dp.checkpoint_files import (
    STATE,
    CheckpointError,
    clear_staging,
    newest_whole,
    publish,
    rotate,
    staging,
    verify,
)

FILES = {"model.safetensors": b"w" * 5000, "optimizer.pt": b"o" * 9000, "adapter/config.json": b"{}"}


def saved(folder: Path, step: int, charged: int) -> Path:
    staged = staging(folder) / f"checkpoint-{step}"
    for name, content in FILES.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(content)
    publish(staged, folder / staged.name, ledger_head=f"head {charged}", charged=charged)
    clear_staging(folder)
    return folder / staged.name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_checkpoint_is_whole_and_knows_its_charges(tmp_path):
    state = verify(saved(tmp_path, 3, 5))
    assert (state["ledger_head"], state["charged"]) == ("head 5", 5)
    assert {name: facts["bytes"] for name, facts in state["files"].items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert names(tmp_path) == ["checkpoint-3"]


def test_everything_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename

    def flushed(descriptor):
        fsync(descriptor)
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", lambda *paths: (rename(*paths), calls.append("rename"))[0])
    saved(tmp_path, 3, 5)
    # Files, then the seal, which names all of them, then their folders; the new name last.
    files = ["config.json", "model.safetensors", "optimizer.pt", STATE]
    assert calls == [*files, "adapter", "checkpoint-3", "rename", tmp_path.name]


def test_nothing_is_seen_before_the_rename(tmp_path):
    staged = staging(tmp_path) / "checkpoint-3"
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(b"half")
    assert newest_whole(tmp_path) is None
    assert staging(tmp_path).exists() and not staged.exists()  # the next save clears what this one left


@pytest.mark.parametrize("replaces", [False, True])
def test_a_failed_rename_leaves_what_was_there(tmp_path, monkeypatch, replaces):
    if replaces:
        saved(tmp_path, 3, 3)
    rename = os.rename

    def broken(source, target):
        if Path(source).parent.name == ".incomplete" and Path(source).name == "checkpoint-3":
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="Input/output error"):
        saved(tmp_path, 3, 5)
    monkeypatch.undo()
    clear_staging(tmp_path)
    if replaces:
        assert verify(tmp_path / "checkpoint-3")["charged"] == 3
    else:
        assert names(tmp_path) == []


def test_the_same_step_is_replaced(tmp_path):
    saved(tmp_path, 3, 3)
    assert verify(saved(tmp_path, 3, 7))["charged"] == 7 and names(tmp_path) == ["checkpoint-3"]


def test_damage_is_named(tmp_path):
    whole = saved(tmp_path, 3, 5)
    seal = json.loads((whole / STATE).read_text())

    def write(name, content):
        return lambda path: (path / name).write_bytes(content)

    harms = [
        ("optimizer.pt is missing", lambda path: (path / "optimizer.pt").unlink()),
        ("adapter/config.json is missing", lambda path: shutil.rmtree(path / "adapter")),
        ("optimizer.pt has 8999 bytes of 9000", write("optimizer.pt", b"o" * 8999)),
        ("optimizer.pt has changed", write("optimizer.pt", b"o" * 8999 + b"p")),
        ("holds scaler.pt, which was not saved with it", write("scaler.pt", b"")),
        (f"{STATE} has changed", write(STATE, json.dumps({**seal, "charged": 4}).encode())),
        (f"{STATE} has changed", write(STATE, b"[]")),
        (f"{STATE} has changed", write(STATE, b"[" * 100_000)),
        (f"{STATE} has changed", write(STATE, b"\xff\xfe")),
        (f"no readable {STATE}", lambda path: (path / STATE).unlink()),
        ("format 2, not 1", write(STATE, checkpoint_files._seal({"format": 2}))),
    ]
    for index, (message, harm) in enumerate(harms):
        path = tmp_path / f"copy-{index}"
        shutil.copytree(whole, path)
        verify(path)
        harm(path)
        with pytest.raises(CheckpointError, match=f"{message}.*resume_from_checkpoint=True"):
            verify(path)
    with pytest.raises(CheckpointError, match="no readable"):
        verify(tmp_path / "absent")
    (whole / ".nfs0001").write_bytes(b"")  # what file systems put there, and nothing loads
    verify(whole)


def test_the_newest_is_the_one_with_most_charges(tmp_path):
    """Not the largest step: resumed from an earlier checkpoint, a run counts its steps from there."""
    for step, charged in ((2, 2), (10, 10), (4, 12)):
        saved(tmp_path, step, charged)
    (tmp_path / "checkpoint-notes").mkdir()
    path, state = newest_whole(tmp_path)
    assert path.name == "checkpoint-4" and state["charged"] == 12


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog):
    for step in (1, 2, 3):
        saved(tmp_path, step, step)
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "checkpoint-4").mkdir()
    path, _ = newest_whole(tmp_path)
    assert path.name == "checkpoint-2"
    assert "optimizer.pt has 0 bytes" in caplog.text and "checkpoint-4 is incomplete" in caplog.text
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}" / STATE).unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint.*move these folders elsewhere"):
        newest_whole(tmp_path)
    assert newest_whole(tmp_path / "checkpoint-4") is None


def test_rotation_keeps_the_newest_and_what_is_not_ours(tmp_path, caplog):
    for step, charged in ((1, 1), (8, 8), (3, 9), (4, 10)):
        saved(tmp_path, step, charged)
    (tmp_path / "checkpoint-500").mkdir()
    for limit in (None, 0, 4):
        rotate(tmp_path, limit)
        assert len(names(tmp_path)) == 5
    rotate(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-500"]
    assert "checkpoint-500 is incomplete" in caplog.text


def test_a_failed_rotation_is_a_warning(tmp_path, monkeypatch, caplog):
    for step in (1, 2, 3):
        saved(tmp_path, step, step)

    def broken(*paths):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "rename", broken)
    rotate(tmp_path, 1)
    assert "could not be deleted" in caplog.text and len(list(tmp_path.glob("checkpoint-*"))) == 3
