"""Poisson sampling of rows: the randomness that amplifies privacy, in time proportional to the batch."""

import numpy as np

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
        size = self._generator.binomial(self._owned, self.sampling_rate)
        # Without shuffling, numpy takes Floyd's method below 5 % of the rows and part of a permutation above.
        chosen = self._generator.choice(self._owned, size, replace=False, shuffle=False)
        return np.sort(chosen.astype(np.int64)) * self.world_size + self.rank
