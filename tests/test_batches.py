"""The batches of DPTrainer: plan, sampler and card agree, persons are units, a stream is used once per pass."""

import collections
import dataclasses
import random

import numpy as np
import pytest
import torch
from card_reports import PUBLISHED
from conftest import tiny_model
from randomgen import AESCounter
from torch.utils.data import DataLoader, IterableDataset
from training_parts import Rows, arguments

from hf_spectral_dp import DPTrainer, PrivacyCard
from hf_spectral_dp.batches import BatchLoader
from hf_spectral_dp.privacy.budget import PrivacyPlan
from hf_spectral_dp.privacy.ledger import read_ledger
from hf_spectral_dp.privacy.sampling import PoissonSampler, SinglePass, TruncatedPoissonSampler
from hf_spectral_dp.privacy.units import OneRowPerUnit
from hf_spectral_dp.trainer import LEDGER


class Stream(IterableDataset):
    """Rows of `Rows` in order, without a length or an index; counts how often each was given."""

    def __init__(self, count: int = 60, null: tuple[int, ...] = ()):
        self.rows, self.null, self.given = Rows(count).rows, null, collections.Counter()

    def __iter__(self):
        for place, row in enumerate(self.rows):
            self.given[place] += 1
            yield None if place in self.null else {"input_ids": row}


class People(Rows):
    """The last person owns all rows from 24 on, the others four each."""

    fingerprint = "people"
    unit = "one person"

    def __init__(self, persons: int, count: int = 36):
        super().__init__(count)
        units = np.minimum(np.arange(count) // 4, 6)
        self.rows, self.units = self.rows[units < persons], units[units < persons]


def sums_of(trainer: DPTrainer) -> list[torch.Tensor]:
    """The clipped sums of a run, each as one vector, before any noise."""
    sums = []
    trainer._noise.add_ = lambda tensors: sums.append(torch.cat([t.flatten().double() for t in tensors]))
    trainer.train()
    return sums


class Augmented(Rows):
    """Draws coins of all three libraries for every row, as random augmentation does; keeps those of the last batch."""

    fingerprint = "augmented"

    def __getitem__(self, indices):
        rows = [self.rows[index] for index in torch.as_tensor(indices).tolist()]
        coins = [(float(torch.rand(())), np.random.rand(), random.random()) for _ in rows]
        self.coins = torch.tensor(coins).reshape(-1, 3)
        return {"input_ids": torch.stack(rows) if rows else self.rows[:0]}


@pytest.mark.parametrize("sampling", ["poisson", "single_pass"])
def test_what_a_data_set_draws_is_secret(sampling):
    """Under one public seed two runs augment otherwise, so that one row less does not move the coins of all others."""
    plan = PrivacyPlan(
        num_examples=20, sampling_rate=0.5, steps=2, noise_multiplier=1.0, target_epsilon=8.0, delta=1e-3,
        sampling=sampling,
    )  # fmt: skip
    coins = []
    for _ in range(2):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        data, drawn = Augmented(20), []
        if sampling == "single_pass":
            source = ((drawn.append((float(torch.rand(())), np.random.rand(), random.random())), {"input_ids": row})[1]
                      for row in data.rows)  # fmt: skip
            next(iter(BatchLoader(source, dataclasses.replace(plan, steps=1), 0, 1, lambda: 0)))
            coins.append(torch.tensor(drawn))
        else:
            next(iter(BatchLoader(data, plan, 0, 1, lambda: 0)))
            coins.append(data.coins)
        assert float(torch.rand(())) == float(torch.rand(1, generator=torch.Generator().manual_seed(3)))
    count = min(map(len, coins))
    assert count > 0 and (coins[0][:count] != coins[1][:count]).all()


# -- no sampler without a proof --------------------------------------------------------------------------------------


class Shuffled(DPTrainer):
    """What a user might do in good faith."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset.rows, batch_size=12, shuffle=True)


class TwicePoisson(PoissonSampler):
    def next_batch(self):
        return np.sort(np.concatenate([super().next_batch()] * 2))


def redirected() -> PoissonSampler:
    sampler = PoissonSampler(60, 0.2)
    sampler.next_batch = lambda: np.arange(12)
    return sampler


def test_a_shuffled_loader_is_refused_before_anything_is_spent(tmp_path):
    trainer = Shuffled(tiny_model(), arguments(tmp_path), Rows())
    with pytest.raises(ValueError, match="a DataLoader draws the batches, and the accountant has no proof for it"):
        trainer.train()
    assert not (tmp_path / LEDGER).exists()


@pytest.mark.parametrize(
    "sampler",
    [
        TwicePoisson(60, 0.2),  # a subclass may do anything
        redirected(),
        PoissonSampler(60, 0.3),  # another rate
        PoissonSampler(61, 0.2),
        PoissonSampler(60, 0.2, rank=1, world_size=2),
        PoissonSampler(60, 0.2, generator=np.random.default_rng(42)),  # batches that anybody can draw again
        PoissonSampler(60, 0.2, generator=np.random.Generator(AESCounter(key=1))),
        TruncatedPoissonSampler(60, 0.2, 60),
        SinglePass(60, 12),
        DataLoader([1]),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_any_other_sampler_is_refused_before_anything_is_spent(tmp_path, sampler):
    trainer = DPTrainer(tiny_model(), arguments(tmp_path), Rows())
    trainer._batches.sampler = sampler
    with pytest.raises(ValueError, match="the accountant has no proof for it: epsilon holds for sampling='poisson'"):
        trainer.train()
    assert not (tmp_path / LEDGER).exists()


def test_a_batch_that_the_sampler_did_not_draw_is_not_charged(tmp_path):
    trainer = DPTrainer(tiny_model(), arguments(tmp_path), Rows())
    step, seen = trainer.training_step, []

    def again(model, inputs, num_items_in_batch=None):
        loss = step(model, inputs, num_items_in_batch)
        for batch in (inputs, dict(inputs), {"input_ids": trainer.train_dataset.rows}):
            with pytest.raises(ValueError, match="was not drawn by the PoissonSampler"):
                step(model, batch)
            seen.append(batch)
        return loss

    trainer.training_step = again
    trainer.train()
    assert read_ledger(tmp_path / LEDGER)["charged"] == 6 and len(seen) == 18


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampling": "shuffle"}, "sampling='shuffle' has no proof; choose one of poisson"),
        ({"sampling": "truncated_poisson"}, "max_batch_size=None with sampling='truncated_poisson'"),
        ({"max_batch_size": 20}, "max_batch_size=20 with sampling='poisson'"),
        ({"num_examples": 60}, "num_examples=60 with sampling='poisson'"),
        ({"sampling": "single_pass", "num_examples": 0}, "num_examples=0"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, dataset, message",
    [
        ({"sampling": "truncated_poisson", "max_batch_size": 11}, Rows(), "max_batch_size=11 must be at least .* 12"),
        ({"sampling": "single_pass", "expected_batch_size": 7.5}, Rows(), "expected_batch_size=7.5 must be a whole"),
        ({"sampling": "single_pass"}, Stream(), "num_examples=None for a train_dataset of type Stream"),
        ({"sampling": "single_pass", "num_examples": 60}, iter(Stream()), "can be read once, but max_steps=6 is more"),
        ({"sampling": "single_pass"}, People(7), "a person with several rows would be in several batches"),
        ({}, Stream(), "cannot be sampled by index, and sampling='poisson' needs that.*single_pass"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_any_row_is_read(tmp_path, changes, dataset, message):
    changes = {"expected_batch_size": 6 if isinstance(dataset, People) else 12, **changes}
    with pytest.raises(ValueError, match=message):
        DPTrainer(tiny_model(), arguments(tmp_path, **changes), dataset)
    assert not any(getattr(dataset, "given", {}).values())


# -- each sampling from the arguments to the card --------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, dataset, adjacency, event",
    [
        ({}, Rows(), "add-or-remove-one", "PoissonSampledDpEvent"),
        (
            {"sampling": "truncated_poisson", "max_batch_size": 22},
            Rows(),
            "zero-out-one",
            "TruncatedSubsampledGaussianDpEvent",
        ),
        ({"sampling": "single_pass", "num_examples": 60}, Stream(), "zero-out-one", "GaussianDpEvent"),
    ],
    ids=["poisson", "truncated_poisson", "single_pass"],
)
def test_plan_sampler_and_card_agree(tmp_path, changes, dataset, adjacency, event):
    # Much noise: the accountant answers sooner.
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, target_epsilon=1.0, logging_steps=6, **changes), dataset)
    trainer.train()
    report = trainer.privacy_report()
    assert report["adjacency"]["relation"] == trainer.plan.adjacency == adjacency
    assert report["accounting"]["event"]["event"]["type"] == event
    assert report["mechanism"]["charged_steps"] == 6 and 0.99 < report["claim"]["epsilon"] <= 1
    assert PrivacyCard({**report, **PUBLISHED}).verify() == []


def test_truncated_batches_reach_the_model(tmp_path):
    args = arguments(
        tmp_path, target_epsilon=0.5, sampling="truncated_poisson", max_batch_size=13, max_steps=20, logging_steps=20
    )
    trainer = DPTrainer(tiny_model(), args, Rows())
    sizes, step = [], trainer.training_step
    trainer.training_step = lambda model, inputs, n: sizes.append(len(inputs["input_ids"])) or step(model, inputs, n)
    trainer.train()
    assert max(sizes) == 13 and len(set(sizes)) > 3


# -- a stream --------------------------------------------------------------------------------------------------------


def test_every_row_is_used_once_in_every_pass(tmp_path):
    """Two passes of five batches; epsilon is that of two Gaussians, whatever the number of batches."""
    stream = Stream()
    args = arguments(tmp_path, sampling="single_pass", num_examples=60, max_steps=-1, num_train_epochs=2)
    trainer = DPTrainer(tiny_model(), args, stream)
    used = []
    trainer._apart = True  # nothing is looked at beforehand
    losses = trainer._losses
    trainer._losses = lambda model, rows: used.extend(map(tuple, rows["input_ids"].tolist())) or losses(model, rows)
    trainer.train()
    assert trainer.plan.steps == 10 and trainer.plan.steps_per_pass == 5
    assert used == [tuple(row) for row in stream.rows.tolist()] * 2
    assert trainer.privacy_report()["accounting"]["event"]["count"] == 2


def test_a_null_row_moves_one_sum_per_pass_by_at_most_the_clipping_norm(tmp_path):
    """The zero-out neighbour: other batches keep their rows. If null rows took no place, all later sums would move."""
    place, sums = 14, []
    for run, null in enumerate([(), (place,)]):
        args = arguments(tmp_path / str(run), sampling="single_pass", num_examples=60, max_steps=10, learning_rate=0.0)
        trainer = DPTrainer(tiny_model(), args, Stream(null=null))
        sums.append(torch.stack(sums_of(trainer)))
    moved = (sums[0] - sums[1]).norm(dim=1)
    assert moved.nonzero().flatten().tolist() == [1, 6]  # place 14 is in the second batch of twelve
    assert float(moved.max()) <= trainer._clipper.sensitivity


@pytest.mark.parametrize("without", [0, 2])
def test_a_row_of_a_stream_without_text_takes_no_text_from_the_others(without):
    """Zero-out neighbours: the row at one place has no text. All other rows of its batch keep theirs."""
    rows = [{"input_ids": torch.full((3,), index), "text_states": torch.ones(2, 4)} for index in range(6)]
    del rows[without]["text_states"]
    plan = PrivacyPlan(
        num_examples=6, sampling_rate=0.5, steps=2, noise_multiplier=1.0, target_epsilon=8.0, delta=1e-2,
        sampling="single_pass",
    )  # fmt: skip
    for shape in ((2, 4), None):
        loader = BatchLoader(rows, plan, 0, 1, lambda: 0, shape)
        batch = next(iter(loader))
        assert batch["input_ids"].tolist() == [[index] * 3 for index in range(3)]
        if shape is None:  # a model without text
            assert batch.keys() == {"input_ids"}
        else:
            assert [bool(states.all()) for states in batch["text_states"]] == [index != without for index in range(3)]


def test_a_stream_of_another_length_than_declared(tmp_path):
    """What lies beyond the declared number is not used; what is missing are null rows. The steps are the same."""
    for declared, length in ((40, 60), (70, 60)):
        stream = Stream(length)
        args = arguments(
            tmp_path / str(declared), sampling="single_pass", num_examples=declared, max_steps=-1, num_train_epochs=1,
            expected_batch_size=10,
        )  # fmt: skip
        trainer = DPTrainer(tiny_model(), args, stream)
        trainer.train()
        assert sum(stream.given.values()) == min(declared, length)
        assert read_ledger(tmp_path / str(declared) / LEDGER)["charged"] == declared // 10


def test_a_single_pass_is_not_resumed(tmp_path):
    args = {"sampling": "single_pass", "num_examples": 60, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    DPTrainer(tiny_model(), arguments(tmp_path, **args), Stream()).train()
    stream = Stream()
    with pytest.raises(ValueError, match="cannot be resumed.*must not be used twice"):
        DPTrainer(tiny_model(), arguments(tmp_path, **args), stream).train(resume_from_checkpoint=True)
    assert not stream.given


def test_a_pass_that_is_left_and_begun_again_uses_nothing(tmp_path):
    """However it comes about: a batch is only given for the charge that its place in the pass belongs to."""
    stream = Stream()
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, sampling="single_pass", num_examples=60, max_steps=5), stream)
    trainer._charged = 2
    with pytest.raises(RuntimeError, match="a row would be used twice"):
        next(iter(trainer.get_train_dataloader()))


# -- persons ---------------------------------------------------------------------------------------------------------


def test_a_person_is_the_unit_of_plan_report_and_delta(tmp_path):
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, target_epsilon=1.0, expected_batch_size=3), People(7))
    trainer.train()
    report = trainer.privacy_report()
    assert report["adjacency"]["num_units"] == 7 and report["sampling"]["rate"] == 3 / 7
    assert report["unit"]["definition"] == "one person" and report["unit"]["level"] == "person"
    assert report["claim"]["delta"] == min(0.1 / 7, 7**-1.1)


def test_a_person_never_has_two_rows_in_a_batch(tmp_path):
    people = People(7)
    owner = {tuple(row): unit for row, unit in zip(people.rows.tolist(), people.units, strict=True)}
    trainer = DPTrainer(tiny_model(), arguments(tmp_path, target_epsilon=1.0, expected_batch_size=6), people)
    trainer._charge = lambda: None
    batches = iter(trainer.get_train_dataloader())
    for _ in range(100):
        owners = [owner[tuple(row)] for row in next(batches)["input_ids"].tolist()]
        assert len(owners) == len(set(owners))


def test_a_person_with_many_rows_moves_the_clipped_sum_by_at_most_the_clipping_norm(tmp_path):
    """The very code that trains, everybody sampled, with and without the person who owns twelve rows."""
    sums = []
    for persons in (6, 7):
        people = People(persons)
        args = arguments(
            tmp_path / str(persons), target_epsilon=1.0, expected_batch_size=None, sampling_rate=1.0, max_steps=1,
            clipping_norm=0.05,
        )  # fmt: skip
        trainer = DPTrainer(tiny_model(), args, people)
        # One key for both runs: the first six persons show the same rows.
        trainer._batches._units = OneRowPerUnit(people.units, generator=np.random.Generator(AESCounter(key=1)))
        sums += sums_of(trainer)
    moved = float((sums[1] - sums[0]).norm())
    assert 0.04 < moved <= trainer._clipper.sensitivity


def test_a_data_set_that_gives_more_rows_than_asked_for_is_refused(tmp_path):
    """Each of them would be clipped by itself, and a unit would count several times."""

    class Doubled(Rows):
        def __getitem__(self, indices):
            return {"input_ids": super().__getitem__(indices)["input_ids"].repeat_interleave(2, 0)}

    trainer = DPTrainer(tiny_model(), arguments(tmp_path), Doubled())
    with pytest.raises(ValueError, match="more or fewer rows than it was asked for.*views"):
        trainer.train()
    assert trainer.epsilon_spent == 0
