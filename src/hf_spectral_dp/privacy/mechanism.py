"""One application of the mechanism: clip, sum, add noise, divide. The trainer and the audits call this same code."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from .clipping import PerExampleClipper
from .noise import GaussianNoise, secret_coins


class NoisyClippedMean:
    """Releases the sum of clipped per-example gradients of a batch, plus noise, over a public constant.

    Args:
        clipper: holds the model and the clipping norm.
        noise_multiplier: standard deviation of the noise over the sum's sensitivity, >= 0; 0 is the non-private twin.
        divisor: a public constant, usually the expected batch size; never the size of the batch drawn.
        micro_batch_size: examples per forward pass; changes memory and speed only.
        rank, world_size: this process among those that hold a part of the batch each.
        device, secure_mode: where the sums lie and which generator the noise comes from; see `GaussianNoise`.

    Formal guarantee: for a batch that is given, the releases of all parameters together are the Gaussian mechanism
    with `noise_multiplier` under adding or removing one example: the sum moves by at most `clipper.sensitivity`
    (see `PerExampleClipper`), noise of noise_multiplier * sensitivity is added once to every entry of it (see
    `GaussianNoise`), on the first process, before the processes add up their parts, or where the parameters are sharded
    by the one process that holds the entry, after they did; the division by a constant is post-processing. It holds for
    the empty batch as for any other. `privacy.audit.mechanism_audit` tries to refute it.

    Raises:
        ValueError: divisor not positive.
    """

    def __init__(
        self,
        clipper: PerExampleClipper,
        noise_multiplier: float,
        divisor: float,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        secure_mode: bool = False,
    ):
        if not 0 < divisor < float("inf"):
            raise ValueError(f"divisor={divisor} must be positive and finite: the public expected batch size.")
        self.clipper = clipper
        self.noise = GaussianNoise(noise_multiplier * clipper.sensitivity, device, secure_mode)
        self.divisor = divisor
        self.micro_batch_size = micro_batch_size
        self._rank, self._world_size = rank, world_size

    def release(self, rows: Tensor, losses: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The noisy mean gradient by parameter name, at least float32, the same on all processes.

        Args:
            rows: this process's part of the batch (b, ...); b may be 0.
            losses: maps some of the rows to one loss per row. What it draws at random, it draws from torch's global
                generators: see `noise.secret_coins`.
        """
        try:
            with secret_coins(self.noise.device):
                for some, padding in self._micro_batches(rows):
                    self.clipper.add(partial(losses, some), len(some), padding)
            sums = self.clipper.take()
        except BaseException:
            self.clipper.take()  # if this process trains again, no example may count in two sums
            raise
        if self.clipper.sharded:  # summed already; each process noises its own entries
            self.noise.add_(total.to_local() for total in sums.values())  # type: ignore[attr-defined]
        else:
            if self._rank == 0:
                self.noise.add_(sums.values())
            if self._world_size > 1:
                for total in sums.values():
                    dist.all_reduce(total)
        return {name: total / self.divisor for name, total in sums.items()}

    def _micro_batches(self, rows: Tensor) -> list[tuple[Tensor, int]]:
        """Some of the rows at a time, and how many of them are padding.

        Only with a sharded model, whose parameters are gathered in every pass, must all processes take equally many.
        """
        parts = list(rows.split(self.micro_batch_size)) if len(rows) else []
        most = torch.tensor(len(parts), device=rows.device)
        if self.clipper.sharded:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        padding = [(rows.new_zeros((1, *rows.shape[1:])), 1)] * (int(most) - len(parts))
        return [(part, 0) for part in parts] + padding


__all__ = ["NoisyClippedMean"]
