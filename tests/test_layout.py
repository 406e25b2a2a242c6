"""Token layout: every position and every id belongs to exactly one scale; what cannot be cut is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_spectral_dp.layout import TokenLayout

VALID = {"image_size": 32, "num_channels": 1, "levels": 3, "patch_sizes": [2, 2, 2], "codebook_sizes": [8, 16, 32]}


@st.composite
def valid_arguments(draw) -> dict:
    """Any image that can be cut: sides by level, patches among the divisors of the side."""
    levels, base = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    scales = draw(st.integers(1, levels + 1))
    sides = [base * 2 ** max(index - 1, 0) for index in range(scales)]
    divisors = [[patch for patch in range(1, side + 1) if side % patch == 0] for side in sides]
    return {
        "image_size": base * 2**levels,
        "num_channels": draw(st.sampled_from([1, 3])),
        "levels": levels,
        "patch_sizes": [draw(st.sampled_from(choices)) for choices in divisors],
        "codebook_sizes": draw(st.lists(st.integers(2, 1000), min_size=scales, max_size=scales)),
    }


@settings(database=None, deadline=None)
@given(valid_arguments())
def test_positions_and_ids_are_partitioned_coarse_to_fine(arguments):
    layout = TokenLayout.build(**arguments)
    positions = [p for s in layout.scales for p in range(s.first_position, s.first_position + s.tokens)]
    ids = [code for scale in layout.scales for code in range(scale.first_id, scale.first_id + scale.codes)]
    assert positions == list(range(layout.length)) and ids == list(range(layout.codes))
    assert layout.scale_of_position == sorted(layout.scale_of_position)
    assert [layout.scale_of_position.count(index) for index in range(len(layout.scales))] == [
        scale.tokens for scale in layout.scales
    ]
    for position, index in enumerate(layout.scale_of_position):
        scale = layout.scales[index]
        assert scale.first_position <= position < scale.first_position + scale.tokens


@settings(database=None, deadline=None)
@given(valid_arguments())
def test_patches_hold_every_coefficient_of_the_modelled_bands_once(arguments):
    layout = TokenLayout.build(**arguments)
    coarsest = arguments["image_size"] // 2 ** arguments["levels"]
    for index, scale in enumerate(layout.scales):
        bands = 1 if index == 0 else 3
        assert scale.channels == bands * arguments["num_channels"]
        assert scale.side == (coarsest if index == 0 else coarsest * 2 ** (index - 1))
        assert scale.grid * scale.patch == scale.side
        assert scale.tokens * scale.patch_dim == scale.channels * scale.side**2
    # LL of the coarsest level and the details above it fill a square image of the coarse side exactly.
    coarse_side = coarsest * 2 ** (len(layout.scales) - 1)
    coefficients = sum(scale.tokens * scale.patch_dim for scale in layout.scales)
    assert coefficients == arguments["num_channels"] * coarse_side**2


def test_layout_by_hand():
    layout = TokenLayout.build(**VALID)
    assert [scale.side for scale in layout.scales] == [4, 4, 8]
    assert [scale.grid for scale in layout.scales] == [2, 2, 4]
    assert [scale.tokens for scale in layout.scales] == [4, 4, 16]
    assert [scale.patch_dim for scale in layout.scales] == [4, 12, 12]
    assert [scale.first_position for scale in layout.scales] == [0, 4, 8]
    assert [scale.first_id for scale in layout.scales] == [0, 8, 24]
    assert (layout.length, layout.codes) == (24, 56)
    assert layout.scale_of_position == [0] * 4 + [1] * 4 + [2] * 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": 0}, "levels=0 must be at least 1"),
        ({"levels": -2}, "levels=-2 must be at least 1"),
        ({"image_size": 30}, r"image_size=30 is not a positive multiple of 2\*\*levels=8 \(levels=3\); pad"),
        ({"image_size": 0}, "image_size=0 is not a positive multiple"),
        ({"image_size": -32}, "image_size=-32 is not a positive multiple"),
        ({"patch_sizes": [2, 2]}, r"patch_sizes=\[2, 2\] and codebook_sizes=\[8, 16, 32\].*same length.*1 = 4"),
        ({"patch_sizes": [], "codebook_sizes": []}, "between 1 and"),
        ({"levels": 1}, r"levels \+ 1 = 2: one entry per scale"),
        ({"patch_sizes": [2, 3, 2]}, r"patch_sizes\[1\]=3 does not divide the side 4 of scale 1; choose a divisor"),
        ({"patch_sizes": [2, 2, 16]}, r"patch_sizes\[2\]=16 does not divide the side 8 of scale 2"),
        ({"patch_sizes": [0, 2, 2]}, r"patch_sizes\[0\]=0"),
        ({"patch_sizes": [2, -2, 2]}, r"patch_sizes\[1\]=-2"),
        ({"codebook_sizes": [8, 1, 32]}, r"codebook_sizes\[1\]=1 must be at least 2"),
    ],
)
def test_errors_name_field_value_and_rule(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout.build(**{**VALID, **fields})
