"""FeatureRows: what a critic sees of private images, and whose it is."""

import torch
from conftest import tiny_model

from hf_spectral_dp.feature_rows import FeatureRows, features_of
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
