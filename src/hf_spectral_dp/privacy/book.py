"""Per-example gradients, kept as what they are made of: their norms and weighted sums without ever listing them all.

The gradient of a weight W of y = W a for one example is the sum over its T positions of g a^T. The pairs (a, g) say
everything about it: its squared norm is <a a^T, g g^T> over T x T matrices ("ghost norm", Li et al., arXiv:2110.05679),
and a weighted sum over examples is one ordinary matrix product ("book-keeping", Bu et al., arXiv:2210.00038). Where the
gradient itself is cheaper than the T x T matrices it is made at once instead ("instantiated"); see `Book.instantiates`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# What one float of an instantiated gradient costs, in floating-point operations: to write it, read it for its norm and
# read it again for the sum; and, for floats beyond those that the pairs would have kept, to claim fresh memory. On CPUs
# fresh pages cost the most: 150 to 250 together. A GPU in half precision: 12 bytes at 3 TB/s against 800 TFLOP/s.
_FLOPS_PER_FLOAT = {"cpu": (50, 150)}
_FLOPS_PER_FLOAT_ELSEWHERE = (2000, 0)

# Bytes of instantiated gradients in one piece. Small pieces fit where activations have been freed; for large ones the
# process would grow. Smaller ones than this save no memory, and many calls for one or two examples each take longer.
_PIECE = 4 << 20

# Relative rounding that the sensitivity allows for: half of it for the norms, half for the weighted sum.
SLACK = 1e-5


def precise(tensor: Tensor) -> Tensor:
    """At least float32: norms, products and sums of gradients are never taken in half precision."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class Book:
    """Notes of one backward pass over `batch_size` examples, by parameter.

    Args:
        batch_size: B, examples in the pass.
        tied: embedding tables that are also the weight of a linear layer: they need their pairs, for the cross term.
        memory_budget: bytes by which instantiated gradients may exceed what the pairs would take.
    """

    def __init__(self, batch_size: int, tied: frozenset[nn.Parameter] = frozenset(), memory_budget: float = 0):
        self.batch_size = batch_size
        self.last_read: Any = None  # for the layers that record: what the last one of them read
        self.shares_inputs = True
        self.unfinished: set[Any] = set()  # inputs of which some reader has not sent its gradient back
        self.stands_for: dict[nn.Parameter, nn.Parameter] = {}  # gathered parameters of a sharded model
        self._tied = tied
        self._left = memory_budget
        self._dense: dict[nn.Parameter, list[Tensor]] = {}  # gradients themselves, in pieces of some examples each
        self._row_norms: dict[nn.Parameter, Tensor] = {}  # (B, m), norms of the rows of those
        self._blocks: dict[Any, tuple[nn.Parameter, int, int]] = {}  # what stands for rows first to last of a weight
        self._affine: dict[nn.Parameter, list[tuple[tuple, Tensor]]] = {}  # key of a (B, T, d), and g (B, T, p)
        self._lookups: dict[nn.Parameter, list[tuple[Tensor, Tensor]]] = {}  # ids (B, T), g (B, T, d)
        self._inputs: dict[tuple, Tensor] = {}  # query, key and value projections share their input: it counts once
        self._open: dict[tuple, list[Tensor]] = {}  # by key of an input, sum of g g^T over its uses so far
        # (B,) each, to be counted twice and once: what squared norms are made of, and of which sizes that was added up
        self._squares: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._sizes: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._eps = 0.0  # of the coarsest type that one was added up in

    # -- during the backward pass --------------------------------------------------------------------------------

    def rows(self, tensor: Tensor, name: str) -> Tensor:
        """`tensor` with one leading row per example; a row for all is repeated, so that each gets its own gradient."""
        if tensor.ndim and tensor.shape[0] == self.batch_size:
            return tensor
        if tensor.ndim and tensor.shape[0] == 1:
            return tensor.expand(self.batch_size, *tensor.shape[1:])
        raise ValueError(
            f"{name} received shape {tuple(tensor.shape)} in a batch of {self.batch_size} examples; per-example"
            " gradients need the first dimension to be the example. Keep examples apart, or freeze this module."
        )

    def note_affine(
        self, weight: nn.Parameter, inputs: Tensor, gradients: Tensor, transposed: bool = False, last: bool = True,
        rows: slice | None = None,
    ) -> None:  # fmt: skip
        """One use of a weight (p, d), or (d, p) if `transposed`, on inputs (B, ..., d) with output gradients.

        The weight of a convolution, (p, channels, height, width), counts as (p, d) with d = channels height width.
        `last` says that no other use of these inputs is to come; if one does, the norm takes longer and is the same.
        `rows`: only these rows of the weight were used. They count as a weight of their own, whose gradient has no
        entry in common with that of any other, so the squares of their norms add up.

        Raises:
            ValueError: rows of which some, but not all, are noted elsewhere, or rows of a tied weight.
        """
        weight = self.stands_for.get(weight, weight)
        if rows is not None:
            weight = self._block(weight, rows)
        a, g = (x.reshape(self.batch_size, -1, x.shape[-1]) for x in (inputs, gradients))
        if transposed:  # y = a W: the gradient is a^T g, the same sum with the roles exchanged
            a, g = g, a
        # All uses of one weight keep one form: between two forms the cross terms of its norm would be missing.
        tied = weight in self._tied
        if weight not in self._affine and (weight in self._dense or self.instantiates(a, g, tied)):
            self._add_dense(weight, _instantiated(precise(a), precise(g), crossed=not tied and a.shape[2] < 32))
        else:
            # What is noted is alive, so the same place in memory is the same tensor.
            key = (a.data_ptr(), a.shape, a.stride(), a.dtype)
            self._inputs.setdefault(key, a)
            self._affine.setdefault(weight, []).append((key, g))
            _add_gram(self._open.setdefault(key, []), g)  # now, while g is in the cache
            if last:
                self._close(key)

    def _block(self, weight: nn.Parameter, rows: slice) -> Any:
        """What stands for these rows of a weight: an empty tensor of their shape, the same one for the same rows."""
        first, last, step = rows.indices(len(weight))
        for block, (of, start, end) in self._blocks.items():
            if of is weight and (start, end) == (first, last):
                return block
            if of is weight and start < last and first < end:
                raise ValueError(
                    f"rows {first} to {last} of a weight overlap with rows {start} to {end}, which are used by"
                    " themselves: ask for the same rows each time, or for the whole."
                )
        if weight in self._tied or step != 1 or first >= last:
            raise ValueError(f"{rows} of a weight: rows must lie side by side, of a weight not tied; use the whole.")
        block = torch.empty(last - first, *weight.shape[1:], device="meta")
        self._blocks[block] = weight, first, last
        return block

    def instantiates(self, a: Tensor, g: Tensor, tied: bool = False) -> bool:
        """Whether to keep per-example gradients (B, p, d) instead of the pairs a (B, T, d), g (B, T, p).

        The rule. Time: the ghost norm costs 2 T^2 (p + d) operations more than ordinary training, the instantiated
        gradient costs no operation more but moves p d floats to memory and back, and claims memory for what exceeds
        the T (p + d) floats of the pairs; the cheaper is taken. A weight that is `tied` to an embedding costs
        2 T^2 min(p, d) more as a ghost, for the cross term. Memory: an instantiated gradient may be larger than the
        pairs as long as the excess fits in what is left of the memory budget of this pass; the layers nearest to the
        loss are served first.
        """
        (batch, T, d), p = a.shape, g.shape[-1]
        ghost = 2 * T * T * (p + d + tied * min(p, d))
        excess = max(0, p * d - T * (p + d))
        moved, claimed = _FLOPS_PER_FLOAT.get(a.device.type, _FLOPS_PER_FLOAT_ELSEWHERE)
        if moved * p * d + claimed * excess > ghost or 4 * batch * excess > self._left:
            return False
        self._left -= 4 * batch * excess
        return True

    def note_dense(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Gradients (B, ..., *shape) at each position of a parameter of that shape."""
        parameter = self.stands_for.get(parameter, parameter)
        middle = gradients.ndim - 1 - parameter.ndim
        each = precise(gradients).flatten(1, middle).sum(1) if middle > 0 else precise(gradients)
        self._add_dense(parameter, [each])

    def note_lookup(self, table: nn.Parameter, ids: Tensor, gradients: Tensor) -> None:
        """One use of an embedding table: ids (B, T) and the gradients (B, T, d) of what was looked up."""
        self._lookups.setdefault(self.stands_for.get(table, table), []).append((ids, gradients))

    def _close(self, key: tuple) -> None:
        """Adds the ghost norm of the uses of one input."""
        inner: list[Tensor] = []
        _add_gram(inner, self._inputs[key])
        self._add_product_sums(self._open.pop(key), inner)

    def _add_product_sums(self, first: list[Tensor], second: list[Tensor]) -> None:
        """Adds the inner product of two symmetric matrices, in blocks as `_add_gram` makes them; overwrites `first`."""
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            products = a.mul_(b).view(self.batch_size, -1)
            self._eps = max(self._eps, torch.finfo(products.dtype).eps)
            once = index == len(first) - 1  # a block above the diagonal stands for its mirror image, too
            self._squares[once].append(products.sum(1))
            self._sizes[once].append(products.abs_().sum(1))

    def _add_dense(self, parameter: nn.Parameter, pieces: Iterable[Tensor]) -> None:
        """Gradients (n, *shape) of some examples each, in order; all uses of a parameter are cut alike."""
        before, now, norms = self._dense.get(parameter), [], []
        for index, piece in enumerate(pieces):
            if before and before[index].shape != piece.shape:  # by broadcasting, examples would get each other's
                raise ValueError(
                    f"per-example gradients of one parameter have shapes {tuple(before[index].shape)} and"
                    f" {tuple(piece.shape)}: layers of two kinds share it; untie or freeze it."
                )
            now.append(before[index] + piece if before else piece)
            if parameter not in self._tied:  # otherwise what was looked up is yet to be added
                norms.append(_row_norms(now[-1]))
        self._dense[parameter] = now
        if norms:
            self._row_norms[parameter] = torch.cat(norms) if len(norms) > 1 else norms[0]

    def _finish_dense(self, table: nn.Parameter) -> None:
        """An embedding table of which, as a weight, the gradients are instantiated: adds what was looked up, once."""
        uses, pieces, first = self._lookups.pop(table, []), self._dense[table], 0
        for piece in pieces:
            these = slice(first, first + len(piece))
            first += len(piece)
            rows = len(table) * torch.arange(len(piece), device=piece.device)[:, None]
            for ids, g in uses:
                piece.view(-1, piece.shape[-1]).index_add_(
                    0, (ids[these] + rows).flatten(), g[these].flatten(0, 1).to(piece.dtype)
                )
        if uses or table not in self._row_norms:
            self._row_norms[table] = torch.cat([_row_norms(piece) for piece in pieces])

    # -- after it ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def norms(self) -> Tensor:
        """(B,) Euclidean norms, over all parameters together, of the per-example gradients.

        Where a ghost norm cancels so far that rounding could have made the whole norm too small by more than the
        slack, it is increased by that rounding. Squares are added in float64: a sum of millions of float32 is not
        exact to a millionth.
        """
        for key in list(self._open):
            self._close(key)
        for weight, *_ in self._blocks.values():
            if weight in self._dense or weight in self._affine or weight in self._lookups:
                raise ValueError("a weight is used as a whole and by rows: their common gradient would not be clipped.")
        for table in (self._tied | self._lookups.keys()) & self._dense.keys():
            self._finish_dense(table)
        if self._dense:
            self._squares[1].append(torch.cat(list(self._row_norms.values()), 1).double().square().sum(1))
        for uses in self._affine.values():
            for (first, g), (second, h) in itertools.combinations(uses, 2):  # several uses of one weight
                a, b = precise(self._inputs[first]), precise(self._inputs[second])
                inner = torch.bmm(a, b.transpose(1, 2)).mul_(2)
                self._add_product_sums([inner], [torch.bmm(precise(g), precise(h).transpose(1, 2))])
        for table in self._lookups:
            self._add_lookup_norms(table)
            for key, head in self._affine.get(table, []):
                self._add_tied_term(table, precise(self._inputs[key]), precise(head))
        total = _twice_and_once(*self._squares, self.batch_size).clamp_min(0)
        # A square's relative error is twice the norm's: the whole slack here is half of it there.
        if any(self._sizes):
            rounding = 4 * self._eps * _twice_and_once(*self._sizes, self.batch_size)
            total = total + (rounding - SLACK * total).clamp_min(0)
        return total.sqrt()

    @torch.no_grad()
    def add_weighted(
        self, coefficients: Tensor, sums: dict[nn.Parameter, Tensor], only: nn.Parameter | None = None
    ) -> None:
        """Adds, for every noted parameter, the sum over examples of coefficient times gradient to `sums`.

        Gradients that were kept themselves are given up with that, so that the sums take their place in memory.

        Args:
            coefficients: (B,), >= 0. An example with coefficient 0 contributes exactly zero, whatever its gradient.
            sums: by parameter, at least float32; entries that are missing are made.
            only: for this parameter alone.
        """
        bad = coefficients == 0
        some_bad = bool(bad.any())

        def cleaned(tensor: Tensor, bad: Tensor = bad) -> Tensor:
            """Zero times NaN is NaN: what counts zero must be zero."""
            return tensor.masked_fill(bad.view(-1, *[1] * (tensor.ndim - 1)), 0) if some_bad else tensor

        def asked(parameter: nn.Parameter) -> bool:
            return only is None or self._blocks.get(parameter, (parameter,))[0] is only

        for block, (weight, first, last) in self._blocks.items():
            if asked(block):
                if weight not in sums:
                    dtype = torch.promote_types(weight.dtype, torch.float32)
                    sums[weight] = torch.zeros(weight.shape, dtype=dtype, device=coefficients.device)
                sums[block] = sums[weight][first:last]  # what is added there is added here
        for parameter in list(filter(asked, self._dense)):
            pieces = self._dense.pop(parameter)
            for piece, each in zip(pieces, coefficients.split([len(piece) for piece in pieces]), strict=True):
                lying, each = _as_it_lies(piece), each.to(piece.dtype)
                rows = cleaned(lying, each == 0).flatten(1)
                if lying is not piece:
                    total = (each @ rows).view(lying.shape[1:]).T
                    if parameter in sums:
                        sums[parameter].view(total.shape).add_(total)
                    else:
                        sums[parameter] = total.contiguous().view(parameter.shape)
                elif parameter in sums:
                    sums[parameter].view(-1).addmv_(rows.T, each)
                else:
                    sums[parameter] = (each @ rows).view(parameter.shape)
        weighted = _Weighted(coefficients, cleaned)
        for weight, uses in self._affine.items():
            for key, g in uses if asked(weight) else ():
                a = self._inputs[key]
                if a.shape[-1] <= g.shape[-1] or weighted.holds(key):  # the smaller one is copied
                    a, g = weighted(a, key), precise(cleaned(g))
                else:
                    a, g = precise(cleaned(a)), weighted(g)
                _add_product(sums, weight, g.flatten(0, 1).T, a.flatten(0, 1))
        for table in filter(asked, self._lookups):
            for ids, g in self._lookups[table]:
                rows = weighted(g).flatten(0, 1)
                if table not in sums:
                    sums[table] = rows.new_zeros(table.shape)
                sums[table].index_add_(0, ids.flatten(), rows)
        for block in self._blocks:
            sums.pop(block, None)

    def _add_lookup_norms(self, table: nn.Parameter) -> None:
        """What one row of a table got at several positions is one gradient: their sum has to be known."""
        ids = torch.cat([ids for ids, _ in self._lookups[table]], 1)
        g = torch.cat([precise(g) for _, g in self._lookups[table]], 1)
        if ids.shape[1] <= 32:  # for few positions, all of their inner products take less time than the sums
            self._add_product_sums([torch.bmm(g, g.mT)], [ids[:, :, None] == ids[:, None]])
            return
        example = torch.arange(self.batch_size, device=ids.device)[:, None]
        places, index = torch.unique(ids + example * len(table), return_inverse=True)
        summed = g.new_zeros(len(places), g.shape[-1]).index_add_(0, index.flatten(), g.flatten(0, 1))
        each = _row_norms(summed).double().square().sum(1)
        self._squares[1].append(each.new_zeros(self.batch_size).index_add_(0, places // len(table), each))

    def _add_tied_term(self, table: nn.Parameter, a: Tensor, head: Tensor) -> None:
        """A table that is also a weight: 2 <E, H> with E the lookups' and H the head's gradient.

        Row x_t of H is the sum over s of g_s[x_t] a_s (Ding et al., arXiv:2405.18194, "phantom clipping").
        """
        for ids, rows in self._lookups[table]:
            chosen = head.gather(2, ids[:, None, :].expand(-1, head.shape[1], -1))  # (B, s, t)
            self._add_product_sums([torch.bmm(a, precise(rows).transpose(1, 2)).mul_(2)], [chosen])


def _twice_and_once(twice: list[Tensor], once: list[Tensor], batch_size: int) -> Tensor:
    """(B,) float64: the sum of (B,) tensors, those of the first list counted twice."""
    parts = [factor * each.double() for factor, tensors in ((2, twice), (1, once)) for each in tensors]
    return torch.stack(parts).sum(0) if parts else torch.zeros(batch_size, dtype=torch.float64)


class _Weighted:
    """Rows (B, T, d) times coefficients (B,), in memory that is used again for the next tensor of the same size.

    Claiming fresh memory takes longer than the multiplication.
    """

    def __init__(self, coefficients: Tensor, cleaned: Callable[[Tensor], Tensor]):
        self._coefficients, self._cleaned = coefficients, cleaned
        self._key: tuple | None = None
        self._memory: dict[torch.Size, Tensor] = {}
        self._last: Tensor | None = None

    def holds(self, key: tuple) -> bool:
        return self._key == key

    def __call__(self, tensor: Tensor, key: tuple | None = None) -> Tensor:
        """The product; with a `key`, the last one is given again if it was made for that key."""
        if key is None or key != self._key:
            tensor = precise(self._cleaned(tensor))
            weights = self._coefficients.to(tensor.dtype)[:, None, None]
            self._last = torch.mul(tensor, weights, out=self._memory.get(tensor.shape))
            self._memory[tensor.shape], self._key = self._last, key
        assert self._last is not None
        return self._last


def _instantiated(a: Tensor, g: Tensor, crossed: bool) -> Iterator[Tensor]:
    """(n, p, d) gradients of a (B, T, d) and g (B, T, p), of as many examples at a time as one piece may hold.

    `crossed` lays them out as (n, d, p): products with few columns, as for an adapter's B, take longer than such with
    few rows.
    """
    most = max(1, _PIECE // (a.shape[2] * g.shape[2] * a.element_size()))
    n = -(-len(a) // -(-len(a) // most))  # as many pieces, of one size
    for some_a, some_g in zip(a.split(n), g.split(n), strict=True):
        if crossed:
            yield torch.bmm(some_a.mT, some_g).mT
        else:
            yield torch.bmm(some_g.mT, some_a)


def _as_it_lies(gradients: Tensor) -> Tensor:
    """(n, d, p) instead of (n, p, d) where that is the order in memory: to read against the order takes longer."""
    crossed = gradients.ndim == 3 and not gradients.is_contiguous() and gradients.mT.is_contiguous()
    return gradients.mT if crossed else gradients


def _row_norms(gradients: Tensor) -> Tensor:
    """(n, m) norms of parts of gradients (n, *shape), whose squares add up to that of the whole.

    The parts are rows, or several of them: 128 floats and more, because it takes long to add up many short ones. Short
    sums in float32 are exact enough, long ones are not.
    """
    of = _as_it_lies(gradients)
    width = of.shape[-1] if of.ndim > 1 else 1
    parts = of[0].numel() // width
    while width < 128 and parts % 2 == 0:
        width, parts = 2 * width, parts // 2
    return torch.linalg.vector_norm(of.reshape(len(of), parts, width), dim=2)


def _add_gram(blocks: list[Tensor], tensor: Tensor) -> None:
    """Adds the inner products of the positions of each example, for a tensor (B, T, d): a T x T matrix, in blocks.

    The matrix is symmetric, so blocks below the diagonal are left out where that is quicker: first the blocks above
    the diagonal, coarse to fine, (B 2^i, h, h) each; last those on the diagonal. `blocks` is empty at first.
    """
    T, x, first_time = tensor.shape[1], precise(tensor), not blocks
    halvings = 2 if T >= 256 and T % 4 == 0 else 1 if T >= 64 and T % 2 == 0 else 0
    for index in range(halvings + 1):
        if index < halvings:
            pairs = x.reshape(-1, 2, T >> (index + 1), x.shape[2])
            left, right = pairs[:, 0], pairs[:, 1].transpose(1, 2)
        else:
            left = x.reshape(-1, T >> halvings, x.shape[2])
            right = left.transpose(1, 2)
        if first_time:
            blocks.append(torch.bmm(left, right))
        else:
            blocks[index].baddbmm_(left, right)


def _add_product(sums: dict[nn.Parameter, Tensor], weight: nn.Parameter, left: Tensor, right: Tensor) -> None:
    if weight in sums:
        sums[weight].view(len(left), -1).addmm_(left, right)
    else:
        sums[weight] = (left @ right).view(weight.shape)


__all__ = ["SLACK", "Book", "precise"]
