"""The sampling loop: the same logits as `forward` whatever the layers are, and draws that follow the probabilities."""

import pytest
import torch
from conftest import tiny_model, wild
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.sampling import StepByStep, draw, step

torch.set_num_threads(1)


def wild_model(**fields) -> SpectralTokenizerForCausalLM:
    """Two layers with weights so large that every position moves every later one."""
    shape = {"image_size": 16, "levels": 2, "patch_sizes": [2, 2, 4], "codebook_sizes": [16, 16, 16], "num_classes": 3}
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return wild(SpectralTokenizerForCausalLM(SpectralConfig(**{**shape, **size, **fields})), std=0.3)


def lora(model: SpectralTokenizerForCausalLM) -> SpectralTokenizerForCausalLM:
    """The same model with adapters in every linear layer and in the head; they change its output."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).base_model.model


@torch.no_grad()
def logits_of_both_ways(model, compiled=None, prefix: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, T, codes) that the loop draws from and those of one uncached `forward`, for random sequences."""
    generator = torch.Generator().manual_seed(1)
    layout = model.config.layout
    columns = [model.start_tokens(torch.arange(3))]
    for index in layout.scale_of_position:
        scale = layout.scales[index]
        columns.append(torch.randint(scale.first_id, scale.first_id + scale.codes, (3,), generator=generator))
    rows = torch.stack(columns, 1)
    expected = model(input_ids=rows[:, :-1], use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(input_ids=rows[:, :prefix], past_key_values=cache, use_cache=True)
    following = StepByStep(model.model, cache, layout.length - prefix, compiled)
    found = []
    for position in range(prefix, layout.length):
        scale = layout.scales[layout.scale_of_position[position]]
        embedded = model.model.embed_tokens(rows[:, position]) + model.position_embedding.weight[position]
        found.append(model._head(following(embedded), slice(scale.first_id, scale.first_id + scale.codes)))
    own = [expected[:, p][:, model.allowed[p]] for p in range(prefix, layout.length)]
    return torch.stack(found, 1), torch.stack(own, 1)


@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "head_dim": 6},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}},
    ],
)
def test_a_step_computes_what_forward_does(fields, prefix):
    found, expected = logits_of_both_ways(wild_model(**fields), prefix=prefix)
    assert expected.std() > 0.2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_adapters_count():
    model = wild_model()
    plain, _ = logits_of_both_ways(model)
    found, expected = logits_of_both_ways(lora(model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 0.1


def test_double_and_half_precision():
    found, expected = logits_of_both_ways(wild_model().double())
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    half, _ = logits_of_both_ways(wild_model().bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_are_used_through_their_modules():
    """torch's own dynamic int8 linears, which have no `weight` to take rows of."""
    model = wild_model()
    head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight, model.lm_head = model.lm_head.weight, head
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert not isinstance(model.lm_head, torch.nn.Linear)
    found, expected = logits_of_both_ways(model)
    # The scale of the activations is that of a step's rows here, and that of all rows there.
    assert (found - expected).abs().max() < 0.15 * expected.abs().max()
    tokens = model.sample(torch.arange(3))
    assert model.decode(tokens).shape == (3, 1, 16, 16)


def test_masking_all_later_positions_is_the_same_as_not_having_them():
    """What a compiled step computes: fixed shapes and a mask. Run here without the compiler."""
    model, calls = wild_model(num_key_value_heads=2), []

    def fixed(*arguments):
        calls.append([memory.shape for memory in arguments[2]])
        return step(*arguments)

    found, expected = logits_of_both_ways(model, fixed)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 11 and all(shapes == calls[0] for shapes in calls)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_draws_the_same_images():
    model = wild_model(num_hidden_layers=1)
    expected = model.sample(torch.arange(3), guidance_scale=2.0, generator=torch.Generator().manual_seed(0))
    model.compile_sampling(backend="aot_eager")  # traced and made functional as by any backend, without its minutes
    found = model.sample(torch.arange(3), guidance_scale=2.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, expected)


def test_the_caller_sees_every_finished_scale():
    model, seen = wild_model(), []
    tokens = model.sample(torch.arange(2), on_scale_end=seen.append)
    assert [part.shape for part in seen] == [(2, 4), (2, 8), (2, 12)]
    assert all(torch.equal(part, tokens[:, : part.shape[1]]) for part in seen)


# Draws.


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, {0, 1, 2, 3}),
        (1, 1.0, {0}),
        (2, 1.0, {0, 1}),
        (9, 1.0, {0, 1, 2, 3}),
        (0, 1e-9, {0}),
        (0, 0.45, {0}),
        (0, 0.55, {0, 1}),
        (0, 0.85, {0, 1, 2}),
        (2, 0.99, {0, 1}),
        (3, 0.55, {0}),  # the nucleus is taken of the mass of the three codes: 5/9, 3/9, 1/9
        (3, 0.56, {0, 1}),
    ],
)
def test_top_k_and_top_p_by_hand(top_k, top_p, kept):
    logits = torch.tensor([0.5, 0.3, 0.1, 0.1 - 1e-3]).log().repeat(2000, 1)
    chosen = draw(logits, top_k, top_p, torch.Generator().manual_seed(0))
    assert set(chosen.tolist()) == kept


@pytest.mark.parametrize("top_k", [0, 40])
def test_draws_follow_the_probabilities(top_k):
    """Chi-square over 64 codes, some of them of probability zero, which never come."""
    number, generator = 100_000, torch.Generator().manual_seed(0)
    logits = torch.randn(64, generator=generator) * 2
    logits[[0, 7, 63]] = float("-inf")
    kept = logits if not top_k else logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    probabilities = kept.double().softmax(0)
    counts = draw(logits.expand(number, -1), top_k, 1.0, generator).bincount(minlength=64)
    likely = probabilities * number > 5
    assert (counts[probabilities == 0] == 0).all()
    statistic = ((counts - probabilities * number)[likely].square() / (probabilities * number)[likely]).sum()
    freedom = int(likely.sum()) - 1
    assert abs(float(statistic) - freedom) < 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_the_largest_random_number_still_draws_a_possible_code(monkeypatch):
    largest = 1 - 2.0**-24  # the largest value below one that torch.rand returns
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, largest))
    logits = torch.randn(1000, 33, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 20:] = float("-inf")
    assert draw(logits, 0, 1.0, None).max() < 20
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(size))
    logits[:, :5] = float("-inf")
    assert draw(logits, 0, 1.0, None).min() == 5


def test_images_of_the_loop_do_not_depend_on_the_rows_beside_them():
    """Row by row the same logits, so nothing of one image reaches another through the shared memory."""
    model = tiny_model().eval()
    labels = torch.arange(10)
    together = model.sample(labels, top_k=1)
    alone = torch.cat([model.sample(labels[i : i + 1], top_k=1) for i in range(10)])
    assert torch.equal(together, alone)
