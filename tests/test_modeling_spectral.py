"""Model: a position speaks only its scale's codes, rows do not meet, and transformers' and PEFT's tools work."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import sequences, tiny_model, wild
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM, modeling_spectral
from hf_spectral_dp.sampling import draw, step

torch.set_num_threads(1)

LENGTH, CODES, CLASSES = 12, 48, 10  # of `tiny_model`: three scales of four positions and sixteen codes


@pytest.fixture(scope="module")
def model() -> SpectralTokenizerForCausalLM:
    """Shared: no test may change it."""
    return wild(tiny_model())


def assert_legal(tokens: torch.Tensor) -> None:
    """(rows, t): the first four ids lie in [0, 16), the next four in [16, 32), the last four in [32, 48)."""
    scale = torch.arange(tokens.shape[1]) // 4
    assert (tokens.div(16, rounding_mode="floor") == scale).all()


@pytest.fixture
def drawn(monkeypatch) -> list[torch.Tensor]:
    """The logits that `sample` draws from, one entry (rows, vocabulary) per position."""
    seen: list[torch.Tensor] = []

    def record(logits, *arguments):
        first = 16 * (len(seen) // 4)  # only the codes of the position's scale are computed
        seen.append(F.pad(logits, (first, CODES + CLASSES + 1 - 16 - first), value=float("-inf")))
        return draw(logits, *arguments)

    monkeypatch.setattr(modeling_spectral, "draw", record)
    return seen


# A position never speaks another scale's codes.


@torch.no_grad()
def test_logits_of_foreign_codes_are_the_lowest_value(model):
    logits = model(sequences(model)).logits
    assert logits.shape == (4, 1 + LENGTH, CODES + CLASSES + 1)
    for position in range(1 + LENGTH):
        index = min(position // 4, 2)  # the position after the last one keeps the last scale
        own = torch.zeros(logits.shape[-1], dtype=torch.bool)
        own[16 * index : 16 * index + 16] = True
        assert (logits[:, position, ~own] == torch.finfo(torch.float32).min).all()
        assert (logits[:, position, own].abs() < 1e3).all()


def test_each_scale_has_a_temperature_of_its_own(model):
    """Details near zero: varied coarse tokens, for each of them the likeliest details. One number is one for all."""
    labels = torch.zeros(40, dtype=torch.long)

    def draw(temperature):
        return model.sample(labels, temperature=temperature, generator=torch.Generator().manual_seed(2))

    tokens = draw([1.0, 1e-6, 1e-6])
    assert len({tuple(row) for row in tokens[:, :4].tolist()}) > 5
    start = model.start_tokens(labels)
    logits = model(torch.cat([start[:, None], tokens[:, :-1]], 1), use_cache=False).logits
    assert torch.equal(logits.argmax(-1)[:, 4:], tokens[:, 4:])
    assert torch.equal(draw([0.7] * 3), draw(0.7)) and not torch.equal(draw([0.7, 0.7, 5.0]), draw(0.7))


def test_sampling_works_under_autocast_and_takes_numbers_of_any_kind(model):
    labels = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.sample(labels, temperature=np.float32(0.7), generator=torch.Generator().manual_seed(2))
    assert tokens.shape == (4, model.config.layout.length)


@pytest.mark.parametrize("temperature", [1e-37, 1e-10, 0.7, 1e3, 1e30, 1e38, float("inf")])
@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, -2.0, 3.0, 1e30])
def test_samples_are_legal_for_every_setting(model, temperature, guidance_scale):
    labels = torch.arange(CLASSES).repeat(3)
    generator = torch.Generator().manual_seed(1)
    for top_k, top_p in ((0, 1.0), (1, 1.0), (5, 0.9), (17, 1.0), (1000, 1e-9)):
        tokens = model.sample(labels, None, guidance_scale, temperature, top_k, top_p, generator)
        assert tokens.shape == (len(labels), LENGTH)
        assert_legal(tokens)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}, {"temperature": 50.0, "top_k": 0}],
)
def test_generate_agrees_with_the_layout(model, options):
    torch.manual_seed(0)
    start = model.start_tokens(torch.arange(CLASSES))[:, None]
    sequence = model.generate(start, **options)
    assert sequence.shape == (CLASSES, 1 + LENGTH) and torch.equal(sequence[:, :1], start)
    assert_legal(sequence[:, 1:])
    assert model.decode(sequence[:, 1:]).shape == (CLASSES, 1, 16, 16)


def test_generate_without_input_starts_at_the_null_token(model):
    sequence = model.generate()
    assert sequence.shape == (1, 1 + LENGTH) and sequence[0, 0] == model.config.null_token_id
    assert_legal(sequence[:, 1:])


# Sampling draws from the model's distribution.


@pytest.mark.parametrize("labels", [torch.arange(4), None])
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(model, drawn, labels):
    tokens = model.sample(labels, 4, temperature=1.7)
    start = model.start_tokens(labels, 4)
    expected = model(torch.cat([start[:, None], tokens], 1), use_cache=False).logits[:, :-1] / 1.7
    # Two orders of summation of float32 values near one.
    torch.testing.assert_close(torch.stack(drawn, 1).softmax(-1), expected.softmax(-1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_greedy_sampling_generate_and_an_explicit_loop_agree(model):
    labels = torch.arange(CLASSES)
    sequence = model.start_tokens(labels)[:, None]
    for _ in range(LENGTH):
        sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.sample(labels, top_k=1), sequence[:, 1:])
    assert torch.equal(model.sample(labels, top_p=1e-9), sequence[:, 1:])
    assert torch.equal(model.generate(sequence[:, :1], do_sample=False), sequence)


def test_guidance_by_hand(model, drawn):
    labels, weight = torch.tensor([3, 7]), 2.5
    tokens = model.sample(labels, guidance_scale=weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        classes = model(torch.cat([model.start_tokens(labels)[:, None], tokens], 1)).logits[:, :-1]
        nulls = model(torch.cat([model.start_tokens(None, 2)[:, None], tokens], 1)).logits[:, :-1]
    expected = (nulls + weight * (classes - nulls)).softmax(-1)
    torch.testing.assert_close(torch.stack(drawn, 1).softmax(-1), expected, atol=1e-5, rtol=0)
    assert (expected - classes.softmax(-1)).abs().max() > 0.1  # the weight matters here
    assert (expected - nulls.softmax(-1)).abs().max() > 0.1


def test_guidance_of_one_is_plain_and_of_zero_unconditional(model):
    labels = torch.arange(CLASSES)

    def sample(*arguments, **options):
        return model.sample(*arguments, **options, generator=torch.Generator().manual_seed(5))

    plain = sample(labels)
    assert torch.equal(sample(labels, guidance_scale=1.0), plain)
    assert torch.equal(sample(labels, guidance_scale=1 + 1e-7), plain)
    assert torch.equal(sample(labels, guidance_scale=0.0), sample(None, CLASSES))
    assert not torch.equal(sample(labels, guidance_scale=3.0), plain)


@torch.no_grad()
def test_samples_follow_the_probabilities(model):
    number = 20_000
    tokens = model.sample(torch.full((number,), 2), num_tokens=1, generator=torch.Generator().manual_seed(0))
    probabilities = model(model.start_tokens(torch.tensor([2]))[:, None]).logits[0, 0].softmax(-1)
    frequencies = tokens[:, 0].bincount(minlength=len(probabilities)) / number
    # Five standard deviations of a frequency, plus room for codes that are drawn once.
    bound = 5 * (probabilities * (1 - probabilities) / number).sqrt() + 2 / number
    assert ((frequencies - probabilities).abs() <= bound).all()


def test_a_generator_reproduces_samples_and_spares_the_global_one(model):
    state = torch.get_rng_state()
    first, again, other = (model.sample(None, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    short = model.sample(None, 8, num_tokens=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(short, first[:, :5])
    assert model.sample(None, 8, num_tokens=0).shape == (8, 0)


def test_class_probabilities_are_bayes_rule_by_hand(model):
    tokens = sequences(model)[:, 1:]
    found = model.class_probabilities(tokens)
    for row in range(len(tokens)):
        weights = []
        for label in range(CLASSES):
            whole = torch.cat([model.start_tokens(torch.tensor([label])), tokens[row]])[None]
            logits = model(whole[:, :-1]).logits[0].log_softmax(-1).detach()
            weights.append(float(logits.gather(1, whole[0, 1:, None]).sum()))
        assert found[row].allclose(torch.tensor(weights).softmax(0), atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_more_attempts_agree_with_their_class_more_often_and_keep_what_agreed(model, compiled, monkeypatch):
    labels = torch.arange(200) % CLASSES
    if compiled:
        monkeypatch.setattr(model, "_compiled_step", step)  # what is compiled is always called with as many rows

    def drawn(attempts: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = model.sample(labels, attempts=attempts, generator=torch.Generator().manual_seed(0))
        assert_legal(tokens)
        return tokens, model.class_probabilities(tokens).argmax(1) == labels

    (once, right), (often, agreeing) = drawn(1), drawn(8)
    assert torch.equal(once[right], often[right]) and not torch.equal(once, often)
    assert right.float().mean() < 0.9 and agreeing.float().mean() > right.float().mean() + 0.05
    for refused in ({"attempts": 0, "class_labels": labels}, {"attempts": 2, "num_samples": 4}):
        with pytest.raises(ValueError, match="attempts="):
            model.sample(**refused)


# Conditioning.


def test_start_tokens_by_hand(model):
    assert model.start_tokens(torch.tensor([0, 9])).tolist() == [48, 57]
    assert model.start_tokens(None, 3).tolist() == [58, 58, 58]


@torch.no_grad()
def test_every_start_token_gives_its_own_distribution(model):
    start = torch.cat([model.start_tokens(torch.arange(CLASSES)), model.start_tokens(None, 1)])
    first = model(start[:, None]).logits[:, 0, :16].softmax(-1)
    distances = torch.cdist(first, first, p=1) + 2 * torch.eye(len(first))
    assert distances.min() > 1e-3


def test_scale_weights_say_how_much_the_tokens_of_a_scale_count(model):
    rows = sequences(model, 5)
    with torch.no_grad():
        own = model(rows[:, :-1], targets=rows[:, 1:], use_cache=False).loss.view(5, 3, 4).mean(2)  # by scale
        weighted = model.per_example_loss(rows, scale_weights=[1.0, 0.5, 0.25])
        torch.testing.assert_close(weighted, (4 * own[:, 0] + 2 * own[:, 1] + own[:, 2]) / 7)
        torch.testing.assert_close(model.per_example_loss(rows, scale_weights=[0.0, 3.0, 0.0]), own[:, 1])
        torch.testing.assert_close(model.per_example_loss(rows, scale_weights=[2.0] * 3), model.per_example_loss(rows))
        with pytest.raises(ValueError, match="3 scales; give one for each"):
            model.per_example_loss(rows, scale_weights=[1.0, 1.0])


def test_dropping_the_class_trains_the_null_token_only():
    """A row whose class is replaced by the null token leaves the embedding of its class untouched."""
    model = tiny_model()
    rows = sequences(model)
    rows[:, 0] = model.start_tokens(None, len(rows))
    model.per_example_loss(rows).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[model.config.null_token_id].abs().max() > 0
    assert (gradient[model.config.class_token_ids] == 0).all()


# Saving and loading.


@torch.no_grad()
def test_saved_as_safetensors_and_loaded_by_auto_classes(model, tmp_path):
    rows = sequences(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "generation_config.json"}
    for load in (AutoModelForCausalLM, SpectralTokenizerForCausalLM):
        loaded = load.from_pretrained(tmp_path)
        assert type(loaded) is SpectralTokenizerForCausalLM and not loaded.training
        assert torch.equal(loaded(rows).logits, model(rows).logits)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert_legal(loaded.generate()[:, 1:])


def test_a_sharded_model_is_safetensors_too(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    loaded = SpectralTokenizerForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_loaded_in_a_fresh_process(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    rows = sequences(model)
    torch.save(rows, tmp_path / "rows.pt")
    script = (
        "import sys, torch, hf_spectral_dp; torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/model')\n"
        "logits = model(torch.load(sys.argv[1] + '/rows.pt')).logits.detach()\n"
        "tokens = model.sample(torch.arange(10), guidance_scale=2.0, generator=torch.Generator().manual_seed(0))\n"
        "torch.save((logits, tokens, model.decode(tokens)), sys.argv[1] + '/result.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=os.environ, capture_output=True)
    logits, tokens, images = torch.load(tmp_path / "result.pt")
    assert torch.equal(logits, model(rows).logits)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(tokens, model.sample(torch.arange(10), guidance_scale=2.0, generator=generator))
    assert torch.equal(images, model.decode(tokens))


def test_tied_embeddings_are_one_parameter_also_after_loading(tmp_path):
    fields = {name: getattr(tiny_model().config, name) for name in ("image_size", "levels", "patch_sizes")}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SpectralTokenizerForCausalLM(SpectralConfig(**fields, **small, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    for tied in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert tied.lm_head.weight is tied.get_input_embeddings().weight
        assert "lm_head.weight" not in dict(tied.named_parameters())
    assert torch.equal(tied.lm_head.weight, model.lm_head.weight)
    assert tiny_model().lm_head.weight is not tiny_model().get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_and_decodes(tmp_path, dtype):
    wild(tiny_model()).save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    tokens = half.sample(torch.arange(CLASSES), guidance_scale=2.0)
    assert_legal(tokens)
    assert half.decode(tokens).abs().max() <= 1
    assert half.per_example_loss(sequences(half)).isfinite().all()


# Training with transformers' and PEFT's own tools.


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, adapted):
    def gradients(checkpointing: bool) -> tuple[int, dict[str, torch.Tensor]]:
        model = wild(tiny_model()).train()
        calls: list[int] = []
        model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            with pytest.raises(ValueError, match=r"call model.eval\(\) before sampling"):
                model.sample(num_samples=1)
        if adapted:
            model.enable_input_require_grads()
            torch.manual_seed(0)
            config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            model = get_peft_model(model, config)
        rows = sequences(model)
        model.per_example_loss(rows).mean().backward()
        return len(calls), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    once, expected = gradients(False)
    twice, found = gradients(True)
    assert (once, twice) == (1, 2)  # the layer is computed again during the backward pass
    assert found.keys() == expected.keys() and len(found) == (4 if adapted else 13)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_lora_wraps_trains_and_is_saved(tmp_path):
    base, rows = wild(tiny_model()), sequences(tiny_model(), 8)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 4 and all("lora_" in name for name in trainable)
    frozen = {name: value.clone() for name, value in adapted.state_dict().items() if "lora_" not in name}

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = adapted(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    state = adapted.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())

    adapted.eval()
    logits = adapted(input_ids=rows).logits.detach()
    assert_legal(adapted.generate(input_ids=rows[:, :1])[:, 1:])
    assert_legal(adapted.sample(torch.arange(CLASSES)))
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    again = PeftModel.from_pretrained(wild(tiny_model()), tmp_path).eval()
    assert torch.equal(again(input_ids=rows).logits, logits)
    merged = again.merge_and_unload()
    assert type(merged) is SpectralTokenizerForCausalLM
    torch.testing.assert_close(merged(rows).logits, logits, atol=1e-4, rtol=0)  # one product of weights first


def test_accumulated_batches_of_the_plain_trainer_equal_one_batch(tmp_path):
    """The Trainer must know that `loss` is a mean of its own batch, else accumulation multiplies the gradient."""

    def weights(batch_size: int, accumulation: int) -> torch.Tensor:
        model = wild(tiny_model())
        rows = [{"input_ids": row, "labels": row} for row in sequences(model, 4)]
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        return model.lm_head.weight.detach()

    torch.testing.assert_close(weights(1, 4), weights(4, 1), atol=1e-6, rtol=0)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_samples=None without class_labels"),
        ({"class_labels": torch.tensor([0, 10])}, r"class_labels in \[0, 10\].*num_classes=10; labels run from 0"),
        ({"class_labels": torch.tensor([-1])}, r"class_labels in \[-1, -1\]"),
        ({"num_samples": 1, "num_tokens": 13}, r"num_tokens=13 must be in \[0, 12\]"),
        ({"num_samples": 1, "num_tokens": -1}, "num_tokens=-1"),
        ({"num_samples": 1, "temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"num_samples": 1, "temperature": -1.0}, "temperature=-1.0"),
        ({"num_samples": 1, "temperature": float("nan")}, "temperature=nan"),
        ({"num_samples": 1, "temperature": [1.0, 0.5]}, "or 3 of them, one per scale"),
        ({"num_samples": 1, "temperature": [1.0, 0.5, 0.0]}, r"temperature=\[1.0, 0.5, 0.0\] must be > 0"),
        ({"num_samples": 1, "top_p": 0.0}, r"top_p=0.0 in \(0, 1\]"),
        ({"num_samples": 1, "top_p": 1.1}, "top_p=1.1"),
        ({"num_samples": 1, "top_p": "0.9"}, "top_p='0.9'"),
        ({"num_samples": 1, "temperature": "0.9"}, "temperature='0.9' must be > 0"),
        ({"num_samples": 1, "top_p": float("nan")}, "top_p=nan"),
        ({"num_samples": 1, "top_k": -1}, "top_k=-1 a whole number >= 0"),
        ({"num_samples": 1, "guidance_scale": 2.0}, "guidance_scale=2.0 .*needs class_labels or text_states; use 1.0"),
        ({"class_labels": torch.tensor([1]), "guidance_scale": float("nan")}, "guidance_scale=nan must be finite"),
        ({"class_labels": torch.tensor([1]), "guidance_scale": float("inf")}, "guidance_scale=inf"),
    ],
)
def test_errors_name_field_value_and_rule(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**arguments)


def test_an_unconditional_model_takes_no_labels(colour_model):
    assert_legal(colour_model.sample(num_samples=3))
    assert colour_model.decode(colour_model.sample(num_samples=2)).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="num_classes=0"):
        colour_model.sample(torch.tensor([0]))


def test_loading_with_another_number_of_classes_does_not_misplace_the_null_token(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch|ignore_mismatched_sizes"):
        SpectralTokenizerForCausalLM.from_pretrained(tmp_path, num_classes=3)
