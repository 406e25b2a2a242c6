"""Norms from pairs of inputs and output gradients, against the gradients themselves; and which of both is kept."""

import pytest
import torch
from torch import nn

from hf_spectral_dp.privacy.book import Book


@pytest.mark.parametrize("length", [63, 64, 256])
def test_blocks_of_a_symmetric_matrix_give_its_whole_norm(length):
    torch.manual_seed(0)
    book, weight = Book(3), nn.Parameter(torch.zeros(2000, 2000))
    a, g = torch.randn(3, length, 2000), torch.randn(3, length, 2000)
    assert not book.instantiates(a, g)
    book.note_affine(weight, a, g)
    expected = torch.bmm(g.double().transpose(1, 2), a.double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(book.norms(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("lengths", [(4, 300), (300, 4)])
def test_a_weight_used_at_lengths_that_ask_for_different_forms(lengths):
    torch.manual_seed(0)
    book, weight = Book(2, memory_budget=1e9), nn.Parameter(torch.zeros(8, 8))
    uses = [(torch.randn(2, T, 8), torch.randn(2, T, 8)) for T in lengths]
    for a, g in uses:
        book.note_affine(weight, a, g)
    expected = sum(torch.bmm(g.double().transpose(1, 2), a.double()) for a, g in uses).flatten(1).norm(dim=1)
    ratios = book.norms() / expected  # never too small; where 300 random positions cancel, increased within the slack
    assert 1 - 1e-6 < float(ratios.min()) <= float(ratios.max()) < 1 + 1e-5


@pytest.mark.parametrize("order", ["first first", "one by one", "first after last"])
def test_layers_that_share_an_input_in_any_order(order):
    """Adapters read what their neighbours read, with other layers in between."""
    torch.manual_seed(0)
    book, weights = Book(3), [nn.Parameter(torch.zeros(300, 300)) for _ in range(4)]
    a, b = torch.randn(3, 5, 300), torch.randn(3, 5, 300)
    uses = [(weight, x, torch.randn(3, 5, 300)) for weight, x in zip(weights, (a, b, a, b), strict=True)]
    for index, (weight, x, g) in enumerate(uses):
        assert not book.instantiates(x, g)
        last = {"first first": index > 1, "one by one": True, "first after last": index < 2}[order]
        book.note_affine(weight, x, g, last=last)
    each = [torch.bmm(g.double().transpose(1, 2), x.double()).flatten(1) for _, x, g in uses]
    torch.testing.assert_close(book.norms(), torch.cat(each, 1).norm(dim=1), rtol=1e-6, atol=0)


def test_the_head_of_a_tied_model_is_instantiated_where_that_is_cheaper():
    a, g = torch.randn(2, 40, 16), torch.randn(2, 40, 19)
    assert Book(2).instantiates(a, g, tied=True)
    assert not Book(2).instantiates(a[:, :4], g[:, :4], tied=True)


@pytest.mark.parametrize("width", [2, 300])  # instantiated, and as pairs
def test_rows_of_a_weight_count_as_weights_of_their_own(width):
    """As a head of which every position asks for the codes of its scale only."""
    torch.manual_seed(0)
    book, weight = Book(3, memory_budget=1e9), nn.Parameter(torch.zeros(400, width))
    uses, expected = (
        [(slice(0, 150), 12), (slice(150, 400), 14), (slice(0, 150), 9)],
        torch.zeros(3, 400, width).double(),
    )
    for rows, length in uses:
        a, g = torch.randn(3, length, width), torch.randn(3, length, rows.stop - rows.start)
        assert book.instantiates(a, g) == (width == 2)
        book.note_affine(weight, a, g, rows=rows)
        expected[:, rows] += torch.bmm(g.double().mT, a.double())
    torch.testing.assert_close(book.norms(), expected.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    coefficients, sums = torch.tensor([0.5, 0.0, 2.0], dtype=torch.double), {weight: torch.ones(400, width)}
    book.add_weighted(coefficients, sums)
    assert list(sums) == [weight]
    torch.testing.assert_close(
        sums[weight].double() - 1, torch.einsum("b,bpd->pd", coefficients, expected), rtol=0, atol=1e-4
    )


def test_rows_that_share_entries_with_another_use_are_refused():
    """Their norms could not be added up: the share of an example could be larger than the clipping norm."""
    table = nn.Parameter(torch.zeros(8, 4))

    def use(book: Book, rows: slice | None) -> None:
        book.note_affine(table, torch.ones(2, 3, 4), torch.ones(2, 3, 8 if rows is None else 5), rows=rows)

    overlapping = Book(2)
    use(overlapping, slice(0, 5))
    with pytest.raises(ValueError, match="overlap"):
        use(overlapping, slice(3, 8))
    for tied in (False, True):
        both = Book(2, frozenset([table] if tied else []))
        with pytest.raises(ValueError, match="as a whole and by rows" if not tied else "tied"):
            use(both, None)
            use(both, slice(0, 5))
            both.norms()
    looked_up = Book(2)
    use(looked_up, slice(0, 5))
    looked_up.note_lookup(table, torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="as a whole and by rows"):
        looked_up.norms()


def test_uses_of_a_parameter_that_are_cut_into_other_pieces_are_refused():
    """Added to each other by broadcasting, they would give an example the gradient of another."""
    torch.manual_seed(0)
    book, weight = Book(3, memory_budget=1e9), nn.Parameter(torch.zeros(1100, 1100))  # one example fills a piece
    a, g = torch.randn(3, 2000, 1100), torch.randn(3, 2000, 1100)
    assert book.instantiates(a, g)
    book.note_affine(weight, a, g)
    with pytest.raises(ValueError, match="layers of two kinds share it"):
        book.note_dense(weight, torch.randn(3, 1100, 1100))
