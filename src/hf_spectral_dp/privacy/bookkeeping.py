"""What each layer saw: one backward pass that notes, per parameter, what the per-example gradients are made of.

While `recording` is active, the leaf modules that own trainable parameters compute the same outputs as before, but
their backward returns gradients for their inputs only and notes the rest. The per-example gradient of a weight W
of y = W a is the sum over positions of g a^T, so the pairs (a, g) say everything; whichever is smaller, the pairs or
the gradients themselves, is kept (Bu et al., arXiv:2210.00038, "book-keeping").
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass
class Notes:
    """What one parameter's per-example gradients of one backward pass are made of: the sum of all parts.

    Attributes:
        dense: (B, *shape) gradients themselves, or None.
        affine: pairs of inputs (B, T, d) and output gradients (B, T, p) of a weight of shape (p, d).
        lookups: pairs of ids (B, T) and output gradients (B, T, d) of an embedding table (rows, d).
    """

    dense: Tensor | None = None
    affine: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    lookups: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, gradients: Tensor) -> None:
        self.dense = gradients if self.dense is None else self.dense + gradients


class Book:
    """Notes of one backward pass over a batch of `batch_size` examples, by parameter."""

    def __init__(self, batch_size: int, looked_up: set[nn.Parameter]):
        self.batch_size = batch_size
        self.notes: dict[nn.Parameter, Notes] = {}
        self._looked_up = looked_up  # tables that are also weights (tied) need their pairs, for the cross term

    def of(self, parameter: nn.Parameter) -> Notes:
        return self.notes.setdefault(parameter, Notes())

    def rows(self, tensor: Tensor, name: str) -> Tensor:
        """`tensor` with one leading row per example; a row for all is repeated, so that each gets its own gradient."""
        if tensor.shape[0] == self.batch_size:
            return tensor
        if tensor.shape[0] == 1:
            return tensor.expand(self.batch_size, *tensor.shape[1:])
        raise ValueError(
            f"{name} received shape {tuple(tensor.shape)} in a batch of {self.batch_size} examples; per-example"
            " gradients need the first dimension to be the example. Keep examples apart, or freeze this module."
        )

    def note_affine(self, weight: nn.Parameter, inputs: Tensor, gradients: Tensor, transposed: bool) -> None:
        a, g = (x.reshape(self.batch_size, -1, x.shape[-1]) for x in (inputs, gradients))
        if transposed:
            a, g = g, a  # y = a W: the gradient is a^T g, the same sum with the roles exchanged
        notes = self.of(weight)
        positions, (p, d) = a.shape[1], (g.shape[-1], a.shape[-1])
        instantiated = positions * (p + d) >= p * d or notes.dense is not None
        if weight in self._looked_up or not instantiated:
            notes.affine.append((a, g))
            return
        for inputs_, gradients_ in [*notes.affine, (a, g)]:  # a layer used several times keeps one form
            notes.add(torch.bmm(_precise(gradients_).transpose(1, 2), _precise(inputs_)))
        notes.affine.clear()

    def note_dense(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Gradients (B, ..., d) at each position of a parameter (d,), or of its broadcast shape."""
        middle = gradients.ndim - 1 - parameter.ndim
        summed = _precise(gradients).flatten(1, middle).sum(1) if middle > 0 else _precise(gradients)
        self.of(parameter).add(summed)


def _precise(tensor: Tensor) -> Tensor:
    """At least float32: norms, products and sums of gradients are never taken in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Affine(torch.autograd.Function):
    """y = x W^T + b, or x W + b if `transposed`; notes instead of returning the gradients of W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Module, book: Book) -> Tensor:
        ctx.module, ctx.book, ctx.transposed = module, book, not isinstance(module, nn.Linear)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.T if ctx.transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        module, book = ctx.module, ctx.book
        if module.weight.requires_grad:
            # Detached: a noted input would keep the graph alive, whose nodes keep the book, which keeps the notes.
            book.note_affine(module.weight, x.detach(), g, ctx.transposed)
        if module.bias is not None and module.bias.requires_grad:
            book.note_dense(module.bias, g)
        needed = ctx.needs_input_grad[0]
        return (g @ (weight.T if ctx.transposed else weight) if needed else None), None, None, None, None


class _Scale(torch.autograd.Function):
    """y = x * weight + bias, the learned part of a normalisation; notes the gradients of weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Module, book: Book) -> Tensor:
        ctx.module, ctx.book = module, book
        ctx.save_for_backward(x, weight)
        return x * weight if bias is None else x * weight + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        module, book = ctx.module, ctx.book
        if module.weight.requires_grad:
            book.note_dense(module.weight, _precise(g) * _precise(x))
        bias = getattr(module, "bias", None)
        if bias is not None and bias.requires_grad:
            book.note_dense(bias, g)
        return (g * weight if ctx.needs_input_grad[0] else None), None, None, None, None


class _Lookup(torch.autograd.Function):
    """Rows of an embedding table; notes which row got which gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, module: nn.Embedding, book: Book) -> Tensor:
        ctx.module, ctx.book = module, book
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        flat, g = ids.reshape(len(ids), -1), g.reshape(len(ids), -1, g.shape[-1])
        if ctx.module.padding_idx is not None:
            g = g.masked_fill((flat == ctx.module.padding_idx)[..., None], 0)
        ctx.book.of(ctx.module.weight).lookups.append((flat, g))
        return None, None, None, None


def _affine(module: Any, book: Book, name: str) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        x, weight, bias = book.rows(x, name), module.weight, module.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _Affine.apply(x, weight, bias, module, book)

    return forward


def _embedding(module: Any, book: Book, name: str) -> Callable[..., Tensor]:
    return lambda ids: _Lookup.apply(book.rows(ids, name), module.weight, module, book)


def _layer_norm(module: Any, book: Book, name: str) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        normalised = F.layer_norm(book.rows(x, name), module.normalized_shape, None, None, module.eps)
        return _Scale.apply(normalised, module.weight, module.bias, module, book)

    return forward


def _rms_norm(module: Any, book: Book, name: str) -> Callable[..., Tensor]:
    return lambda x: _Scale.apply(_rms_normalised(module, book.rows(x, name)), module.weight, None, module, book)


def _rms_normalised(module: Any, x: Tensor) -> Tensor:
    """x over its root mean square. For Llama's kind the same operations in float32 as there, so that outputs agree."""
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
    single = x.to(torch.float32)
    inverse = torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return (single * inverse).to(x.dtype)


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Is it `kind`, with that class's own forward (a quantised or otherwise changed subclass has another)?"""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _rule(module: nn.Module) -> Callable[..., Callable[..., Tensor]] | None:
    """How to record a module that owns trainable parameters, or None if its kind is unknown."""
    if _plain(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        return _affine
    if _plain(module, nn.Embedding):
        module_: Any = module
        plain = module_.max_norm is None and not module_.scale_grad_by_freq and not module_.sparse
        return _embedding if plain else None
    if _plain(module, nn.LayerNorm) and module.weight is not None:
        return _layer_norm
    if _plain(module, nn.RMSNorm) or _is_llama_rms_norm(module):
        return _rms_norm
    return None


def _is_llama_rms_norm(module: nn.Module) -> bool:
    """Does a module called ...RMSNorm compute what Llama's does? Some scale by 1 + weight, so numbers decide."""
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    weight: Any = module.weight
    with torch.no_grad():
        x = torch.linspace(-1, 2, weight.numel(), device=weight.device, dtype=weight.dtype)[None]
        ours = weight * _rms_normalised(module, x)
        return bool(torch.allclose(module(x), ours, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-5))


class Recorder:
    """Knows which modules of a model are to be recorded, and does it.

    Raises:
        ValueError: a trainable parameter that no rule covers, or in float16; the error names it.
    """

    def __init__(self, model: nn.Module):
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._rules: list[tuple[str, nn.Module, Callable[..., Any]]] = []
        tables: set[nn.Parameter] = set()
        weights: set[nn.Parameter] = set()
        for name, module in model.named_modules():
            own = {parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad}
            rule = _rule(module) if own else None
            if rule is not None:
                self._rules.append((name, module, rule))
                (tables if rule is _embedding else weights).update(own)
        self._looked_up = tables & weights
        for name, parameter in self.parameters.items():
            if parameter not in tables | weights:
                raise ValueError(
                    f"{name} is trainable but no rule gives its per-example gradients (Linear, Conv1D, Embedding,"
                    " LayerNorm, RMSNorm and LoRA on them are covered); freeze it with requires_grad_(False)."
                )
            if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                raise ValueError(
                    f"{name} has dtype {parameter.dtype}; use float32 or bfloat16, whose gradients need no loss scale."
                )

    @contextlib.contextmanager
    def recording(self, batch_size: int) -> Iterator[Book]:
        """Records every forward and backward pass inside, also those recomputed by gradient checkpointing."""
        book = Book(batch_size, self._looked_up)
        try:
            for name, module, rule in self._rules:
                module.forward = rule(module, book, name)  # shadows the class's method on this instance only
            yield book
        finally:
            for _, module, _ in self._rules:
                module.__dict__.pop("forward", None)


__all__ = ["Book", "Notes", "Recorder"]
