"""Text in the model and the trainer: what is asked for is seen, nothing else is, and clipping stays exact."""

import pytest
import torch
from conftest import wild
from text_parts import SLOTS, WIDTH, text_model

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.privacy.clipping import PerExampleClipper

torch.set_num_threads(1)
LENGTH, CODES = 12, 48


@pytest.fixture(scope="module")
def model() -> SpectralTokenizerForCausalLM:
    """Shared: no test may change it."""
    return wild(text_model())


def texts(rows: int = 4, seed: int = 0) -> torch.Tensor:
    """States of texts of 1 to SLOTS tokens, the first of none."""
    states = torch.randn(rows, SLOTS, WIDTH, generator=torch.Generator().manual_seed(seed))
    for row in range(rows):
        states[row, row % (SLOTS + 1) :] = 0
    return states


def sequences(model, rows: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    columns = [torch.full((rows,), model.config.null_token_id)]
    for index in model.config.layout.scale_of_position:
        columns.append(torch.randint(16 * index, 16 * index + 16, (rows,), generator=generator))
    return torch.stack(columns, 1)


# -- the model ---------------------------------------------------------------------------------------------------------


def test_the_conditioning_follows_from_the_fields():
    assert SpectralConfig().conditioning == "none" and SpectralConfig(num_classes=3).conditioning == "class"
    config = SpectralConfig(text_width=8, max_text_tokens=7)
    assert (config.conditioning, config.text_slots) == ("text", 7)
    assert config.max_position_embeddings == 7 + config.layout.length + 1
    for fields, message in (
        ({"text_width": 8, "num_classes": 2}, "text_width=8 and num_classes=2.*one of them to 0"),
        ({"text_width": -1}, "text_width=-1"),
        ({"text_width": 8, "max_text_tokens": 0}, "max_text_tokens=0 at least 1"),
        ({"text_dropout": 1.0}, r"text_dropout=1.0 must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            SpectralConfig(**fields)


@torch.no_grad()
def test_the_prefix_by_hand(model):
    states = texts()
    prefix = model.text_prefix(states, 4)
    null = model.text_null.weight[0]
    for row in range(4):
        for slot in range(SLOTS):
            expected = states[row, slot] @ model.text_projection.weight.T if slot < row else null
            torch.testing.assert_close(prefix[row, slot], expected)
    assert torch.equal(model.text_prefix(None, 2), null.expand(2, SLOTS, -1))


@torch.no_grad()
def test_every_slot_moves_every_logit_of_its_row_alone(model):
    ids, states = sequences(model), texts(seed=2)
    before = model(ids, text_states=states).logits
    assert before.shape == (4, 1 + LENGTH, model.config.vocab_size)
    for slot in range(SLOTS):
        changed = states.clone()
        changed[2, slot] = torch.arange(WIDTH) - 3.0
        after = model(ids, text_states=changed).logits
        moved = (after - before).abs().amax(-1) > 1e-6
        assert moved[2].all() and not moved[[0, 1, 3]].any()


@torch.no_grad()
def test_no_text_is_the_null_condition(model):
    ids = sequences(model)
    nothing = model(ids).logits
    assert torch.equal(nothing, model(ids, text_states=torch.zeros(4, SLOTS, WIDTH)).logits)
    assert torch.equal(nothing[:1], model(ids, text_states=texts()).logits[:1])  # the first text is empty
    assert not torch.allclose(nothing[1:], model(ids, text_states=texts()).logits[1:])


@torch.no_grad()
def test_sample_generate_and_an_explicit_loop_agree(model):
    states = texts()
    sequence = model.start_tokens(None, 4)[:, None]
    start = sequence
    for _ in range(LENGTH):
        sequence = torch.cat([sequence, model(sequence, text_states=states).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.sample(text_states=states, top_k=1), sequence[:, 1:])
    static = {"cache_implementation": "static", "disable_compile": True}
    masked = {"attention_mask": torch.ones_like(start)}
    for options in ({}, {"use_cache": False}, masked, static, static, {**static, **masked}):
        assert torch.equal(model.generate(start, text_states=states, do_sample=False, **options), sequence)
    guided = {"guidance_scale": 2.0, "negative_prompt_ids": start, "do_sample": False, "text_states": states}
    assert torch.equal(model.generate(start, **guided, **static), model.generate(start, **guided))


@torch.no_grad()
def test_guidance_and_negative_texts_by_hand(model, monkeypatch):
    from hf_spectral_dp import modeling_spectral

    seen, draw = [], modeling_spectral.draw
    monkeypatch.setattr(modeling_spectral, "draw", lambda logits, *rest: seen.append(logits) or draw(logits, *rest))
    states, negative = texts(seed=3), texts(seed=4)
    for other, given in ((None, {}), (negative, {"negative_text_states": negative})):
        seen.clear()
        generator = torch.Generator().manual_seed(0)
        tokens = model.sample(text_states=states, guidance_scale=2.5, generator=generator, **given)
        ids = torch.cat([model.start_tokens(None, 4)[:, None], tokens], 1)
        wanted, unwanted = (model(ids, text_states=each).logits[:, :-1] for each in (states, other))
        expected = (unwanted + 2.5 * (wanted - unwanted)).softmax(-1)
        assert len(seen) == expected.shape[1]
        for position, logits in enumerate(seen):
            scale = model.config.layout.scales[model.config.layout.scale_of_position[position]]
            allowed = expected[:, position, scale.first_id : scale.first_id + scale.codes]
            torch.testing.assert_close(logits.softmax(-1), allowed, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_states": torch.zeros(2, SLOTS, WIDTH + 1)}, r"text_states of shape \(2, 5, 9\).*\(2, 5, 8\)"),
        ({"text_states": torch.zeros(2, SLOTS, WIDTH), "class_labels": torch.tensor([0, 0])}, "both given"),
        ({"num_samples": 2, "guidance_scale": 2.0}, "needs class_labels or text_states"),
        ({"num_samples": 2, "negative_text_states": torch.zeros(2, SLOTS, WIDTH)}, "they need text_states"),
        (
            {"text_states": torch.ones(2, SLOTS, WIDTH), "negative_text_states": torch.ones(2, SLOTS, WIDTH)},
            "guidance_scale=1.0.*for instance guidance_scale=3",
        ),
    ],
)
def test_conditions_that_do_not_go_together_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**arguments)


def test_guidance_by_a_null_condition_that_was_never_trained_is_refused():
    model, states = text_model(text_dropout=0.0).eval(), texts()
    with pytest.raises(ValueError, match="guidance_scale=3.0.*text_dropout=0"):
        model.sample(text_states=states, guidance_scale=3.0, num_tokens=0)
    model.sample(text_states=states, guidance_scale=3.0, negative_text_states=texts(seed=5), num_tokens=1)
    with pytest.raises(ValueError, match=r"text_states of shape \(4, 5, 8\).*\(4, 0, 0\)"):
        text_model(text_width=0).sample(text_states=states, num_tokens=1)


def test_a_prior_without_text_takes_text_later(tmp_path):
    """Its image positions keep their meaning: only the projection and the empty slot are new."""
    prior = text_model(text_width=0)
    prior.save_pretrained(tmp_path)
    loaded = SpectralTokenizerForCausalLM.from_pretrained(tmp_path, text_width=WIDTH, max_text_tokens=3)
    new = dict(loaded.named_parameters())
    assert new.keys() - dict(prior.named_parameters()).keys() == {"text_projection.weight", "text_null.weight"}
    for name, parameter in prior.named_parameters():
        assert torch.equal(parameter, new[name]), name
    loaded.save_pretrained(tmp_path / "again")
    again = SpectralTokenizerForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.max_text_tokens == 3 and torch.equal(again.text_null.weight, loaded.text_null.weight)


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instantiated", [0, 64 << 20], ids=["pairs", "within the memory budget"])
def test_the_clipped_sum_equals_an_explicit_loop(instantiated):
    model = wild(text_model()).double()
    ids, states = sequences(model, 6), texts(6, seed=6).double()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {"text_projection.weight", "text_null.weight"} <= set(names)
    gradients = []
    for row in range(6):
        model.zero_grad()
        model.per_example_loss(ids[row : row + 1], text_states=states[row : row + 1]).sum().backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    norms = torch.tensor([sum(float(g.square().sum()) for g in each) ** 0.5 for each in gradients])
    assert float(norms.min()) > 0
    bound = float(norms.median())  # some are clipped, some are not
    factors = (bound / norms).clamp(max=1)
    expected = [sum(f * each[i] for f, each in zip(factors, gradients, strict=True)) for i in range(len(names))]
    model.zero_grad()
    clipper = PerExampleClipper(model, bound, memory_budget=instantiated)
    for some in torch.arange(6).split(4):  # micro-batches of unequal size
        clipper.add(lambda some=some: model.per_example_loss(ids[some], text_states=states[some]), len(some))
    found = clipper.take()
    assert list(found) == names
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_a_row_without_text_trains_the_null_slot_only():
    model = text_model()
    clipper = PerExampleClipper(model, 1.0)
    clipper.add(lambda: model.per_example_loss(sequences(model), text_states=torch.zeros(4, SLOTS, WIDTH)), 4)
    sums = clipper.take()
    assert not sums["text_projection.weight"].any() and sums["text_null.weight"].any()
