"""Two real processes (gloo): one sum over both, noise once, the same weights everywhere, one ledger."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clipping_parts import llama, looped, relative_error, token_rows
from conftest import tiny_model
from training_parts import Rows, arguments

from hf_spectral_dp import DPTrainer
from hf_spectral_dp.privacy.ledger import read_ledger
from hf_spectral_dp.trainer import LEDGER


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """The folder with what two_processes.py wrote."""
    folder, here = tmp_path_factory.mktemp("two"), Path(__file__).parent
    config = here.parent / "examples" / "accelerate_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(here)])}
    command += [str(here / "two_processes.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def both(folder: Path, name: str) -> list[dict]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["copies", "shards", "shards, tied"])
def test_the_clipped_sum_is_that_of_one_process_and_the_noise_is_added_once(name, found):
    """With whole copies of the model on both processes, and with its parameters split over them (FSDP2)."""
    first, second = both(found, name)
    model = llama(tied="tied" in name)
    for what, rows in (("summed", token_rows(7, 12)), ("first only", token_rows(7, 12)[:2])):
        _, expected = looped(model, rows, 0.3)
        assert relative_error({key: 10 * value for key, value in first[what].items()}, expected) < 2e-6
    for what in ("summed", "noise"):
        assert all(torch.equal(first[what][key], second[what][key]) for key in first[what])
    noise = torch.cat([value.flatten() for value in first["noise"].values()])
    # Standard deviation 2 * 0.3 / 10, not twice the variance of it: five standard errors are 5 % of 5,000 draws.
    assert len(noise) > 4000
    assert float(noise.std()) == pytest.approx(0.06, rel=0.055) and abs(float(noise.mean())) < 5 * 0.06 / 63
    halves = noise[: len(noise) // 2], noise[len(noise) // 2 : 2 * (len(noise) // 2)]
    assert not torch.equal(*halves)


@pytest.mark.parametrize("name", ["all weights", "adapters", "small batches"])
def test_a_run_on_two_processes(name, found):
    first, second = both(found, name)
    assert first["weights"].keys() == second["weights"].keys()
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    assert first["epsilon"] == second["epsilon"] <= 8.0
    assert read_ledger(found / name / LEDGER)["charged"] == 6
    # Every process draws from its own shard of the rows, six times, independently of the other; an empty share counts.
    assert len(first["taken"]) == len(second["taken"]) == 6
    if name == "small batches":  # half a row expected: twelve full shares would be a chance of 1e-5
        assert [] in first["taken"] + second["taken"]
        return
    assert {index % 2 for taken in first["taken"] for index in taken} == {0}
    assert {index % 2 for taken in second["taken"] for index in taken} == {1}
    assert [[i // 2 for i in taken] for taken in first["taken"]] != [[i // 2 for i in x] for x in second["taken"]]


def test_processes_with_unlike_rows_are_refused_before_anything_is_charged(found):
    for rank in range(2):
        assert "the processes do not train the same: rows" in (found / f"unlike-{rank}.txt").read_text()
    assert not (found / "unlike" / LEDGER).exists()


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    """Without use_cpu, accelerate sees no device for the second process, and each would train as if it were alone."""
    args = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but this one sees 1.*use_cpu"):
        DPTrainer(tiny_model(), args, Rows())
