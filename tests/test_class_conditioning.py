"""A public model takes other classes, and knows nothing of them until it is trained."""

import pytest
import torch
from conftest import sequences, tiny_model, wild
from transformers import AutoModelForCausalLM

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM

CODES = 48  # of `tiny_model`


@pytest.mark.parametrize("classes", [0, 3, 10, 12])
@pytest.mark.parametrize("tied", [False, True])
def test_other_classes_start_from_the_null_condition(classes, tied):
    config = SpectralConfig.from_dict(tiny_model().config.to_dict(), tie_word_embeddings=tied)
    before = wild(SpectralTokenizerForCausalLM(config))
    after = before.with_classes(classes)
    assert after.config.num_classes == classes and after.config.vocab_size == CODES + classes + 1
    rows = sequences(before)
    rows[:, 0] = before.config.null_token_id
    wanted = before(input_ids=rows).logits[..., :CODES]
    for start in (*after.config.class_token_ids, after.config.null_token_id):
        rows[:, 0] = start
        torch.testing.assert_close(after(input_ids=rows).logits[..., :CODES], wanted)
        assert (after(input_ids=rows).logits[..., CODES:] < -1e30).all()
    for index in range(3):
        assert torch.equal(after.codec.codebook(index), before.codec.codebook(index))
    assert (after.lm_head.weight is after.model.embed_tokens.weight) == tied
    with torch.no_grad():  # nothing is shared
        after.position_embedding.weight.add_(1)
    assert not torch.equal(after.position_embedding.weight, before.position_embedding.weight)


def test_other_classes_are_saved_and_loaded(tmp_path):
    tiny_model().with_classes(3).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.class_token_ids == [CODES, CODES + 1, CODES + 2]
    with pytest.raises(ValueError, match="num_classes=-1"):
        tiny_model().with_classes(-1)


def test_every_weight_keeps_its_precision_and_the_codec_its_tokens():
    before = tiny_model().bfloat16()
    before.codec.float()  # as `from_pretrained(..., dtype=torch.bfloat16)` loads it
    after = before.with_classes(3)
    assert {name: value.dtype for name, value in after.state_dict().items()} == {
        name: value.dtype for name, value in before.state_dict().items()
    }
    assert after.codec.codebook(0).dtype == torch.float32 and after.lm_head.weight.dtype == torch.bfloat16
    assert all(parameter.requires_grad for parameter in after.parameters())
