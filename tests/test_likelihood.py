"""The likelihood of token rows: every position's own codes only, no row sees another, no position a later one."""

import pytest
import torch
import torch.nn.functional as F
from conftest import sequences, tiny_model, wild
from peft import LoraConfig, get_peft_model
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.modeling_spectral import CodeHead

LENGTH = 12


@pytest.fixture(scope="module")
def model() -> SpectralTokenizerForCausalLM:
    """Shared: no test may change it."""
    return wild(tiny_model())


@pytest.mark.parametrize("length", [1, 3, LENGTH])
def test_the_loss_is_that_over_all_codes_with_foreign_ones_shut_out(model, length):
    rows = sequences(model, 5)[:, : 1 + length]
    logits = model(rows).logits[:, :-1]  # the mask gives codes of other scales no probability
    each = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(5, length)
    torch.testing.assert_close(model.per_example_loss(rows), each.mean(1))
    labels = rows.masked_fill(torch.arange(1 + length) % 3 == 2, -100)
    kept = labels[:, 1:] != -100
    torch.testing.assert_close(model(rows, labels=labels).loss, each[kept].mean())
    output = model(rows[:, :-1], targets=rows[:, 1:])
    torch.testing.assert_close(output.loss, each)
    assert output.logits is None


def test_training_makes_no_logits_that_nobody_reads(model):
    rows, before = sequences(model), model(sequences(model), labels=sequences(model))
    model.train()
    try:
        training = model(rows, labels=rows)
    finally:
        model.eval()
    torch.testing.assert_close(training.loss, before.loss)
    assert training.logits is None and before.logits is not None
    assert model(rows).logits is not None


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_must_stay_whole_gives_the_same_loss(tied):
    """An adapter around the head, or a head that is the embedding as well."""
    config = SpectralConfig.from_dict(tiny_model().config.to_dict(), tie_word_embeddings=tied)
    model = wild(SpectralTokenizerForCausalLM(config))
    rows = sequences(model)
    loss = model.per_example_loss(rows)
    if not tied:
        get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2))
        assert not isinstance(model.lm_head, CodeHead)
    else:
        logits = model(rows).logits[:, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(4, -1).mean(1)
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.per_example_loss(rows), loss)


def test_a_token_of_another_scale_is_refused(model):
    rows = sequences(model, 2)
    rows[1, 5], rows[1, 4] = rows[1, 4].clone(), rows[1, 5].clone()  # the last of scale 0 and the first of scale 1
    with pytest.raises(IndexError, match="out of bounds"):
        model.per_example_loss(rows)


def test_no_token_of_another_scale_passes_for_one_to_ignore():
    """Token 28 where codes begin at 128: a hundred too low, and -100 says that a target does not count."""
    config = SpectralConfig.from_dict(tiny_model().config.to_dict(), codebook_sizes=[128, 16, 16])
    large = SpectralTokenizerForCausalLM(config)
    rows = sequences(large, 2)
    rows[1, 5] = 28
    with pytest.raises(IndexError, match="out of bounds"):
        large.per_example_loss(rows)


def test_labels_need_rows_from_their_start(model):
    rows = sequences(model, 2)
    for what in ("labels", "targets"):
        with pytest.raises(ValueError, match="start token"):
            model(rows, **{what: rows}, position_ids=torch.arange(rows.shape[1])[None])


@torch.no_grad()
def test_per_example_loss_equals_an_explicit_loop(model):
    rows = sequences(model)
    logits = model(rows[:, :-1]).logits.double()
    losses = model.per_example_loss(rows)
    assert losses.shape == (len(rows),)
    for i, row in enumerate(rows):
        total = 0.0
        for t in range(LENGTH):
            own = slice(16 * (t // 4), 16 * (t // 4) + 16)
            total -= logits[i, t, own].log_softmax(0)[row[t + 1] % 16].item()
        assert losses[i].item() == pytest.approx(total / LENGTH, abs=1e-5)  # float32 against float64


@torch.no_grad()
def test_the_loss_of_a_row_does_not_depend_on_another_row(model):
    rows, others = sequences(model, 6), sequences(model, 6, seed=1)
    losses = model.per_example_loss(rows)
    for changed in range(6):
        mixed = rows.clone()
        mixed[changed] = others[changed]
        kept = torch.arange(6) != changed
        assert torch.equal(model.per_example_loss(mixed)[kept], losses[kept])
    alone = torch.cat([model.per_example_loss(row[None]) for row in rows])
    torch.testing.assert_close(alone, losses, atol=1e-6, rtol=0)  # another batch size sums in another order


@torch.no_grad()
def test_no_position_sees_a_later_one(model):
    rows, others = sequences(model), sequences(model, seed=1)
    logits = model(rows).logits
    for t in range(1, 1 + LENGTH):
        changed = model(torch.cat([rows[:, :t], others[:, t:]], 1)).logits
        torch.testing.assert_close(changed[:, :t], logits[:, :t], atol=1e-5, rtol=0)
    assert (changed[:, -1] != logits[:, -1]).any()


@torch.no_grad()
def test_the_position_embedding_reaches_its_position_and_the_later_ones():
    model, rows = wild(tiny_model()), sequences(tiny_model())
    before = model(rows).logits
    model.position_embedding.weight[3] += 1.0
    moved = (model(rows).logits - before).abs().amax((0, 2)) > 1e-4
    assert moved.tolist() == [False] * 3 + [True] * (LENGTH - 2)


@torch.no_grad()
def test_labels_follow_the_convention_of_transformers(model):
    rows = sequences(model)
    labels = rows.clone()
    labels[0, 3:] = -100
    labels[2, 1] = -100
    output = model(rows, labels=labels)
    expected = ForCausalLMLoss(output.logits, labels, model.config.vocab_size)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(rows, labels=rows).loss, model.per_example_loss(rows).mean())
    assert model(rows).loss is None


@torch.no_grad()
def test_embeddings_and_a_full_mask_change_nothing(model):
    rows = sequences(model)
    logits = model(rows).logits
    torch.testing.assert_close(model(rows, attention_mask=torch.ones_like(rows)).logits, logits)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(rows)).logits, logits)
    positions = torch.arange(1 + LENGTH).expand_as(rows)
    torch.testing.assert_close(model(rows, position_ids=positions).logits, logits)
