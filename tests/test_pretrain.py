"""Going on from a public prior with fewer scales: what it knew is known, and nothing else passes for such a prior."""

import sys

import pretrain
import pytest
import torch
from conftest import one_private, sequences, tiny_model, wild
from pretrain import go_on

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM


def with_scales(count: int, num_classes: int = 10) -> SpectralTokenizerForCausalLM:
    """The model that all share, with its first `count` scales only."""
    whole = wild(tiny_model())
    fields = whole.config.to_dict() | {"num_classes": num_classes}
    for name in ("patch_sizes", "codebook_sizes"):
        fields[name] = fields[name][:count]
    model = SpectralTokenizerForCausalLM(SpectralConfig.from_dict(fields)).eval()
    for index in range(count):
        model.codec.codebook(index).copy_(whole.codec.codebook(index))
    return model


@torch.no_grad()
def test_a_further_scale_leaves_the_first_ones_as_they_were():
    small, large = wild(with_scales(2)), with_scales(3)
    go_on(large, small)
    rows, known = sequences(large), small.config.layout.codes
    first = rows[:, : 1 + small.config.layout.length]
    shorter = torch.where(first >= large.config.layout.codes, first - large.config.layout.codes + known, first)
    expected = small(shorter).logits[:, :-1, :known]
    torch.testing.assert_close(large(first).logits[:, :-1, :known], expected)
    for name, weight in small.named_parameters():
        if weight.shape == large.get_parameter(name).shape:
            assert torch.equal(large.get_parameter(name), weight), name
    finest = large.config.layout.scales[-1].first_id
    assert not torch.equal(large.lm_head.weight[finest : finest + 16], small.lm_head.weight[:16])


def test_other_code_words_scales_or_classes_are_refused():
    other = with_scales(2)
    other.codec.codebook(1)[0] += 1
    for before in (other, with_scales(3)):
        with pytest.raises(ValueError, match="not the first"):
            go_on(with_scales(3) if before is other else with_scales(2), before)
    with pytest.raises(ValueError, match="9 classes"):
        go_on(with_scales(3), with_scales(2, num_classes=9))


@pytest.mark.parametrize("option", ["--codec", "--start"])
def test_a_public_prior_starts_from_public_weights(tmp_path, monkeypatch, option):
    given = one_private(tmp_path, option, "--codec")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--public", "nowhere", "--out", "out", *given])
    with pytest.raises(ValueError, match=f"{option} .* came out of the private run 'abababababab'"):
        pretrain.main()
