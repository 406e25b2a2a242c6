"""Files are replaced as a whole, all of them or none, whatever fails and wherever a process was killed."""

import os
from pathlib import Path

import pytest

from hf_spectral_dp.whole_files import new_folder, put_in_place, replace_files


@pytest.mark.parametrize("failing", [1, 2])
def test_all_files_or_none(tmp_path, monkeypatch, failing):
    paths = [tmp_path / "a", tmp_path / "b"]
    replace_files({path: b"old" for path in paths})
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError("no space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        replace_files({path: b"new" for path in paths})
    assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".3-a").write_bytes(b"half")
    replace_files({tmp_path / "a": b"whole"}, mark="3")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"whole"}


def test_a_folder_is_there_only_when_all_its_files_are(tmp_path):
    folder = tmp_path / "model"

    def killed(scratch):
        (scratch / "config.json").write_bytes(b"{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_folder(folder, killed)
    assert list(tmp_path.iterdir()) == []

    def written(scratch):
        (scratch / "part").mkdir()
        (scratch / "part" / "weights").write_bytes(b"all")

    new_folder(folder, written)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))] == ["part", "part/weights"]


def test_a_folder_that_cannot_be_replaced_is_back_in_its_place(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"")
    rename = Path.rename

    def failing(path, target):
        if path.name == "new":
            raise OSError("read-only")
        return rename(path, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="read-only"):
            put_in_place(tmp_path / "new", tmp_path / "old")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")) == ["new/new", "old/old"]
    put_in_place(tmp_path / "new", tmp_path / "old")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["old", "old/new"]
