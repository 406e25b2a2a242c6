"""One forward and one backward pass that notes, per parameter, what the per-example gradients are made of.

While `Recorder.recording` is active, the leaf modules that own trainable parameters compute the same outputs as before,
but their backward returns gradients for their inputs only and notes the rest in a `Book`.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from . import fallback
from .affine import adapter, affine, as_autocast, is_adapter, plain
from .book import Book, precise

logger = logging.getLogger(__name__)


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * weight with the statistics in float32; notes the gradient of weight.

    One closed formula each way instead of the chain of small operations that modelling code leaves to autograd, and
    only x is kept: this is where a part of the cost of privacy is earned back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: nn.Module, eps: float, book: Book) -> Tensor:
        ctx.module, ctx.book = module, book
        single = precise(x)
        y = single.pow(2)  # the operations of modelling code, so that outputs agree to the last bit
        inverse = torch.rsqrt(y.mean(-1, keepdim=True) + eps)
        y = torch.mul(single, inverse, out=y).to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return y.mul_(weight) if weight.dtype == x.dtype else y * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normalised, single = precise(x) * inverse, precise(g)
        products = single * normalised
        if ctx.module.weight.requires_grad:
            ctx.book.note_dense(ctx.module.weight, products)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        weight = weight.to(single.dtype)
        along = (products @ weight).div_(x.shape[-1])[..., None]
        inner = torch.mul(single, weight, out=products if x.ndim > 2 else None)  # noted as its sum over positions
        return inner.addcmul_(normalised, along, value=-1).mul_(inverse).to(x.dtype), None, None, None, None


class _Scale(torch.autograd.Function):
    """y = x * weight; notes the gradient of weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: nn.Module, book: Book) -> Tensor:
        ctx.module, ctx.book = module, book
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.module.weight.requires_grad:
            ctx.book.note_dense(ctx.module.weight, precise(g) * precise(x))
        return g * weight, None, None, None


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation; notes the gradients of weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.LayerNorm, book: Book) -> Tensor:
        y, mean, inverse = torch.native_layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        ctx.module, ctx.book = module, book
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        module, book = ctx.module, ctx.book
        if module.weight.requires_grad:
            book.note_dense(module.weight, (precise(x) - mean) * inverse * precise(g))
        if bias is not None and module.bias.requires_grad:
            book.note_dense(module.bias, g)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        inner, _, _ = torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x, module.normalized_shape, mean, inverse, weight, bias, [True, False, False]
        )
        return inner, None, None, None, None


class _Convolution(torch.autograd.Function):
    """Two-dimensional convolution: at every place of its output, a linear layer on the patch of input below."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Conv2d, book: Book) -> Tensor:
        ctx.module, ctx.book = module, book
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        module, book = ctx.module, ctx.book
        if module.weight.requires_grad:
            patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
            book.note_affine(module.weight, patches.transpose(1, 2), g.flatten(2).transpose(1, 2))
        if module.bias is not None and module.bias.requires_grad:
            book.note_dense(module.bias, precise(g).sum((2, 3)))
        inner = None
        if ctx.needs_input_grad[0]:
            inner = torch.ops.aten.convolution_backward(
                g, x, weight, None, module.stride, module.padding, module.dilation, False, [0, 0], 1,
                [True, False, False],
            )[0]  # fmt: skip
        return inner, None, None, None, None


class _GroupNorm(torch.autograd.Function):
    """Group normalisation of (B, C, ...); notes the gradients of weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, module: nn.GroupNorm, book: Book) -> Tensor:
        x = x.contiguous()
        ctx.sizes = x.shape[0], x.shape[1], x[0, 0].numel(), module.num_groups
        rows, channels, places, groups = ctx.sizes
        y, mean, inverse = torch.native_group_norm(x, weight, bias, rows, channels, places, groups, module.eps)
        ctx.module, ctx.book = module, book
        ctx.save_for_backward(x, weight, mean, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        module, book, flat = ctx.module, ctx.book, precise(g).flatten(2)
        if module.weight.requires_grad:
            grouped = precise(x).reshape(len(x), module.num_groups, -1)
            normalised = (grouped - mean[..., None]) * inverse[..., None]
            book.note_dense(module.weight, (normalised.view_as(flat) * flat).sum(2))
        if module.bias.requires_grad:
            book.note_dense(module.bias, flat.sum(2))
        inner = None
        if ctx.needs_input_grad[0]:
            inner = torch.ops.aten.native_group_norm_backward(
                g.contiguous(), x, mean, inverse, weight, *ctx.sizes, [True, False, False]
            )[0]
        return inner, None, None, None, None


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
        ctx.book.note_lookup(ctx.module.weight, flat, g)
        return None, None, None, None


def _convolution(module: Any, book: Book, name: str) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias, dtype = as_autocast(module, x)
        return _Convolution.apply(book.rows(x, name).to(dtype), weight, bias, module, book)

    return forward


def _embedding(module: Any, book: Book, name: str) -> Callable[..., Tensor]:
    return lambda ids: _Lookup.apply(book.rows(ids, name), module.weight, module, book)


def _norm(module: Any, book: Book, name: str) -> Callable[..., Tensor]:
    function = _LayerNorm if isinstance(module, nn.LayerNorm) else _GroupNorm

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = book.rows(precise(x) if module.weight.dtype != x.dtype else x, name)
            return function.apply(x, module.weight, module.bias, module, book)

    return forward


def _rms_norm(module: Any, book: Book, name: str) -> Callable[..., Tensor]:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps

    def forward(x: Tensor) -> Tensor:
        x = book.rows(x, name)
        if x.dtype == torch.float64 and not isinstance(module, nn.RMSNorm):
            # Llama's kind rounds to float32 inside; in double precision, only the same operations agree with it.
            single = x.to(torch.float32)
            inverse = torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + eps)
            return _Scale.apply((single * inverse).to(x.dtype), module.weight, module, book)
        smallest = torch.finfo(x.dtype).eps if eps is None else eps
        return _RMSNorm.apply(x, module.weight, module, smallest, book)

    return forward


def _rule(module: nn.Module) -> Callable[..., Callable[..., Tensor]] | None:
    """How to record a module that owns trainable parameters, or None if its kind is unknown."""
    if plain(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        return affine
    if plain(module, nn.Embedding):
        module_: Any = module
        simple = module_.max_norm is None and not module_.scale_grad_by_freq and not module_.sparse
        return _embedding if simple else None
    if plain(module, nn.LayerNorm) and module.weight is not None:
        return _norm
    if plain(module, nn.GroupNorm) and module.affine:
        return _norm
    if plain(module, nn.Conv2d):
        usual = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return _convolution if usual else None
    one_dimensional = len(getattr(module, "normalized_shape", ())) == 1
    if (plain(module, nn.RMSNorm) and one_dimensional) or _is_llama_rms_norm(module):
        return _rms_norm
    return None


def _is_llama_rms_norm(module: nn.Module) -> bool:
    """Does a module called ...RMSNorm compute what Llama's does? Some scale by 1 + weight, so numbers decide."""
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    of: Any = module.weight
    with torch.no_grad():
        x = torch.linspace(-1, 2, of.numel(), device=of.device, dtype=of.dtype)[None]
        weight = x[0] + 3  # another one than the module's, which may be a shard
        theirs = torch.func.functional_call(module, {"weight": weight}, (x,))
        ours = _RMSNorm.apply(x, weight, module, module.variance_epsilon, None)
        return bool(torch.allclose(theirs, ours, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-5))


def _with_gathered(forward: Callable[..., Any], module: nn.Module, book: Book) -> Callable[..., Any]:
    """FSDP2 puts a gathered parameter in the place of the shard for the time of a pass: the notes go to the shard."""
    shards = dict(module.named_parameters(recurse=False))

    def run(*args: Any, **kwargs: Any) -> Any:
        for name, shard in shards.items():
            book.stands_for[getattr(module, name)] = shard
        return forward(*args, **kwargs)

    return run


def _check_sharding(name: str, parameter: nn.Parameter) -> None:
    """Every entry on exactly one of all processes: then noise by its holder is noise once."""
    whole = isinstance(parameter, DTensor) and parameter.device_mesh.size() == dist.get_world_size()
    if not whole or not all(placement.is_shard() for placement in parameter.placements):  # type: ignore[attr-defined]
        how = getattr(parameter, "placements", "not at all")
        raise ValueError(
            f"{name} is split {how} over {dist.get_world_size()} processes; with a sharded model every trainable"
            " parameter must be split over all processes, without replicas: call fully_shard on the whole model with a"
            " mesh of one dimension."
        )


class Recorder:
    """Knows which modules of a model are to be recorded, and does it.

    A trainable parameter of a module without a rule is covered by `fallback.per_example`: slower, exact, and announced
    by one warning.

    Raises:
        ValueError: a trainable parameter in float16, one that no module with a forward holds, or one that a module
            without a rule shares with an embedding; the error names it.
    """

    def __init__(self, model: nn.Module, memory_budget: float = 0):
        self._model = model
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters.values())
        self._memory_budget = memory_budget
        self.shares_inputs = True
        self._batch_norms = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        self._rules: list[tuple[str, nn.Module, Callable[..., Any]]] = []
        units = fallback.units(model, lambda module: _rule(module) is not None)
        tables: set[nn.Parameter] = set()
        weights: set[nn.Parameter] = set()
        others: set[nn.Parameter] = set()
        for name, module in model.named_modules():
            if any(name == unit or name.startswith(f"{unit}.") or not unit for unit in units):
                if name in units:
                    self._rules.append((name, module, fallback.per_example))
                others.update(parameter for parameter in module.parameters() if parameter.requires_grad)
                continue
            own = {parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad}
            rule = _rule(module) if own else None
            if rule is not None:
                self._rules.append((name, module, rule))
                (tables if rule is _embedding else weights).update(own)
            elif not own and not self.sharded and is_adapter(module):
                self._rules.append((name, module, adapter))  # for speed: its parts have rules of their own
        self._tied = frozenset(tables & weights)
        if self.sharded:
            self.shares_inputs = False  # mending it takes a second pass, on one process only
            for name, parameter in self.parameters.items():
                _check_sharding(name, parameter)
        for name, parameter in self.parameters.items():
            if parameter not in tables | weights | others:
                raise ValueError(
                    f"{name} is trainable, but no module with a forward of its own holds it, so nothing gives its"
                    " per-example gradients; freeze it with requires_grad_(False)."
                )
            if parameter in others and self.sharded:
                raise ValueError(
                    f"{name} is sharded and in a module without a book-keeping rule, whose parameters the fallback"
                    " cannot gather; freeze it with requires_grad_(False), or train on whole copies of the model."
                )
            if parameter in (tables | weights) & others:
                raise ValueError(
                    f"{name} is shared between a layer with a rule and a module without one; freeze it with"
                    " requires_grad_(False)."
                )
            if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                raise ValueError(
                    f"{name} has dtype {parameter.dtype}; use float32 or bfloat16, whose gradients need no loss scale."
                )
        if units:
            kinds = sorted({type(model.get_submodule(unit)).__name__ for unit in units})
            logger.warning(
                "No book-keeping rule for %s: their per-example gradients come from torch.func.vmap, which is exact but"
                " slower.", ", ".join(kinds),
            )  # fmt: skip

    def check_known(self) -> None:
        """Raises ValueError if a parameter is trainable that was not when the recorder was made."""
        known = set(self.parameters.values())
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and parameter not in known:
                raise ValueError(
                    f"{name} was frozen, or another tensor, when the model was taken over, so nothing would clip its"
                    " gradient; choose what is trained before that (requires_grad_), and leave it so."
                )

    @contextlib.contextmanager
    def recording(self, batch_size: int) -> Iterator[Book]:
        """Records every forward and backward pass inside, also those recomputed by gradient checkpointing.

        What `torch.compile` made runs uncompiled inside.

        Raises:
            ValueError: a batch normalisation in training mode, through which examples see each other.
        """
        for name, batch_norm in self._batch_norms:
            if batch_norm.training:
                raise ValueError(
                    f"{name} is a {type(batch_norm).__name__} in training mode: examples see each other through it, so"
                    " no gradient belongs to one example. Replace it by GroupNorm, or call eval() on it."
                )
        book = Book(batch_size, self._tied, self._memory_budget)
        book.shares_inputs = self.shares_inputs
        before = [vars(module).get("forward") for _, module, _ in self._rules]
        # A compiled graph would not see the replaced forwards, so what is compiled runs uncompiled here.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
        try:
            for name, module, rule in self._rules:
                forward = rule(module, book, name)
                if self.sharded:
                    forward = _with_gathered(forward, module, book)
                vars(module)["forward"] = forward  # shadows the class's method on this instance only
            with eager:
                yield book
        finally:
            book.last_read = None
            for (_, module, _), own in zip(self._rules, before, strict=True):
                if own is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = own


__all__ = ["Recorder"]
