"""Linear layers, and LoRA adapters together with the frozen layer that they adapt, while gradients are recorded."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .book import Book
from .fallback import OwnForward


class _Readers:
    """Of one tensor that several layers read, as query, key and value projections do.

    The gradients that they send back are added up here, in one piece of memory, and only the last one to be computed
    returns the sum: autograd would claim memory for each of them and add them up itself.
    """

    def __init__(self) -> None:
        self.waiting = 0  # for gradients to send back
        self.noting = 0  # uses that the book has not seen
        self.gradient: Tensor | None = None

    def send_back(self, book: Book, *products: tuple[Tensor, Tensor]) -> Tensor | None:
        """The sum of g W over all readers, each of which gives one or more (g, W), to the last; None to the others."""
        if not book.shares_inputs:
            return _added(None, products)
        self.gradient = _added(self.gradient, products)
        self.waiting -= 1
        if self.waiting:
            book.unfinished.add(self)
            return None
        book.unfinished.discard(self)
        total, self.gradient = self.gradient, None
        return total


def _added(total: Tensor | None, products: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """`total`, in its memory, plus the sum of g W."""
    for g, weight in products:
        if total is None:
            total = g @ weight
        else:
            total.view(-1, weight.shape[1]).addmm_(g.reshape(-1, weight.shape[0]), weight)
    assert total is not None
    return total


class _Affine(torch.autograd.Function):
    """y = x W^T + b, or x W + b if `transposed`; notes instead of returning the gradients of W and b.

    With `rows`, `weight` holds these rows of the module's only.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Module, book: Book, readers: _Readers,
        rows: slice | None,
    ) -> Tensor:  # fmt: skip
        ctx.module, ctx.book, ctx.transposed = module, book, not isinstance(module, nn.Linear)
        ctx.readers, ctx.rows = readers, rows
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.T if ctx.transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        module, book = ctx.module, ctx.book
        if module.weight.requires_grad:
            ctx.readers.noting -= 1
            # Detached: a noted input would keep the graph alive, whose nodes keep the book, which keeps the notes.
            book.note_affine(module.weight, x.detach(), g, ctx.transposed, not ctx.readers.noting, ctx.rows)
        if module.bias is not None and module.bias.requires_grad:
            book.note_dense(module.bias, g)
        inner = None
        if ctx.needs_input_grad[0]:
            inner = ctx.readers.send_back(book, (g, weight.T if ctx.transposed else weight))
        return inner, *[None] * 6


class _Adapted(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T with W and b frozen; notes the gradients of A and B.

    As one function the adapter adds to what the frozen layer computed, in its memory, forward and backward; module by
    module, a product, a scaled product and a sum of the size of y each claim their own. That pays for the norms.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float,
        modules: tuple[nn.Linear, nn.Linear], book: Book, readers: _Readers,
    ) -> Tensor:  # fmt: skip
        ctx.modules, ctx.book, ctx.readers, ctx.scale = modules, book, readers, scale
        y, inner = F.linear(x, weight, bias), F.linear(x, down)
        y.view(-1, len(up)).addmm_(inner.view(-1, len(down)), up.T, alpha=scale)
        ctx.save_for_backward(x, inner, weight, down, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, down, up = ctx.saved_tensors
        (of_down, of_up), book = (module.weight for module in ctx.modules), ctx.book
        if of_up.requires_grad:
            book.note_affine(of_up, inner * ctx.scale, g)
        between = (g @ up).mul_(ctx.scale)  # the gradient of x A^T
        if of_down.requires_grad:
            ctx.readers.noting -= 1
            book.note_affine(of_down, x.detach(), between, last=not ctx.readers.noting)
        back = ctx.readers.send_back(book, (g, weight), (between, down)) if ctx.needs_input_grad[0] else None
        return back, *[None] * 8


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Is it `kind`, with that class's own forward (a quantised or otherwise changed subclass has another)?

    A linear layer without bias whose class says `takes_rows` counts as one: its forward takes a slice `rows` as well,
    and then uses these rows of its weight only.
    """
    of: Any = type(module)
    known = of.forward is kind.forward or (getattr(of, "takes_rows", False) and getattr(module, "bias", None) is None)
    return isinstance(module, kind) and known and "forward" not in vars(module)


def as_autocast(module: Any, x: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """Weight and bias of a module, and the type for its input `x`, as autocast would give them to it."""
    weight, bias, dtype = module.weight, module.bias, x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return weight, bias, dtype


def _read(x: Tensor, name: str, dtype: torch.dtype, book: Book, trains: bool) -> tuple[Tensor, _Readers]:
    """What a layer reads, one row per example, and who else reads it: layers in a row that are given the same `x`."""
    if book.last_read is None or book.last_read[0] is not x:
        book.last_read = x, book.rows(x, name).to(dtype), _Readers()
    _, inputs, readers = book.last_read
    readers.waiting += inputs.requires_grad
    readers.noting += trains
    return inputs, readers


def affine(module: Any, book: Book, name: str) -> Callable[..., Tensor]:
    """The rule for nn.Linear and for the Conv1D of GPT-2."""

    def forward(x: Tensor, rows: slice | None = None) -> Tensor:
        weight, bias, dtype = as_autocast(module, x)
        if rows is not None:
            weight = weight.detach()[rows]  # its gradient is noted, not returned
        inputs, readers = _read(x, name, dtype, book, module.weight.requires_grad)
        return _Affine.apply(inputs, weight, bias, module, book, readers, rows)

    return forward


def is_adapter(module: nn.Module) -> bool:
    """Is it PEFT's LoRA around a frozen nn.Linear, and does it compute what `_Adapted` does?

    Recognised by name, since this part of the package does not know PEFT; then numbers decide, with other weights than
    its own, of which one half is zero at first. What changes later, `adapter` sees at every call.
    """
    of: Any = module
    kind: Any = type(module).forward
    if kind.__module__ != "peft.tuners.lora.layer" or kind.__qualname__ != "Linear.forward":
        return False
    parts = _parts(of) if hasattr(of, "lora_variant") else None
    if hasattr(kind, "__wrapped__") or parts is None:
        return False
    base, down, up, scale = parts
    if not plain(down, nn.Linear) or not plain(up, nn.Linear):
        return False
    weights = (base.weight, down.weight, up.weight)
    if any(w.requires_grad for w in base.parameters()) or len({(w.dtype, w.device) for w in weights}) > 1:
        return False
    device = base.weight.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        x = torch.linspace(-1, 2, base.in_features, dtype=base.weight.dtype, device=device)[None]
        others = [torch.linspace(-1, 1, w.numel(), dtype=w.dtype, device=device).view_as(w) for w in weights[1:]]
        names = {part: f"module.{key}.weight" for key, part in of.named_modules()}
        given = {names[part]: w for part, w in zip((down, up), others, strict=True)}
        theirs = functional_call(OwnForward(module), given, (x,))
        ours = _Adapted.apply(x, base.weight, base.bias, *others, scale, None, None, None)
        return bool(torch.allclose(theirs, ours, rtol=1e-1 if x.dtype == torch.bfloat16 else 1e-4))


def _parts(module: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear, float] | None:
    """The frozen layer, A, B and the scale, where exactly one adapter without extras is at work; None otherwise."""
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or len(active) != 1 or active[0] in module.lora_variant:
        return None
    dropout = module.lora_dropout[active[0]]
    parts = module.get_base_layer(), module.lora_A[active[0]], module.lora_B[active[0]]
    if not plain(parts[0], nn.Linear):
        return None
    dropping = not isinstance(dropout, nn.Identity) and (not isinstance(dropout, nn.Dropout) or dropout.training)
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (*parts, dropout))
    biased = any(part.bias is not None for part in parts[1:])
    return None if dropping or hooked or biased else (*parts, module.scaling[active[0]])


def adapter(module: Any, book: Book, name: str) -> Callable[..., Tensor]:
    """The rule for what `is_adapter`; where something else is asked for, A and B are recorded by themselves."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = None if args or kwargs else _parts(module)
        if parts is not None:
            base, down, up, scale = parts
            weight, bias, dtype = as_autocast(base, x)
            weights = [layer.weight.to(dtype) for layer in (down, up)]
            same = all(w.dtype == dtype for w in (weight, down.weight, up.weight))
            if same or torch.is_autocast_enabled(x.device.type):
                inputs, readers = _read(x, name, dtype, book, down.weight.requires_grad)
                return _Adapted.apply(inputs, weight, bias, *weights, scale, (down, up), book, readers)
        return type(module).forward(module, x, *args, **kwargs)

    return forward


__all__ = ["adapter", "affine", "as_autocast", "is_adapter", "plain"]
