"""The batches of `DPTrainer`: drawn by the plan's own sampler, from an index or a stream, and accepted once each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .privacy.budget import PrivacyPlan
from .privacy.noise import secret_coins
from .privacy.sampling import SinglePass, check_sampler, sampler_for
from .privacy.units import OneRowPerUnit
from .training_args import DPTrainingArguments


def count_units(dataset: Any, args: DPTrainingArguments) -> int:
    """The privacy units N of a data set: its persons, its rows, or what is declared for a stream.

    Raises:
        ValueError: data that cannot be sampled as `args.sampling` says.
    """
    if args.sampling == "single_pass":
        if getattr(dataset, "units", None) is not None:
            raise ValueError(
                "sampling='single_pass' takes every row once, so a person with several rows would be in several"
                " batches; use sampling='poisson'."
            )
        if args.num_examples is None and not hasattr(dataset, "__len__"):
            raise ValueError(
                f"num_examples=None for a train_dataset of type {type(dataset).__name__}, which has no length; declare"
                " its public number of rows."
            )
        return len(dataset) if args.num_examples is None else args.num_examples
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "fingerprint"):
        raise ValueError(
            f"train_dataset of type {type(dataset).__name__} cannot be sampled by index, and sampling={args.sampling!r}"
            " needs that: make a token store with hf_spectral_dp.token_store.build_token_store, or use"
            " sampling='single_pass'."
        )
    units = getattr(dataset, "units", None)
    return len(dataset) if units is None else len(OneRowPerUnit(units))


class BatchLoader:
    """One batch per step until all steps are charged: {"input_ids": (b, 1 + T)} of this process; b may be 0.

    Other columns of an index come along, row by row: "text_states" of a token store with captions. Of a stream they
    do for a model with text, and a row without any has zeros there: what one row shows says nothing of another.

    Formal guarantee: whatever calls the loop, a batch that `accept` lets through was drawn by the sampler that
    `plan.epsilon` is proven for, is the latest that it drew, and was not let through before. A batch of a single pass
    is given only for a charge that its place in the pass belongs to, so no pass is begun again in its middle.

    Args:
        dataset: data that `count_units` counted.
        plan: the plan for that many units.
        rank, world_size: of this process.
        charged: gives the number of charges so far.
        text_shape: (K, width) of the text states that the model takes; None for a model without.

    Raises:
        ValueError: a sampling without a proof for several processes, or a stream that cannot be read so often.
    """

    def __init__(
        self, dataset: Any, plan: PrivacyPlan, rank: int, world_size: int, charged: Callable[[], int],
        text_shape: tuple[int, int] | None = None,
    ):  # fmt: skip
        self.sampler = sampler_for(plan, rank, world_size)
        if plan.sampling == "single_pass" and isinstance(dataset, Iterator) and plan.steps > plan.steps_per_pass:
            raise ValueError(
                f"train_dataset is a {type(dataset).__name__}, which can be read once, but max_steps={plan.steps} is"
                f" more than one pass of {plan.steps_per_pass}; give an iterable that starts anew, or take fewer steps."
            )
        units = getattr(dataset, "units", None)
        self._units = None if units is None else OneRowPerUnit(units)
        self._dataset, self._plan, self._place, self._charged = dataset, plan, (rank, world_size), charged
        self._text_shape = text_shape
        self._drawn: Any = None  # the latest batch, until it is accepted

    def check(self, loader: Any) -> None:
        """Refuses another loader than this one, and another sampler than the plan's, before anything is charged.

        Raises:
            ValueError: the accountant has no proof for the batches.
        """
        check_sampler(self.sampler if loader is self else loader, self._plan, *self._place)

    def accept(self, batch: Any) -> None:
        """Lets a batch through, once.

        Raises:
            ValueError: the batch is not the latest that was drawn, or was used already.
        """
        if batch is None or batch is not self._drawn:
            raise ValueError(
                f"this batch was not drawn by the {type(self.sampler).__name__} of the plan, and epsilon holds for its"
                " batches only, each used once; call train() and leave the loader as it is."
            )
        self._drawn = None

    def __len__(self) -> int:
        return self._plan.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batches = self._passes(self.sampler) if isinstance(self.sampler, SinglePass) else self._draws(self.sampler)
        # Not simply `steps` times: after a crash some charges are spent on steps that were lost.
        while self._charged() < self._plan.steps:
            self._drawn = next(batches)
            yield self._drawn

    def _draws(self, sampler: Any) -> Iterator[dict[str, Tensor]]:
        while True:
            chosen = sampler.next_batch()
            rows = chosen if self._units is None else self._units.draw(chosen)
            with secret_coins():  # a data set that augments at random draws them, row after row
                batch = self._dataset[rows]
            if any(len(values) != len(chosen) for values in batch.values()):
                raise ValueError(
                    "train_dataset gave more or fewer rows than it was asked for, and a unit may count once in a step;"
                    " give one row for every index (several views of an image: build_token_store(..., views=...))."
                )
            yield batch

    def _passes(self, sampler: SinglePass) -> Iterator[dict[str, Tensor]]:
        while True:
            batches = sampler.batches(self._dataset)
            for number in range(self._plan.steps_per_pass):
                if self._charged() % self._plan.steps_per_pass != number:
                    raise RuntimeError("a pass was left before its end, so a row would be used twice; start a new run.")
                with secret_coins():
                    rows = next(batches)
                yield self._stacked(rows)

    def _stacked(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            return {"input_ids": torch.zeros((0, 1)).long()}
        batch = {"input_ids": torch.stack([torch.as_tensor(row["input_ids"]) for row in rows]).long()}
        if self._text_shape is not None:  # decided by the model: a row must not decide what the others show
            none = torch.zeros(self._text_shape)
            texts = [torch.as_tensor(row.get("text_states", none)).float() for row in rows]
            batch["text_states"] = torch.stack(texts)
        return batch


__all__ = ["BatchLoader", "count_units"]
