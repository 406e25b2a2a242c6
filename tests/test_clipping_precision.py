"""Norms and sums of clipped gradients are taken in full float32, whatever precision the pass itself has."""

import pytest
import torch
from clipping_parts import llama, looped, losses_of, relative_error, token_rows

from hf_spectral_dp.privacy import book as book_module
from hf_spectral_dp.privacy.book import Book
from hf_spectral_dp.privacy.clipping import PerExampleClipper


@pytest.mark.parametrize("around", ["the losses", "the clipper"])
def test_bfloat16_autocast_keeps_sums_in_float32(around):
    model, ids = llama(), token_rows(5, 12)
    clipper = PerExampleClipper(model, 0.5)

    def losses():
        if around == "the clipper":
            return losses_of(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            return losses_of(model, ids)

    with torch.autocast("cpu", torch.bfloat16, enabled=around == "the clipper"):
        assert clipper.per_example_norms(losses, 5).dtype == torch.float64
        clipper.add(losses, 5)
    sums = clipper.take()
    assert all(value.dtype == torch.float32 for value in sums.values())
    _, expected = looped(model, ids, 0.5)
    assert relative_error(sums, expected) < 0.05  # bfloat16 has eight bits


@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_norms_and_sums_are_taken_in_full_float32_whatever_was_asked_for(asked, monkeypatch):
    """TensorFloat-32 would make a norm too small by a thousandth, and its share as much too large."""
    model, ids, seen = llama(True), token_rows(5, 70), set()
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)

    def watched(of, name):
        original = getattr(of, name)

        def run(*args, **kwargs):
            seen.add((name, *(backend.fp32_precision in ("none", "ieee") for backend in backends)))
            return original(*args, **kwargs)

        monkeypatch.setattr(of, name, run)

    monkeypatch.setattr(Book, "instantiates", lambda *_, **__: False)
    for of, names in ((book_module, ("_add_gram", "_add_product")), (Book, ("norms", "add_weighted"))):
        for name in names:
            watched(of, name)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        clipper = PerExampleClipper(model, 0.5)
        clipper.add(lambda: losses_of(model, ids), 5)
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {(name, True, True) for name in ("_add_gram", "_add_product", "norms", "add_weighted")}
