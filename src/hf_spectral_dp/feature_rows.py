"""What a critic is trained on, and how: what a public network sees of the private images.

As the generator shows them (`FeatureRows`), where classes are to be told apart in what it draws; as they are
(`ImageFeatureRows`), where what it draws is to look like them. Apart from the critics, so that who only draws images
does not wait for the accountants.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .image_rows import batches_of, examples_of, kept_of
from .mean_critic import MeanCritic
from .modeling_spectral import SpectralTokenizerForCausalLM
from .privacy.units import FirstRows
from .super_resolution import upscale_to
from .token_store import TokenStore
from .training_args import DPTrainingArguments

Features = Callable[[Tensor], Tensor]
"""Features (B, D), float32 on the CPU, of tokens (B, T)."""


def features_of(
    model: SpectralTokenizerForCausalLM, super_resolution: Any, extractor: Callable[[Tensor], Tensor]
) -> Features:
    """Features of tokens: decoded, brought to the full size as the pipeline does, and seen by a public extractor.

    Args:
        model: decodes.
        super_resolution: any public backend of `super_resolution.upscaler`; not used where decoded images have the full
            size.
        extractor: such as `ClassCritic.features`.
    """

    @torch.no_grad()
    def features(tokens: Tensor) -> Tensor:
        images = model.decode(tokens.to(model.device))
        return extractor(upscale_to(model.config.image_size, super_resolution, images)).float().cpu()

    return features


def features_of_rows(store: TokenStore, features: Features) -> tuple[Tensor, Tensor]:
    """First tokens (N,) and features (N, D) of the rows of a store; of an image with several views, those of one."""
    first, seen = [], []
    for indices in tqdm(torch.arange(len(store)).split(500), desc="features", unit="500 rows"):
        rows = store[indices]["input_ids"]
        first.append(rows[:, 0])
        seen.append(features(rows[:, 1:]))
    return torch.cat(first), torch.cat(seen)


class RowsInMemory:
    """Private rows (N, ...) in memory, as `DPTrainer` reads them; one row is one privacy unit."""

    def __init__(self, rows: Tensor):
        self.rows = rows
        self.fingerprint = hashlib.sha256(rows.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Any) -> dict[str, Tensor]:
        return {"input_ids": self.rows[torch.as_tensor(indices, dtype=torch.long)]}


class FeatureRows(RowsInMemory):
    """Rows (N, 1 + D) of private images in memory, class and features, as `DPTrainer` and `ClassCritic` read them.

    Every row is a function of one image and of coins of its own, so a unit of the store is a unit here. Rows are as
    secret as the images.

    Args:
        store: token rows of the private images.
        model: their generator, which says which class a row has.
        features: of tokens.
    """

    def __init__(self, store: TokenStore, model: SpectralTokenizerForCausalLM, features: Features):
        first, seen = features_of_rows(store, features)
        super().__init__(torch.cat([model.labels_of(first)[:, None].float(), seen], 1))
        self.units, self.unit = store.units, store.unit


class ImageFeatureRows(RowsInMemory):
    """Rows (N, D) of the private images themselves, their features, as `DPTrainer` and `MeanCritic` read them.

    Every row is a function of one image, and the images are those of `store`, so a unit of the store is a unit here.
    Rows are as secret as the images. That the data still are what the store was made of is assumed: their number, and
    the persons, are compared, the images are not.

    Args:
        store: what `build_token_store` made of the same data with the same columns.
        dataset, image_processor, image_column, unit_column, max_rows_per_unit: as given to it.
        extractor: features (B, D) of images (B, C, S, S) in [-1, 1]; public.

    Raises:
        ValueError: the data have other rows than the store; nothing was spent.
    """

    def __init__(
        self, store: TokenStore, dataset: Any, image_processor: Any, extractor: Callable[[Tensor], Tensor], *,
        image_column: str = "image", unit_column: str | None = None, max_rows_per_unit: int | None = None,
    ):  # fmt: skip
        units = None if unit_column is None else FirstRows(unit_column, max_rows_per_unit)
        examples = examples_of(dataset, (image_column, None, None, unit_column))
        parts = []
        for batch in tqdm(batches_of(examples, 256), desc="features", unit="256 images"):
            pixels, kept, _ = kept_of(batch, image_processor, units)
            if pixels is not None and kept:
                parts.append(extractor(pixels).float().cpu())
        rows = torch.cat(parts) if parts else torch.empty(0, 1)
        found = [] if units is None else units.units
        known: Any = [] if store.units is None else store.units
        if len(rows) != len(store) or not np.array_equal(found, known):
            raise ValueError(
                f"the data give other rows than {str(store.folder)!r} holds; name the source and the columns that the"
                " store was made of, or make it again."
            )
        super().__init__(rows)
        self.units, self.unit = store.units, store.unit


def critic_arguments(
    output_dir: str, target_epsilon: float, target_delta: float | None, **fields: Any
) -> DPTrainingArguments:
    """How `DPTrainer` trains a critic: full batches, so that few noisy sums are enough, at a large constant rate.

    Steps and rate did best on public photos, whose 200 classes in alphabetical order were put into ten groups, among 1,
    10, 20 and 40 steps and rates of 2.5 to 40: 20 steps at a rate of 20; half the rate where the noise is large, below
    an epsilon of 1, and twice the steps where it is small, above 2.

    Args:
        target_epsilon: of the critic's run, and of earlier ones if `fields` names their ledgers.
        fields: of `DPTrainingArguments`, instead of or beside those here.
    """
    recipe = {
        "sampling_rate": 1.0, "max_steps": 40 if target_epsilon > 2 else 20, "micro_batch_size": 5000, "optim": "sgd",
        "optim_args": "momentum=0.9", "learning_rate": 20.0 if target_epsilon >= 1 else 10.0,
        "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    return DPTrainingArguments(
        output_dir=output_dir, target_epsilon=target_epsilon, target_delta=target_delta, **{**recipe, **fields}
    )


def mean_arguments(
    output_dir: str, target_epsilon: float, target_delta: float | None, **fields: Any
) -> DPTrainingArguments:
    """How `DPTrainer` trains a `MeanCritic`: one full batch, one step at a rate of 1. Arguments as above."""
    fields = {"max_steps": 1, "optim_args": None, "learning_rate": 1.0} | fields
    return critic_arguments(output_dir, target_epsilon, target_delta, **fields)


def draw_choices(draw: Callable[[int], Tensor], critic: MeanCritic, attempts: int, count: int = 64) -> Tensor:
    """What `MeanCritic.fit` looks at: features (count, attempts, D) of drawn images.

    Args:
        draw: that many full-size images (n, C, S, S) in [-1, 1]; with classes, of the same classes at every call.
        attempts: images of each choice, as many as the pipeline will have.
        count: choices. With 64 of eight images what is kept is as near as with 93; with 32 it is not.
    """
    sets = []
    for _ in tqdm(range(attempts), desc="learning to choose", unit="attempt"):
        sets.append(torch.cat([critic.features(some.to(critic.device)).cpu() for some in draw(count).split(100)]))
    return torch.stack(sets, 1)


__all__ = [
    "FeatureRows",
    "Features",
    "ImageFeatureRows",
    "RowsInMemory",
    "critic_arguments",
    "draw_choices",
    "features_of",
    "features_of_rows",
    "mean_arguments",
]
