"""FeatureRows: what a critic sees of private images, and whose it is."""

import pytest
import torch
from conftest import tiny_model

from hf_spectral_dp.feature_rows import FeatureRows, ImageFeatureRows, features_of
from hf_spectral_dp.image_processing_spectral import SpectralImageProcessor
from hf_spectral_dp.token_store import build_token_store


def test_feature_rows_see_what_the_generator_would_show(tmp_path):
    """Labels, units and features of a store; the features of decoded tokens, not of the images themselves."""
    model, processor = tiny_model().eval(), SpectralImageProcessor(image_size=16, num_channels=1)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (16, 16), generator=generator, dtype=torch.uint8).numpy() for _ in range(7)]
    listed = [
        {"image": image, "label": None if index == 3 else index % 3, "who": f"p{index // 2}"}
        for index, image in enumerate(images)
    ]
    store = build_token_store(
        iter(listed), model, processor, tmp_path / "store", label_column="label", unit_column="who", max_rows_per_unit=2
    )
    seen = []

    def extractor(shown: torch.Tensor) -> torch.Tensor:
        seen.append(shown)
        return shown.flatten(1)[:, :5]

    rows = FeatureRows(store, model, features_of(model, None, extractor))
    assert len(rows) == 7 and rows.units.tolist() == [0, 0, 1, 1, 2, 2, 3] and "who" in rows.unit
    assert rows[torch.arange(7)]["input_ids"][:, 0].tolist() == [0, 1, 2, -1, 1, 2, 0]
    tokens = store[torch.arange(7)]["input_ids"][:, 1:]
    assert torch.equal(torch.cat(seen), model.decode(tokens))
    assert torch.equal(rows[[2, 5]]["input_ids"][:, 1:], model.decode(tokens[[2, 5]]).flatten(1)[:, :5])
    assert rows.fingerprint != FeatureRows(store, model, features_of(model, None, lambda x: -extractor(x))).fingerprint


def listed_images() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (16, 16), generator=generator, dtype=torch.uint8).numpy() for _ in range(9)]
    found = [{"image": image, "label": i % 3, "who": f"p{i // 3}"} for i, image in enumerate(images)]
    found[2]["label"], found[4]["image"] = None, b"no image"
    return found


def test_image_feature_rows_are_those_of_the_store(tmp_path):
    """Row by row the same images and persons; the features of the images themselves."""
    model, processor = tiny_model().eval(), SpectralImageProcessor(image_size=16, num_channels=1)
    persons = {"unit_column": "who", "max_rows_per_unit": 2}
    data = listed_images()
    store = build_token_store(iter(data), model, processor, tmp_path / "store", label_column="label", **persons)
    rows = ImageFeatureRows(store, iter(data), processor, lambda shown: shown.flatten(1), **persons)
    assert len(rows) == len(store) == 6 and rows.units.tolist() == [0, 0, 1, 1, 2, 2] and rows.unit == store.unit
    tokens = model.codec.encode(rows[torch.arange(6)]["input_ids"].view(-1, 1, 16, 16))
    assert torch.equal(tokens, store[torch.arange(6)]["input_ids"][:, 1:])
    every = build_token_store(iter(data), model, processor, tmp_path / "all")
    assert len(ImageFeatureRows(every, iter(data), processor, lambda shown: shown.flatten(1))) == 8


@pytest.mark.parametrize("columns", [{}, {"unit_column": "who", "max_rows_per_unit": 3}])
def test_other_data_than_those_of_the_store_are_refused(tmp_path, columns):
    model, processor = tiny_model().eval(), SpectralImageProcessor(image_size=16, num_channels=1)
    data = listed_images()
    store = build_token_store(iter(data[:8]), model, processor, tmp_path / "store")
    given = data[:8] if columns else data
    with pytest.raises(ValueError, match=r"the data give other rows than .*store' holds"):
        ImageFeatureRows(store, iter(given), processor, lambda shown: shown.flatten(1), **columns)
