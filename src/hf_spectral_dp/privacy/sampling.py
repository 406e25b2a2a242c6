"""How batches are formed: each way that the accountant has a proof for, and no other.

`sampler_for` makes the one sampler that a plan is accounted for, and `check_sampler` refuses every other one. What is
called a row here is a unit: a row of the data, or a person with several of them (`units.py`).
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from .budget import PrivacyPlan
from .noise import system_generator


class PoissonSampler:
    """Batches that every row enters independently with probability `sampling_rate`.

    A batch size is drawn from Binomial(n, q), then a uniform subset of that size without replacement: O(batch) work
    for any number of rows, and exactly Poisson sampling, not an approximation of it (see below).

    With several ranks, each owns the rows congruent to its rank modulo `world_size`; the ranks draw without a word to
    each other, and the union of their batches is the batch.

    Formal guarantee:
        *One rank.* For every subset S of the n rows, P(batch = S) = Binomial(n, q)(|S|) / C(n, |S|)
        = q^|S| (1 - q)^(n - |S|), which is the law of n independent Bernoulli(q) trials.
        *Union over ranks.* The residues modulo world_size partition the rows, and generators with independent keys
        make the ranks independent, so the law of the union is the product of the above over ranks: again
        q^|S| (1 - q)^(N - |S|) on all N rows.
        Unit: one row. Adjacency: add or remove one row, which leaves the trials of the other rows as they are (it may
        move them to other ranks, which their law does not depend on). Assumptions: sampling_rate is a public constant;
        the batch and its size stay secret; the generators are the default ones; all ranks agree on num_examples,
        sampling_rate and world_size. "Exactly" means up to float64 rounding in numpy's binomial sampler.
        This is the sampling that the accountant assumes. Shuffling is not (Chua et al., ICML 2024).

    Args:
        num_examples: N >= 1, rows in the data set over all ranks.
        sampling_rate: q in (0, 1]. Nothing is rounded to a batch size, so 1e-7 is as exact as 0.1.
        rank: this process, in [0, world_size).
        world_size: number of processes.
        generator: for tests only. Left out, it is a `system_generator()` of this rank's own; a seeded one, or one that
            two ranks share, voids the guarantee.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_examples: int,
        sampling_rate: float,
        rank: int = 0,
        world_size: int = 1,
        generator: np.random.Generator | None = None,
    ):
        if num_examples < 1:
            raise ValueError(f"num_examples={num_examples} must be at least 1; the data set is empty.")
        if not 0 < sampling_rate <= 1:
            raise ValueError(
                f"sampling_rate={sampling_rate} must be in (0, 1]; it is the probability of one row, the expected batch"
                " size divided by the number of rows."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be in [0, world_size={world_size}).")
        self.num_examples = num_examples
        self.sampling_rate = float(sampling_rate)
        self.rank = rank
        self.world_size = world_size
        self._owned = len(range(rank, num_examples, world_size))
        self._generator = system_generator() if generator is None else generator

    def next_batch(self) -> np.ndarray:
        """The next batch of this rank: distinct row indices in [0, num_examples), int64, sorted, maybe none at all.

        An empty batch is a batch: it takes its step, its noise and its charge like any other.
        """
        size = self._size()
        # Without shuffling, numpy takes Floyd's method below 5 % of the rows and part of a permutation above.
        chosen = self._generator.choice(self._owned, size, replace=False, shuffle=False)
        return np.sort(chosen.astype(np.int64)) * self.world_size + self.rank

    def _size(self) -> int:
        return int(self._generator.binomial(self._owned, self.sampling_rate))


class TruncatedPoissonSampler(PoissonSampler):
    """Poisson batches of at most `max_batch_size` rows: of a larger draw, a uniform subset of that size is kept.

    For hardware that runs batches of a fixed largest size. A size is drawn from Binomial(N, q), cut to max_batch_size,
    and a uniform subset of that size is taken; a uniform subset of a uniform subset is one, so nothing else is needed.

    Formal guarantee:
        The law of the batch is that of `dp_accounting.TruncatedSubsampledGaussianDpEvent` (Ganesh, arXiv:2508.15089).
        Unit: one row (or person). Adjacency: zero-out-one, that is D' is D with one row that contributes zero, at its
        place. N and max_batch_size B are public. Why the accountant's two terms are right for it: let S be the other
        rows that were drawn. *If |S| < B*, nothing is cut: the row is in with probability q, and moves the sum by at
        most C: the Poisson-subsampled Gaussian. *If |S| >= B*, the batch is a uniform B-subset U of the others, in
        which the row replaces a uniform member with some probability r (as D and D' draw alike, r is the same for
        both): two mixtures that share U, and whose other parts lie within 2 C of it, so the replace-one Gaussian of
        sensitivity 2 C at rate r dominates. Given B <= |S|, U does not depend on |S|, so the mean of r counts.
        Assumptions: as for `PoissonSampler`, and one process: a batch must be cut as a whole.

    Args:
        max_batch_size: B >= 1.
        num_examples, sampling_rate, generator: as for `PoissonSampler`.
    """

    def __init__(
        self,
        num_examples: int,
        sampling_rate: float,
        max_batch_size: int,
        generator: np.random.Generator | None = None,
    ):
        super().__init__(num_examples, sampling_rate, generator=generator)
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size={max_batch_size} must be at least 1.")
        self.max_batch_size = max_batch_size

    def _size(self) -> int:
        return min(super()._size(), self.max_batch_size)


class SinglePass:
    """Consecutive batches of a stream that cannot be indexed: in each pass, every place is in exactly one batch.

    Formal guarantee:
        Batch j of a pass holds the places [j b, (j + 1) b) below N, whatever the rows are. Two streams that differ at
        one place (zero-out-one: a null row instead of the row) give the same batches but one, so one clipped sum per
        pass moves, by at most C. The event follows by parallel composition (see `PrivacyPlan`); there is no secret in
        the order, and nothing is amplified. Unit: one place of the stream. Assumptions: N, b and the number of passes
        are public; the stream gives the same rows at the same places in every pass, and what stands at one place does
        not decide where other rows stand: a reader that drops broken images breaks this, one that yields None for them
        keeps it. Rows beyond N are not used; places beyond the end of the stream hold null rows.

    Args:
        num_examples: N >= 1, places of the stream, declared in public.
        batch_size: b >= 1, places per batch; the last batch of a pass may have fewer.
    """

    def __init__(self, num_examples: int, batch_size: int):
        if num_examples < 1 or batch_size < 1:
            raise ValueError(f"num_examples={num_examples} and batch_size={batch_size} must be at least 1.")
        self.num_examples = num_examples
        self.batch_size = batch_size

    def batches(self, stream: Iterable[Any]) -> Iterator[list[Any]]:
        """One pass: ceil(N / b) batches, each read when it is asked for. A null row is None and is left out."""
        rows = iter(stream)
        for first in range(0, self.num_examples, self.batch_size):
            places = min(self.batch_size, self.num_examples - first)
            yield [row for row in islice(rows, places) if row is not None]


Sampler = PoissonSampler | TruncatedPoissonSampler | SinglePass


def sampler_for(plan: PrivacyPlan, rank: int = 0, world_size: int = 1) -> Sampler:
    """The sampler that the plan is accounted for.

    Raises:
        ValueError: a sampling that has no proof for several processes.
    """
    if plan.sampling == "poisson":
        return PoissonSampler(plan.num_examples, plan.sampling_rate, rank, world_size)
    if world_size > 1:
        raise ValueError(
            f"sampling={plan.sampling!r} is proven for one process, not world_size={world_size}: batches are cut as a"
            " whole, and a stream is read once. Use sampling='poisson', or one process."
        )
    if plan.max_batch_size is not None:
        return TruncatedPoissonSampler(plan.num_examples, plan.sampling_rate, plan.max_batch_size)
    return SinglePass(plan.num_examples, round(plan.expected_batch_size))


def check_sampler(sampler: Any, plan: PrivacyPlan, rank: int = 0, world_size: int = 1) -> None:
    """Refuses a sampler that the plan's epsilon is not proven for: another type, a subclass, other constants, a seed.

    Raises:
        ValueError: the sampler is not what `sampler_for` makes.
    """
    planned = sampler_for(plan, rank, world_size)

    def constants(of: Any) -> dict[str, Any]:
        return {name: type(value) if name == "_generator" else value for name, value in vars(of).items()}

    if type(sampler) is not type(planned) or constants(sampler) != constants(planned):
        raise ValueError(
            f"a {type(sampler).__name__} draws the batches, and the accountant has no proof for it: epsilon holds for"
            f" sampling={plan.sampling!r}, that is for the {type(planned).__name__} of the plan. Leave the loader of"
            " DPTrainer as it is."
        )


__all__ = ["PoissonSampler", "SinglePass", "TruncatedPoissonSampler", "check_sampler", "sampler_for"]
