"""Per-example clipping against an explicit loop over examples, for every kind of layer, in every way of running."""

import gc

import pytest
import torch
from clipping_parts import MODELS, llama, looped, losses_of, relative_error, token_rows
from torch import nn

from hf_spectral_dp.privacy import book as book_module
from hf_spectral_dp.privacy.book import Book
from hf_spectral_dp.privacy.clipping import PerExampleClipper


@pytest.mark.parametrize("length", [4, 40])  # short: ghost norms; long: instantiated gradients
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_loop_in_double_precision(name, length):
    model, ids = MODELS[name](dtype=torch.float64), token_rows(5, length)
    clipper = PerExampleClipper(model, 0.5)
    norms, sums = looped(model, ids, 0.5)
    ours = clipper.per_example_norms(lambda: losses_of(model, ids), 5)
    torch.testing.assert_close(ours, norms.detach(), rtol=1e-10, atol=0)
    clipper.add(lambda: losses_of(model, ids), 5)
    assert relative_error(clipper.take(), sums) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_any_split_into_micro_batches_gives_the_same_sum(name):
    model, ids = MODELS[name](), token_rows(7, 12)
    clipper = PerExampleClipper(model, 0.3)
    clipper.add(lambda: losses_of(model, ids), 7)
    whole = clipper.take()
    for size in (1, 2, 3):
        for rows in ids.split(size):
            clipper.add(lambda rows=rows: losses_of(model, rows), len(rows))
        assert relative_error(clipper.take(), whole) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_single_precision_within_a_millionth(name):
    model, ids = MODELS[name](), token_rows(5, 12)
    clipper = PerExampleClipper(model, 0.5)
    norms, sums = looped(model, ids, 0.5)
    ours = clipper.per_example_norms(lambda: losses_of(model, ids), 5)
    torch.testing.assert_close(ours, norms.detach().double(), rtol=1e-6, atol=0)
    clipper.add(lambda: losses_of(model, ids), 5)
    assert relative_error(clipper.take(), sums) < 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, ids = llama(), token_rows(5, 12)
    clipper = PerExampleClipper(model, 0.5)
    clipper.add(lambda: losses_of(model, ids), 5)
    plain = clipper.take()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    clipper.add(lambda: losses_of(model, ids), 5)
    assert relative_error(clipper.take(), plain) < 1e-6


def test_every_share_stays_below_the_clipping_norm():
    model = llama()
    clipper = PerExampleClipper(model, 0.01)
    for seed in range(20):
        ids = token_rows(1, 9, seed)
        clipper.add(lambda ids=ids: losses_of(model, ids) * 1e4, 1)
        norm = float(torch.sqrt(sum(value.double().square().sum() for value in clipper.take().values())))
        assert 0.0099 < norm <= clipper.sensitivity == 0.01 * (1 + 1e-5)


class Poisoned(nn.Module):
    """One linear layer whose input can carry anything."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def losses(self, x):
        return self.layer(x).square().flatten(1).sum(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("length", [1, 6])
def test_an_example_that_is_not_finite_counts_exactly_zero(value, length):
    torch.manual_seed(0)
    model, x = Poisoned(), torch.randn(4, length, 3)
    clipper = PerExampleClipper(model, 1.0)
    rest = x[[0, 1, 3]]
    clipper.add(lambda: model.losses(rest), 3)
    expected = clipper.take()
    x[2, 0, 0] = value
    clipper.add(lambda: model.losses(x), 4)
    assert relative_error(clipper.take(), expected) < 1e-6


@pytest.mark.parametrize("length", [1, 6])
def test_adding_one_example_moves_the_sum_by_at_most_the_clipping_norm(length):
    torch.manual_seed(0)
    model = Poisoned()
    clipper = PerExampleClipper(model, 0.7)
    for trial in range(5000):  # 10,000 random batches with both lengths
        generator = torch.Generator().manual_seed(trial)
        scale = 10.0 ** float(torch.randint(-20, 19, (), generator=generator))
        x = torch.randn(int(torch.randint(1, 9, (), generator=generator)), length, 3, generator=generator) * scale
        clipper.add(lambda x=x: model.losses(x), len(x))
        whole = clipper.take()
        clipper.add(lambda x=x: model.losses(x[1:]), len(x) - 1)
        less = clipper.take()
        moved = torch.sqrt(sum((whole[name].double() - less[name].double()).square().sum() for name in whole))
        assert moved <= clipper.sensitivity


def test_a_layer_used_twice_and_at_two_lengths():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6).double()
    x, y = torch.randn(3, 2, 6).double(), torch.randn(3, 9, 6).double()

    def losses(rows=slice(None)):
        return layer(layer(x[rows])).square().mean((1, 2)) + layer(y[rows]).pow(3).mean((1, 2))

    clipper = PerExampleClipper(layer, 0.1)
    expected = torch.zeros_like(layer.weight)
    for row in range(3):
        grads = torch.autograd.grad(losses(slice(row, row + 1))[0], [layer.weight, layer.bias])
        norm = torch.sqrt(sum(g.square().sum() for g in grads))
        expected += grads[0] * min(1.0, 0.1 / float(norm))
    clipper.add(losses, 3)
    torch.testing.assert_close(clipper.take()["weight"], expected, rtol=2e-6, atol=1e-12)


def test_a_padding_row_gets_nothing():
    table = nn.Embedding(5, 3, padding_idx=0)
    clipper = PerExampleClipper(table, 1.0)
    ids = torch.tensor([[0, 1, 1], [0, 0, 2]])
    clipper.add(lambda: table(ids).sum((1, 2)), 2)
    total = clipper.take()["weight"]
    assert torch.equal(total[0], torch.zeros(3))
    assert float(total[1].norm()) == pytest.approx(1.0, rel=1e-5)  # twice the row (2, 2, 2), clipped together


def test_nothing_is_stale_after_a_module_is_skipped():
    torch.manual_seed(0)
    first, second = nn.Linear(3, 1), nn.Linear(3, 1)
    both, x = nn.ModuleList([first, second]), torch.randn(4, 3)
    clipper = PerExampleClipper(both, 1.0)
    clipper.add(lambda: (first(x) + second(x))[:, 0], 4)
    clipper.take()
    clipper.add(lambda: first(x)[:, 0], 4)
    sums = clipper.take()
    assert torch.equal(sums["1.weight"], torch.zeros(1, 3))
    assert sums["0.weight"].abs().sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_pass_stays_in_memory(name):
    model = MODELS[name]()
    clipper = PerExampleClipper(model, 1.0)
    ids = token_rows(3, 6)
    gc.collect()
    gc.disable()
    try:
        clipper.add(lambda: losses_of(model, ids), 3)
        assert not any(isinstance(thing, Book) for thing in gc.get_objects())
    finally:
        gc.enable()


def test_no_examples_no_forward_and_a_sum_of_zeros():
    model = Poisoned()
    clipper = PerExampleClipper(model, 1.0)
    clipper.add(lambda: pytest.fail("the model was run"), 0)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in clipper.take().values())


def test_ordinary_training_is_restored():
    model, x = Poisoned(), torch.randn(2, 3)
    clipper = PerExampleClipper(model, 1.0)
    model.layer.weight.grad = torch.ones(4, 3)
    clipper.add(lambda: model.losses(x), 2)
    assert torch.equal(model.layer.weight.grad, torch.ones(4, 3))
    assert "forward" not in vars(model.layer)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class OnePlusRMSNorm(nn.Module):
    """Scales by 1 + weight, as Gemma's: a name that promises what the numbers do not keep."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(4)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_a_parameter_without_any_forward_is_named():
    with pytest.raises(ValueError, match="^scale is trainable"):
        PerExampleClipper(Scaled(), 1.0)


@pytest.mark.parametrize(
    "module, x", [(nn.Conv2d(2, 2, 3, groups=2), torch.randn(3, 2, 5, 5)), (OnePlusRMSNorm(), torch.randn(3, 4))]
)
def test_a_module_without_a_rule_falls_back_and_says_so_once(module, x, caplog):
    clipper = PerExampleClipper(module, 0.1)
    assert [type(module).__name__ in record.message for record in caplog.records] == [True]
    clipper.add(lambda: module(x).square().flatten(1).sum(1), 3)
    expected = torch.zeros_like(module.weight)
    for row in x:
        grads = torch.autograd.grad(module(row[None]).square().sum(), list(module.parameters()))
        expected += grads[0] * min(1.0, 0.1 / float(torch.sqrt(sum(g.square().sum() for g in grads))))
    torch.testing.assert_close(clipper.take()["weight"], expected, rtol=1e-5, atol=1e-7)


class ConvNet(nn.Module):
    """Strides, dilation, padding, a layer at two sizes and group normalisation with one group and several."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 4, (3, 1), padding=(2, 0), dilation=(2, 1), bias=False)
        self.last = nn.GroupNorm(1, 4)

    def forward(self, x):
        hidden = self.norm(self.first(x)).relu()
        hidden = self.last(self.second(self.second(hidden)[:, :, ::2]))
        return hidden.sin().flatten(1).square().sum(1)


@pytest.mark.parametrize("size", [4, 24])  # few places: ghost norms; many: instantiated gradients
@pytest.mark.parametrize("memory_budget", [0, 1 << 30])
def test_convolutions_and_group_normalisation_equal_the_loop(size, memory_budget, caplog):
    torch.manual_seed(0)
    model, x = ConvNet().double(), torch.randn(4, 3, size, size).double()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in x:
        grads = torch.autograd.grad(model(row[None])[0], list(model.parameters()))
        norm = float(torch.sqrt(sum(g.square().sum() for g in grads)))
        for name, g in zip(expected, grads, strict=True):
            expected[name] += g * min(1.0, 0.5 / norm)
    clipper = PerExampleClipper(model, 0.5, memory_budget)
    for split in (4, 3, 1):
        for rows in x.split(split):
            clipper.add(lambda rows=rows: model(rows), len(rows))
        assert relative_error(clipper.take(), expected) < 1e-10
    assert not caplog.records  # no fallback


def test_convolutions_under_bfloat16_autocast():
    torch.manual_seed(0)
    model, x = ConvNet(), torch.randn(4, 3, 12, 12)
    clipper = PerExampleClipper(model, 0.5)
    clipper.add(lambda: model(x), 4)
    exact = clipper.take()
    with torch.autocast("cpu", torch.bfloat16):
        clipper.add(lambda: model(x), 4)
    rounded = clipper.take()
    assert all(value.dtype == torch.float32 for value in rounded.values())
    assert relative_error(rounded, exact) < 0.05


@pytest.mark.parametrize("what", ["model", "layer", "losses"])
def test_compiled_models_are_exact(what):
    """A compiled graph knows nothing of the recording: it must not run while gradients are recorded."""
    model, ids = llama(), token_rows(5, 12)
    _, expected = looped(model, ids, 0.5)
    clipped = model
    if what == "model":
        clipped = torch.compile(model, backend="eager")
    elif what == "layer":
        model.model.layers[0].compile(backend="eager")
    run = torch.compile(losses_of, backend="eager") if what == "losses" else losses_of
    run(clipped, ids)  # compiled before recording begins, as in a loop that also evaluates
    clipper = PerExampleClipper(clipped, 0.5)
    for _ in range(2):
        clipper.add(lambda: run(clipped, ids), 5)
        sums = {name.removeprefix("_orig_mod."): value for name, value in clipper.take().items()}
        assert relative_error(sums, expected) < 2e-6
    torch.testing.assert_close(run(clipped, ids), losses_of(model, ids))


def test_a_parameter_used_outside_its_module_is_refused():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    clipper = PerExampleClipper(layer, 1.0)
    with pytest.raises(ValueError, match="weight is used outside"):
        clipper.add(lambda: layer(x).sum(1) + layer.weight.sum(), 4)
    assert torch.equal(clipper.take()["weight"], torch.zeros(2, 3))


def test_other_misuse_is_refused():
    model, x = Poisoned(), torch.randn(4, 3)
    with pytest.raises(ValueError, match="clipping_norm=1e-30 must be positive, at least 1e-12"):
        PerExampleClipper(nn.Linear(2, 1), 1e-30)  # squares of its gradients vanish, and nothing would be clipped
    with pytest.raises(ValueError, match="clipping_norm=0"):
        PerExampleClipper(model, 0)
    with pytest.raises(ValueError, match="no trainable parameter"):
        PerExampleClipper(Poisoned().requires_grad_(False), 1.0)
    with pytest.raises(ValueError, match="float16"):
        PerExampleClipper(Poisoned().half(), 1.0)
    clipper = PerExampleClipper(model, 1.0)
    with pytest.raises(ValueError, match="one loss per example"):
        clipper.add(lambda: model.losses(x).mean(), 4)
    with pytest.raises(ValueError, match="layer received shape"):
        clipper.add(lambda: model.layer(x.repeat(2, 1)).view(4, -1).sum(1), 4)


def test_an_input_that_one_reader_alone_carries_to_the_loss():
    """What readers of one input send back is added up; one that the loss never sees changes nothing."""
    torch.manual_seed(0)
    below, used, unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
    model, x = nn.ModuleList([below, used, unused]), torch.randn(5, 3)

    def losses(rows=slice(None)):
        hidden = below(x[rows]).tanh()
        unused(hidden)
        return used(hidden).square().sum(1)

    parameters = [*below.parameters(), *used.parameters()]
    expected = torch.zeros_like(below.weight)
    for row in range(5):
        grads = torch.autograd.grad(losses(slice(row, row + 1))[0], parameters)
        expected += grads[0] * min(1.0, 0.2 / float(torch.sqrt(sum(g.square().sum() for g in grads))))
    clipper = PerExampleClipper(model, 0.2)
    for _ in range(2):
        clipper.add(losses, 5)
        torch.testing.assert_close(clipper.take()["0.weight"], expected, rtol=1e-5, atol=1e-7)


def test_batch_normalisation_in_training_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    clipper, x = PerExampleClipper(model, 1.0), torch.randn(5, 3)
    with pytest.raises(ValueError, match="BatchNorm1d in training mode: examples see each other"):
        clipper.add(lambda: model(x).sum(1), 5)


def test_inputs_with_more_dimensions_and_a_container_of_free_parameters():
    """What other engines get silently wrong: four-dimensional inputs, and parameters that no leaf module owns."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.layer = nn.Parameter(torch.randn(1, 2, 3, 4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x + self.positions)

    torch.manual_seed(0)
    model, x = Positions(), torch.randn(3, 2, 3, 4)
    parameters = dict(model.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in x:
        grads = torch.autograd.grad(model(row[None]).square().sum(), list(parameters.values()))
        norm = float(torch.sqrt(sum(g.square().sum() for g in grads)))
        for name, g in zip(parameters, grads, strict=True):
            expected[name] += g * min(1.0, 0.5 / norm)
    clipper = PerExampleClipper(model, 0.5)
    clipper.add(lambda: model(x).square().flatten(1).sum(1), 3)
    assert relative_error(clipper.take(), expected) < 1e-6


def test_dropout_inside_the_fallback_is_refused():
    model, x = (
        nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1, dropout=0.5, batch_first=True)),
        torch.randn(3, 2, 4),
    )
    with pytest.raises(ValueError, match="dropout|examples"):
        clipper = PerExampleClipper(model[1], 1.0)
        clipper.add(lambda: model[1](x, x, x)[0].square().flatten(1).sum(1), 3)


@pytest.mark.parametrize("name", ["llama", "llama tied", "lora"])
@pytest.mark.parametrize("size", [1, 1 << 13])  # one example in a piece; a few
def test_gradients_in_pieces_equal_those_in_one(name, size, monkeypatch):
    model, ids = MODELS[name](), token_rows(7, 40)
    clipper = PerExampleClipper(model, 0.3)

    def losses():
        values = losses_of(model, ids)
        return values * torch.tensor([1, 1, 1, float("nan"), 1, 1, 1])

    clipper.add(losses, 7)
    whole = clipper.take()
    monkeypatch.setattr(book_module, "_PIECE", size)
    clipper.add(losses, 7)
    clipper.add(losses, 7)
    assert relative_error(clipper.take(), {key: 2 * value for key, value in whole.items()}) < 1e-6
    assert all(value.isfinite().all() for value in whole.values())
