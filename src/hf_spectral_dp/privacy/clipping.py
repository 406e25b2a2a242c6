"""The sum of clipped per-example gradients, from one forward and one backward pass.

Exact for the layers that `recording` knows, and for all others by `fallback`: no bound takes the place of a norm.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.utils._python_dispatch import TorchDispatchMode

from .book import SLACK, Book, precise
from .recording import Recorder

SMALLEST = 1e-12
"""Clipping norm below which squares of gradients could vanish in float32, and with them the norms that are clipped."""


class PerExampleClipper:
    """Adds up clipped per-example gradients of a model over micro-batches.

    Args:
        model: any module whose examples do not see each other (no batch statistics), each the first dimension of what
            its layers read; `check_apart` finds most that are otherwise. Linear, Conv1D, Conv2d, Embedding,
            LayerNorm, GroupNorm and RMSNorm layers, LoRA adapters and tied embeddings go by book-keeping; the
            parameters of all other modules by `torch.func.vmap`, slower and as exact, after one warning.
        clipping_norm: C, the largest Euclidean norm, over all trainable parameters together, of one example's share.
        memory_budget: bytes that per-example gradients of one micro-batch may take beyond what ghost norms would.

    Formal guarantee: `take()` returns a sum over examples of vectors of norm at most C (1 + 1e-5) each, one vector per
    example, which depends on that example and the parameters alone. Adding or removing one example therefore moves
    the sum by at most C (1 + 1e-5), however the examples are split into micro-batches. An example whose gradient or
    loss is not finite counts exactly zero. `sensitivity` is that bound, C (1 + 1e-5): scale the noise by it. Norms that
    are found through inner products (ghost norms) are increased where cancellation could have made them too small
    by more than this slack; everywhere else the sums equal an explicit loop's up to float rounding.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> clipper = PerExampleClipper(layer, clipping_norm=1.0)
        >>> x = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> clipper.add(lambda: layer(x)[:, 0], batch_size=2)
        >>> [round(value, 4) for value in clipper.take()["weight"][0].tolist()]
        [0.9, 1.2]

    Raises:
        ValueError: clipping_norm below `SMALLEST` or infinite, no trainable parameter, or one that no module's forward
            uses (named).
    """

    def __init__(self, model: nn.Module, clipping_norm: float, memory_budget: int = 64 << 20):
        if not SMALLEST <= clipping_norm < float("inf"):
            raise ValueError(
                f"clipping_norm={clipping_norm} must be positive, at least {SMALLEST:g} and finite; 1.0 is usual."
            )
        self.clipping_norm = clipping_norm
        self._recorder = Recorder(model, memory_budget)
        if not self.parameters:
            raise ValueError("the model has no trainable parameter; call requires_grad_(True) on some.")
        self._sums: dict[nn.Parameter, Tensor] = {}

    @property
    def sensitivity(self) -> float:
        """The most, in Euclidean norm, by which adding or removing one example moves the sum: C (1 + 1e-5)."""
        return self.clipping_norm * (1 + SLACK)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name; tied ones once."""
        return self._recorder.parameters

    @property
    def sharded(self) -> bool:
        """Whether `torch.distributed.fsdp.fully_shard` (FSDP2) split the parameters: then so are the sums of `take`."""
        return self._recorder.sharded

    def add(self, losses: Callable[[], Tensor], batch_size: int, padding: int = 0) -> None:
        """Adds the clipped gradients of `batch_size` examples.

        With a sharded model every process gives its own examples, and all of them must call this equally often.

        Args:
            losses: runs the model and returns one loss per example, (batch_size,). The loss of one example must not
                depend on another: no mean over the batch, no divisor that counts tokens of the batch. Where it draws at
                random (dropout), for each example by itself (`check_coins`), call this inside `noise.secret_coins`, as
                `NoisyClippedMean` does.
            batch_size: number of examples; with 0 nothing is run.
            padding: how many of them, the last ones, stand for nobody and count exactly zero.

        Raises:
            ValueError: losses of another shape, or a parameter used outside its module or made trainable since (its
                gradient would escape the clipping). Nothing is added then.
        """
        if not batch_size:
            return
        book = self._record(losses, batch_size)
        with torch.no_grad(), self._full_precision():
            norms = book.norms()
            coefficients = self.clipping_norm / norms.clamp_min(self.clipping_norm)
            coefficients = torch.where(norms.isfinite(), coefficients, torch.zeros_like(coefficients))
            coefficients[batch_size - padding :] = 0
            if not self.sharded:
                book.add_weighted(coefficients, self._sums)
                return
            for parameter in self.parameters.values():  # one whole gradient in memory at a time
                whole: dict[nn.Parameter, Tensor] = {}
                book.add_weighted(coefficients, whole, only=parameter)
                shard = _reduce_scatter(whole.get(parameter), parameter)
                self._sums[parameter] = self._sums[parameter] + shard if parameter in self._sums else shard

    def per_example_norms(self, losses: Callable[[], Tensor], batch_size: int) -> Tensor:
        """Gradient norms (batch_size,) of the examples before clipping. They are private if the examples are."""
        if not batch_size:
            return torch.zeros(0, dtype=torch.float64)
        book = self._record(losses, batch_size)
        with self._full_precision():
            return book.norms()

    def check_known(self) -> None:
        """Raises ValueError if a parameter is trainable that was not when the clipper was made."""
        self._recorder.check_known()

    def check_apart(self, losses: Callable[[Tensor], Tensor]) -> None:
        """Tries on two examples whether the gradient of each is its own; adds nothing.

        Found is a loss that is divided by something of the batch, and layers that read the examples along another
        dimension than the first. Call it where the model drops nothing out (`model.eval()`); a loss that draws at
        random even then, as that of a diffusion model, gives nothing to compare, and passes.

        Args:
            losses: maps indices of examples, (b,) of 0 and 1, to one loss per example.

        Raises:
            ValueError: a norm changes by more than half when the examples are alone.
        """
        with torch.no_grad():
            first, again = (losses(torch.arange(2)) for _ in range(2))
        if not torch.allclose(first, again, rtol=1e-3, equal_nan=True):
            return
        both = self.per_example_norms(partial(losses, torch.arange(2)), 2)
        alone = torch.cat([self.per_example_norms(partial(losses, torch.tensor([i])), 1) for i in range(2)])
        larger, smaller = torch.maximum(both, alone), torch.minimum(both, alone)
        if (larger > 1.5 * smaller + 1e-3 * self.clipping_norm).any():
            raise ValueError(
                "the gradient of an example depends on the examples beside it: let the loss of each be its own (no mean"
                " over the batch, no batch statistics), and the first dimension in every layer be the example"
                " (batch_first=True)."
            )

    @torch.no_grad()
    def check_coins(self, losses: Callable[[Tensor], Tensor]) -> None:
        """Tries on two examples whether what their losses draw at random is drawn for each by itself; adds nothing.

        A coin for a whole forward pass, such as that of a layer that is dropped or kept for all of its examples, binds
        examples together: which ones share it depends on how many come before them, so that one example more changes
        the shares of many. Call it in training mode, inside `noise.secret_coins`.

        Args:
            losses: as `check_apart` takes it.

        Raises:
            ValueError: with two examples something is drawn that is not twice as large as with one.
        """
        states = random.getstate(), np.random.get_state()

        def drawn(some: list[int]) -> tuple[set[int], float, float]:
            """How many numbers torch draws at a time, and the next of Python and NumPy after the same ones before."""
            random.setstate(states[0])
            np.random.set_state(states[1])
            with _Draws() as draws:
                if some:
                    with self._recorder.recording(len(some)):
                        losses(torch.tensor(some))
            return draws.sizes, random.random(), np.random.random()

        none, alone, both = drawn([]), [drawn([0]), drawn([1])], drawn([0, 1])
        twice = {2 * size for sizes, *_ in alone for size in sizes}
        if both[0] - twice or any(both[i] != none[i] and both[i] in (alone[0][i], alone[1][i]) for i in (1, 2)):
            raise ValueError(
                "the model draws at random for several examples at once, as by dropping a layer for a whole batch, so"
                " that one example more changes the gradients of others: let it draw for each example by itself, or"
                " not at all (layerdrop=0)."
            )

    def take(self) -> dict[str, Tensor]:
        """The clipped sum since the last call, by parameter name, at least float32; zeros where nothing was added.

        Of a sharded model the sum over all processes, as a DTensor of which each holds its shard.
        """
        sums, self._sums = self._sums, {}
        return {
            name: sums[parameter]
            if parameter in sums
            else torch.zeros_like(parameter, dtype=precise(parameter).dtype, requires_grad=False)
            for name, parameter in self.parameters.items()
        }

    @contextmanager
    def _full_precision(self) -> Iterator[None]:
        """Ends what would round norms and sums: autocast, and products of float32 in TensorFloat-32 or bfloat16.

        Such products are off by a thousandth, of which `Book` would know nothing. Half precision in a forward pass
        rounds a gradient before it is noted, which is harmless: norm and sum then speak of the same rounded one.
        """
        with torch.autocast(next(iter(self.parameters.values())).device.type, enabled=False), exact_products():
            yield

    def _record(self, losses: Callable[[], Tensor], batch_size: int) -> Book:
        """One forward and one backward pass."""
        self.check_known()
        before = {name: parameter.grad for name, parameter in self.parameters.items()}
        try:
            for parameter in self.parameters.values():
                parameter.grad = None
            with torch.enable_grad(), self._recorder.recording(batch_size) as book:
                values = losses()
                if values.shape != (batch_size,):
                    raise ValueError(
                        f"losses have shape {tuple(values.shape)}, not ({batch_size},): return one loss per example."
                    )
                with self._full_precision():
                    # Not Tensor.backward, which trackers of experiments hook to log the value it is called on.
                    torch.autograd.backward(values, torch.ones_like(values))
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    raise ValueError(
                        f"{name} is used outside its module's forward, where its gradient is not clipped; freeze it, or"
                        " call the module that owns it."
                    )
        finally:
            for name, parameter in self.parameters.items():
                parameter.grad = before[name]
        if book.unfinished:
            # Something computed from an input never reached the losses, and with it a part of the gradients is
            # missing. Rare, so it is found out and mended: every layer returns its own gradient from now on.
            self._recorder.shares_inputs = False
            return self._record(losses, batch_size)
        return book


class _Draws(TorchDispatchMode):
    """Notes how many numbers each random operation of torch draws."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.sizes.add((result[0] if isinstance(result, tuple | list) else result).numel())
        return result


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever `torch.set_float32_matmul_precision`, or `tf32` of a Trainer,
    had asked for; what was asked for holds again afterwards."""
    backends: Any = [backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    if not hasattr(backends[0], "fp32_precision"):  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    asked = [(backend, backend.fp32_precision) for backend in backends]
    rounding = [(backend, how) for backend, how in asked if how not in ("none", "ieee")]
    inherited: Any = getattr(torch.backends, "fp32_precision", None)
    for backend, _ in rounding:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, how in rounding:
            backend.fp32_precision = "none" if how == inherited else how


def _reduce_scatter(total: Tensor | None, parameter: Any) -> Tensor:
    """This process's shard of the sum of `total` (None: zero) over all processes, as `parameter` is split."""
    if total is None:
        total = torch.zeros(parameter.shape, dtype=precise(parameter).dtype, device=parameter.device)
    mesh = parameter.device_mesh
    return DTensor.from_local(total, mesh, [Partial()] * mesh.ndim).redistribute(placements=parameter.placements)


__all__ = ["PerExampleClipper"]
