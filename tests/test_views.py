"""Views of images: fixed changes, the same for all, of one image at a time."""

import math

import pytest
import torch

from hf_spectral_dp.views import Views

ALL = Views(count=5, rotation=30, scaling=0.2, shear=0.2, shift=0.1, mirror=True)


def test_the_first_view_is_the_image_and_all_stay_in_range():
    images = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    views = ALL.of(images)
    assert len(views) == 5 and torch.equal(views[0], images)
    for view in views[1:]:
        assert view.shape == images.shape and view.abs().max() <= 1 and not torch.allclose(view, images, atol=0.1)


def test_every_image_is_changed_by_itself_and_always_in_the_same_way():
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    together = ALL.of(images)
    torch.manual_seed(5)  # no other generator takes part
    for index in (0, 3):
        for view, alone in zip(together, ALL.of(images[index : index + 1]), strict=True):
            torch.testing.assert_close(view[index : index + 1], alone)
    changed = images.clone()
    changed[0] = -changed[0]
    for view, other in zip(together, ALL.of(changed), strict=True):
        torch.testing.assert_close(view[1:], other[1:])


def test_mirrored():
    image = torch.arange(16.0).reshape(1, 1, 4, 4) / 16
    first, second = Views(count=2, mirror=True).of(image)
    assert torch.equal(first, image) and torch.equal(second[0, 0, :, 0], image[0, 0, :, 3])


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_slope_becomes_the_slope_that_the_map_says(number):
    """Each pixel of a plane must be the plane's value where the map sends it, within a seventh of a pixel's step."""
    side, across, down = 32, 0.22, -0.1
    places = (torch.arange(side, dtype=torch.float64) + 0.5) * 2 / side - 1  # in half sides
    plane = across * places[None, :] + down * places[:, None]
    draws = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    turn, size, slant, right, below = draws[number].tolist()
    angle = math.radians(30 * turn)
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    slanted = torch.tensor([[1.0, 0.2 * slant], [0.0, 1.0]])
    view = ALL.of(plane[None, None])[number][0, 0]
    for row, column in ((11, 11), (14, 20), (20, 13)):  # far from the edge, which is repeated
        place = torch.stack([places[column], places[row]])
        x, y = (rotation.double() @ slanted.double() @ place / (1 + 0.2 * size)).tolist()
        x, y = x + 2 * 0.1 * right, y + 2 * 0.1 * below
        mirrored = -1 if number % 2 else 1
        assert view[row, column].item() == pytest.approx(across * mirrored * x + down * y, abs=2e-3)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"count": 0}, r"count=0 must be a whole number in \[1, 256\]"),
        ({"count": 4, "rotation": 200.0}, r"rotation=200.0 must be a number in \[0, 180\]"),
        ({"count": 4, "shift": -0.1}, r"shift=-0.1 must be a number in \[0, 0.5\]"),
        ({"count": 4}, "count=4 with no change given"),
        ({"count": 1, "rotation": 5.0}, "changes for a single view"),
        ({"count": "4"}, "count='4' must be a whole number"),
        ({"count": 4, "shear": "0.1"}, "shear='0.1' must be a number"),
        ({"count": 2, "mirror": "no"}, "mirror='no' must be true or false"),
        ({"count": 3, "mirror": True}, "mirror alone makes two views"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        Views(**fields)
