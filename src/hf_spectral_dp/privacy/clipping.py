"""The sum of clipped per-example gradients, from one forward and one backward pass.

Exact for the layers that `bookkeeping` knows: no approximation of the norm, no bound in its place.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .bookkeeping import Notes, Recorder, _precise

# Relative rounding that the sensitivity allows for: half of it for the norms, half for the weighted sum.
_SLACK = 1e-5


class PerExampleClipper:
    """Adds up clipped per-example gradients of a model over micro-batches.

    Args:
        model: any module whose trainable parameters belong to Linear, Conv1D, Embedding, LayerNorm or RMSNorm layers,
            including LoRA adapters and tied embeddings. Its examples must not see each other (no batch statistics).
        clipping_norm: C, the largest Euclidean norm, over all trainable parameters together, of one example's share.

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
        ValueError: clipping_norm not positive, no trainable parameter, or one that no rule covers (named).
    """

    def __init__(self, model: nn.Module, clipping_norm: float):
        if not 0 < clipping_norm < float("inf"):
            raise ValueError(f"clipping_norm={clipping_norm} must be positive and finite; 1.0 is usual.")
        self.clipping_norm = clipping_norm
        self._recorder = Recorder(model)
        if not self.parameters:
            raise ValueError("the model has no trainable parameter; call requires_grad_(True) on some.")
        self._sums: dict[str, Tensor] = {}

    @property
    def sensitivity(self) -> float:
        """The most, in Euclidean norm, by which adding or removing one example moves the sum: C (1 + 1e-5)."""
        return self.clipping_norm * (1 + _SLACK)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name; tied ones once."""
        return self._recorder.parameters

    def add(self, losses: Callable[[], Tensor], batch_size: int) -> None:
        """Adds the clipped gradients of `batch_size` examples.

        Args:
            losses: runs the model and returns one loss per example, (batch_size,). The loss of one example must not
                depend on another: no mean over the batch, no divisor that counts tokens of the batch.
            batch_size: number of examples; with 0 nothing is run.

        Raises:
            ValueError: losses of another shape, or a parameter used outside its module (its gradient would escape
                the clipping). Nothing is added then.
        """
        notes = self._record(losses, batch_size) if batch_size else []
        if not notes:
            return
        with torch.no_grad():
            norms = _norms(notes)
            coefficients = self.clipping_norm / norms.clamp_min(self.clipping_norm)
            coefficients = torch.where(norms.isfinite(), coefficients, torch.zeros_like(coefficients))
            for name, each in notes:
                if name not in self._sums:
                    self._sums[name] = _zeros(self.parameters[name])
                _add_weighted(self._sums[name], each, coefficients)

    def per_example_norms(self, losses: Callable[[], Tensor], batch_size: int) -> Tensor:
        """Gradient norms (batch_size,) of the examples before clipping. They are private if the examples are."""
        notes = self._record(losses, batch_size) if batch_size else []
        return _norms(notes) if notes else torch.zeros(batch_size)

    def take(self) -> dict[str, Tensor]:
        """The clipped sum since the last call, by parameter name, at least float32; zeros where nothing was added."""
        sums, self._sums = self._sums, {}
        return {name: sums[name] if name in sums else _zeros(parameter) for name, parameter in self.parameters.items()}

    def _record(self, losses: Callable[[], Tensor], batch_size: int) -> list[tuple[str, Notes]]:
        """One forward and one backward pass; what it noted, by parameter name."""
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
                values.sum().backward()
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    raise ValueError(
                        f"{name} is used outside its module's forward, where its gradient is not clipped; freeze it, or"
                        " call the module that owns it."
                    )
        finally:
            for name, parameter in self.parameters.items():
                parameter.grad = before[name]
        names = {parameter: name for name, parameter in self.parameters.items()}
        return [(names[parameter], each) for parameter, each in book.notes.items()]


def _zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), requires_grad=False)


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several uses of one parameter are one use with more positions."""
    if len(pairs) == 1:
        return pairs[0][0], _precise(pairs[0][1])
    return torch.cat([a for a, _ in pairs], 1), torch.cat([_precise(g) for _, g in pairs], 1)


@torch.no_grad()
def _norms(notes: list[tuple[str, Notes]]) -> Tensor:
    """(B,) norms over all parameters of the examples' gradients."""
    return torch.stack([_squared_norms(each) for _, each in notes]).sum(0).sqrt()


def _squared_norms(notes: Notes) -> Tensor:
    """(B,) squared norms of one parameter's per-example gradients."""
    squares: list[Tensor] = []
    if notes.dense is not None:
        squares.append(notes.dense.flatten(1).square().sum(1))
    if notes.affine:
        a, g = _joined(notes.affine)
        a = _precise(a)
        squares.append(_inner(torch.bmm(a, a.transpose(1, 2)), torch.bmm(g, g.transpose(1, 2))))
    if notes.lookups:
        ids, g = _joined(notes.lookups)
        same = ids[:, :, None] == ids[:, None, :]
        squares.append(_inner(torch.bmm(g, g.transpose(1, 2)), same.to(g.dtype)))
    if notes.affine and notes.lookups:
        # A table that is also a weight: 2 <E, H> with E the lookups' and H the head's gradient; row x_t of H is
        # the sum over s of g_s[x_t] a_s (Ding et al., arXiv:2405.18194, "phantom clipping").
        (a, head), (ids, rows) = _joined(notes.affine), _joined(notes.lookups)
        chosen = head.gather(2, ids[:, None, :].expand(-1, head.shape[1], -1))  # (B, s, t)
        squares.append(2 * _inner(torch.bmm(_precise(a), rows.transpose(1, 2)), chosen))
    return torch.stack(squares).sum(0).clamp_min(0)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Sum of products over the last two dimensions, plus what rounding may have taken from it beyond the slack."""
    products = first * second
    total = products.sum((1, 2))
    rounding = 4 * torch.finfo(products.dtype).eps * products.abs().sum((1, 2))
    # A square's relative error is twice the norm's: the whole slack here is half of it there.
    return total + (rounding - _SLACK * total.clamp_min(0)).clamp_min(0)


def _add_weighted(total: Tensor, notes: Notes, coefficients: Tensor) -> None:
    """Adds the sum over examples of coefficient times gradient."""
    bad = coefficients == 0
    some_bad = bool(bad.any())

    def cleaned(tensor: Tensor) -> Tensor:
        """Zero times NaN is NaN: what counts zero must be zero."""
        return tensor.masked_fill(bad.view(-1, *[1] * (tensor.ndim - 1)), 0) if some_bad else tensor

    if notes.dense is not None:
        total += torch.tensordot(coefficients.to(notes.dense.dtype), cleaned(notes.dense), dims=1)
    if notes.affine:
        a, g = (cleaned(_precise(each)) for each in _joined(notes.affine))
        weights = coefficients.to(g.dtype)[:, None, None]
        a, g = (a * weights, g) if a.shape[-1] < g.shape[-1] else (a, g * weights)  # the smaller is copied
        total.addmm_(g.flatten(0, 1).T, a.flatten(0, 1))
    if notes.lookups:
        ids, g = _joined(notes.lookups)
        weighted = cleaned(g) * coefficients.to(g.dtype)[:, None, None]
        total.index_add_(0, ids.flatten(), weighted.flatten(0, 1))


__all__ = ["PerExampleClipper"]
