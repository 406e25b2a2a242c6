"""What test_distributed.py starts on two processes with torchrun: each rank writes what it found to a folder."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from clipping_parts import llama, losses_of, token_rows
from conftest import tiny_model
from torch.distributed.fsdp import fully_shard
from training_parts import Rows, arguments

from hf_spectral_dp import DPTrainer
from hf_spectral_dp.privacy.clipping import PerExampleClipper
from hf_spectral_dp.privacy.mechanism import NoisyClippedMean


class WatchedRows(Rows):
    """Remembers which rows were taken."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[list[int]] = []

    def __getitem__(self, indices):
        self.taken.append([int(index) for index in indices])
        return super().__getitem__(indices)


def release(folder: Path, rank: int, name: str, tied: bool = False, sharded: bool = False) -> None:
    """The mechanism on one batch of seven rows, two here and five there: without noise, and of noise alone."""
    model, rows = llama(tied), token_rows(7, 12)
    mine = rows[:2] if rank == 0 else rows[2:]
    if sharded:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    clipper = PerExampleClipper(model, 0.3)
    summing = NoisyClippedMean(clipper, 0.0, 10.0, 2, rank, 2)  # one pass here, three there
    noisy = NoisyClippedMean(clipper, 2.0, 10.0, 2, rank, 2)
    found = {
        "summed": summing.release(mine, lambda some: losses_of(model, some)),
        "first only": summing.release(mine[: 2 * (1 - rank)], lambda some: losses_of(model, some)),
        "noise": noisy.release(mine[:0], lambda some: losses_of(model, some)),
    }
    if sharded:
        found = {what: {key: value.full_tensor() for key, value in sums.items()} for what, sums in found.items()}
    torch.save(found, folder / f"{name}-{rank}.pt")


def train(folder: Path, rank: int, name: str, **changes) -> None:
    """A whole run, in which every process has its own random state."""
    torch.manual_seed(rank)
    rows = WatchedRows()
    model = tiny_model()
    model.codec.register_buffer("of_public_data", torch.rand(5))  # such as statistics that each process measured
    trainer = DPTrainer(model, arguments(folder / name, ema_decay=0.5, **changes), rows)
    trainer.train()
    found = {"weights": trainer.model.state_dict(), "epsilon": trainer.epsilon_spent, "taken": rows.taken}
    torch.save(found, folder / f"{name}-{rank}.pt")


def refused(folder: Path, rank: int) -> None:
    """One process left out a row: what the trainer says."""
    rows = Rows()
    if rank:
        rows.rows, rows.fingerprint = rows.rows[1:], "other rows"
    trainer = DPTrainer(tiny_model(), arguments(folder / "unlike"), rows)
    try:
        trainer.train()
    except ValueError as error:
        (folder / f"unlike-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    train(folder, rank, "all weights")
    train(folder, rank, "adapters", lora_rank=2)
    train(folder, rank, "small batches", expected_batch_size=1)
    refused(folder, rank)
    release(folder, rank, "copies")
    release(folder, rank, "shards", sharded=True)
    release(folder, rank, "shards, tied", tied=True, sharded=True)
    dist.destroy_process_group()
