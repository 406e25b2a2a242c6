"""Per-example gradients of modules that no book-keeping rule knows: `torch.func.vmap` over their own forward.

The module's forward runs as usual; in the backward pass it is run again for every example by itself, in chunks, which
gives the gradients of its parameters and of its inputs. Exact for any module that treats examples independently, has no
randomness of its own, and is built from operations that vmap knows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from .book import Book

_CHUNK = 8  # examples at once: beyond a handful the time per example falls no further, the memory rises


def units(model: nn.Module, has_rule: Callable[[nn.Module], bool]) -> list[str]:
    """Names of the modules whose parameters, with those of everything below them, need the fallback.

    That is every module that owns a trainable parameter and has no rule, or its nearest ancestor with a forward; a
    parameter without any such ancestor is in none of them.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{unit}.") or not unit for unit in found)
        own = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if inside or not own or has_rule(module):
            continue
        while name and not _has_forward(model.get_submodule(name)):
            name = name.rpartition(".")[0]
        if not _has_forward(model.get_submodule(name)):
            continue
        found = [unit for unit in found if unit != name and not unit.startswith(f"{name}.")] if name else []
        found.append(name)
    return found


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def per_example(module: nn.Module, book: Book, name: str) -> Callable[..., Any]:
    """A forward for `module` that computes the same and notes the per-example gradients of all its parameters."""
    parameters = {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}
    inner = OwnForward(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        at = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        shape_of_result: list[Any] = []

        def run(values: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
            """The tensors of the module's result; the rest of it goes to `shape_of_result`."""
            filled = list(leaves)
            for index, tensor in zip(at, tensors, strict=True):
                filled[index] = tensor
            args_, kwargs_ = tree_unflatten(filled, structure)
            result, result_structure = tree_flatten(
                functional_call(inner, {f"module.{key}": value for key, value in values.items()}, args_, kwargs_)
            )
            shape_of_result[:] = [result, result_structure]
            return [leaf for leaf in result if isinstance(leaf, Tensor)]

        tensors = [book.rows(leaves[index], name) for index in at]
        if not tensors:
            raise ValueError(f"{name or 'the model'} receives no tensor with examples in it; freeze its parameters.")
        # The parameters are inputs too, so that autograd visits the module even if no input needs a gradient.
        given = list(parameters.values())
        outputs = iter(_PerExample.apply(run, parameters, book, name, len(given), *given, *tensors))
        result, structure_ = shape_of_result
        return tree_unflatten([next(outputs) if isinstance(leaf, Tensor) else leaf for leaf in result], structure_)

    return forward


class OwnForward(nn.Module):
    """Calls the class's forward, past hooks and past the one that shadows it while gradients are recorded."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


class _PerExample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Any, parameters: dict[str, nn.Parameter], book: Book, name: str, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.parameters, ctx.book, ctx.name, ctx.count = run, parameters, book, name, count
        ctx.save_for_backward(*tensors)
        return tuple(run({key: parameter.detach() for key, parameter in parameters.items()}, tensors[count:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors[ctx.count :]
        floats = [index for index, tensor in enumerate(tensors) if tensor.is_floating_point()]
        known = [index for index, gradient in enumerate(gradients) if gradient is not None]

        def loss(values: Any, inputs: Any, rows: Any, outer: Any) -> Tensor:
            given = [row[None] for row in rows]
            for index, value in zip(floats, inputs, strict=True):
                given[index] = value[None]
            outputs = ctx.run(values, given)
            return sum((outputs[index][0] * g).sum() for index, g in zip(known, outer, strict=True))  # type: ignore

        values = {key: parameter.detach() for key, parameter in ctx.parameters.items()}
        try:
            of_parameters, of_inputs = vmap(
                grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0, 0), chunk_size=_CHUNK, randomness="error"
            )(values, [tensors[index] for index in floats], list(tensors), [gradients[index] for index in known])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{ctx.name or 'the model'} has no book-keeping rule, and torch.func.vmap cannot run it either"
                f" ({str(error).splitlines()[0]}); freeze its parameters with requires_grad_(False), or switch its"
                " dropout off."
            ) from error
        for key, each in of_parameters.items():
            ctx.book.note_dense(ctx.parameters[key], each)
        inner: list[Tensor | None] = [None] * len(tensors)
        for index, value in zip(floats, of_inputs, strict=True):
            inner[index] = value
        return (*[None] * (5 + ctx.count), *inner)


__all__ = ["OwnForward", "per_example", "units"]
