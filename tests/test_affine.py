"""LoRA adapters as one function with the layer that they adapt: when that is done, and that it is exact."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_spectral_dp.privacy.affine import _Adapted, is_adapter
from hf_spectral_dp.privacy.clipping import PerExampleClipper


class Two(nn.Module):
    """Two layers that read one tensor, and a third; (B, T, 6) -> (B,)."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 9), nn.Linear(6, 9, bias=False), nn.Linear(9, 5)

    def forward(self, x):
        return self.third(torch.tanh(self.first(x)) * self.second(x)).square().sum((1, 2))


def adapted(dtype=torch.float64, **options) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["first", "second", "third"], **options)
    model = get_peft_model(Two(), config).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def adapters(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]


def looped(model: nn.Module, x: torch.Tensor, clipping_norm: float) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in x:
        gradients = torch.autograd.grad(model(row[None]).sum(), list(parameters.values()), allow_unused=True)
        norm = torch.cat([g.flatten() for g in gradients if g is not None]).norm()
        for name, g in zip(parameters, gradients, strict=True):
            if g is not None:
                sums[name] += g * min(1.0, clipping_norm / float(norm))
    return sums


def fused_calls(model: nn.Module, x: torch.Tensor, monkeypatch) -> int:
    """How many layers ran as one function, while the clipped sum was checked against the loop."""
    calls, apply = [], _Adapted.apply
    clipper = PerExampleClipper(model, 0.5)
    monkeypatch.setattr(_Adapted, "apply", lambda *given: calls.append(1) or apply(*given))
    clipper.add(lambda: model(x), len(x))
    monkeypatch.undo()
    sums, expected = clipper.take(), looped(model, x, 0.5)
    for name, value in expected.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-9, atol=1e-12)
    return len(calls)


@pytest.mark.parametrize("length", [2, 40])
def test_a_plain_adapter_and_its_layer_are_one_function(length, monkeypatch):
    model = adapted()
    assert all(is_adapter(module) for module in adapters(model))
    assert fused_calls(model, torch.randn(4, length, 6, dtype=torch.float64), monkeypatch) == 3


def test_one_matrix_of_an_adapter_may_be_frozen(monkeypatch):
    model = adapted()
    for name, parameter in model.named_parameters():
        if "first.lora_A" in name or "second.lora_B" in name:
            parameter.requires_grad_(False)
    assert fused_calls(model, torch.randn(4, 7, 6, dtype=torch.float64), monkeypatch) == 3


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}, {"bias": "all"}],
    ids=["dora", "bias of the adapter", "rank-stabilised", "bias of the layer"],
)
def test_kinds_of_adapters(options, monkeypatch):
    """Rank-stabilised ones differ in their scale only; the others are recorded by their parts."""
    model, x = adapted(**options), torch.randn(4, 7, 6, dtype=torch.float64)
    if "use_dora" in options:  # its magnitudes have no rule: exact by the fallback, or refused by name
        assert not any(is_adapter(module) for module in adapters(model))
        return
    expected = {"use_rslora": 3, "bias": 1}.get(next(iter(options)), 0)  # one of the three layers has no bias
    assert fused_calls(model, x, monkeypatch) == expected


def test_what_is_changed_after_the_clipper_was_made_is_seen():
    model, x = adapted(), torch.randn(4, 7, 6, dtype=torch.float64)
    clipper = PerExampleClipper(model, 0.5)
    layer = adapters(model)[0]
    layer.scaling["default"] *= 3
    clipper.add(lambda: model(x), 4)
    expected = looped(model, x, 0.5)
    for name, value in clipper.take().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    with model.disable_adapter():
        clipper.add(lambda: model(x.clone().requires_grad_()), 4)
    assert all(not value.any() for value in clipper.take().values())


def test_a_hook_on_a_part_is_called():
    model, x, seen = adapted(), torch.randn(4, 7, 6, dtype=torch.float64), []
    adapters(model)[0].lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    clipper = PerExampleClipper(model, 0.5)
    clipper.add(lambda: model(x), 4)
    assert seen
    expected = looped(model, x, 0.5)
    for name, value in clipper.take().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_around_adapters(reentrant):
    model, x = adapted(), torch.randn(4, 7, 6, dtype=torch.float64, requires_grad=True)
    clipper = PerExampleClipper(model, 0.5)
    clipper.add(lambda: checkpoint(model, x, use_reentrant=reentrant), 4)
    expected = looped(model, x, 0.5)
    for name, value in clipper.take().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_dropout_before_an_adapter_is_drawn(monkeypatch):
    model = adapted(lora_dropout=0.5)
    clipper, x = PerExampleClipper(model, 1e9), torch.randn(2, 7, 6, dtype=torch.float64)
    sums = []
    for _ in range(2):
        clipper.add(lambda: model(x), 2)
        sums.append(torch.cat([value.flatten() for value in clipper.take().values()]))
    assert not torch.equal(*sums)
    assert fused_calls(model.eval(), x, monkeypatch) == 3


def test_under_bfloat16_autocast_sums_stay_in_single_precision():
    model, x = adapted(torch.float32), torch.randn(4, 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        clipper = PerExampleClipper(model, 0.5)
        clipper.add(lambda: model(x).float(), 4)
    expected = looped(model, x, 0.5)
    for name, value in clipper.take().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.1, atol=0.02 * float(expected[name].abs().max()))
