"""How images are brought to EfficientNet-Lite0; what it sees of them, `test_judge.py` and `test_teachers.py` try."""

import pytest
import torch

from hf_spectral_dp.metrics.efficientnet import levels, prepared


@pytest.mark.parametrize(("value", "level", "expected"), [(-1, 0, -127 / 128), (1, 255, 1), (2, 255, 1)])
def test_greys_become_three_channels_in_the_range_of_its_training(value, level, expected):
    images = torch.full((2, 1, 4, 4), float(value))
    assert torch.allclose(levels(images, 8), torch.full((2, 1, 8, 8), float(level)), atol=1e-3)
    assert torch.allclose(prepared(images, 8), torch.full((2, 3, 8, 8), float(expected)), atol=1e-5)
