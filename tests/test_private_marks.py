"""Marks of private runs: joined over networks, and refused where nothing counts them."""

from types import SimpleNamespace

import pytest
from diffusers import UNet2DModel
from torch import nn

from hf_spectral_dp.private_marks import UNRECORDED, configured, mark, marks, refuse_uncounted
from hf_spectral_dp.verification import private_runs


def network(*runs: str) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(private_runs=list(runs) or None))


def test_marks_are_those_of_all_networks_each_once():
    assert marks(network("a", "b"), network(), network("b", "c"), None, object()) == ["a", "b", "c"]
    assert marks() == marks(network()) == []


def test_a_wrapper_hides_no_mark():
    marked, wrapper = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
    marked.config = SimpleNamespace(private_runs=["a"])
    wrapper[1].append(marked)
    assert configured(wrapper) == [marked] and marks(wrapper) == ["a"] and not marks(wrapper[0])
    with pytest.raises(ValueError, match="private run 'a'"):
        refuse_uncounted("it", wrapper)
    outer = nn.Sequential(marked)
    outer.config = SimpleNamespace()  # of a kind that knows nothing of runs
    assert configured(outer) == [outer] and marks(outer) == ["a"]  # what is trained is marked as one, and once
    with pytest.raises(ValueError, match="private run 'a'"):
        refuse_uncounted("it", outer)
    outer.config.private_runs = ["b"]
    assert marks(outer) == ["b", "a"]


def test_a_network_of_diffusers_keeps_its_mark_in_the_file(tmp_path):
    part = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    mark(part, ["a"])
    part.save_pretrained(tmp_path / "super_resolution" / "unet")
    assert marks(UNet2DModel.from_pretrained(tmp_path / "super_resolution" / "unet")) == ["a"]
    assert private_runs(tmp_path) == {"super_resolution/unet/config.json": ["a"]}


def test_every_run_must_be_counted():
    refuse_uncounted("it", network("a", "b"), {"a", "b", "c"})
    refuse_uncounted("it", network())
    with pytest.raises(ValueError, match="^it came out of the private run 'b', .*earlier_ledgers"):
        refuse_uncounted("it", network("a", "b"), ["a"])
    with pytest.raises(ValueError, match=UNRECORDED):
        refuse_uncounted("it", network(UNRECORDED))
