"""Text encoder: any kind gives states of one scale, a text's states are its own, and what does not fit is refused."""

import pytest
import torch
from text_parts import SLOTS, WIDTH, minilm, text_encoder, text_model, tokenizer, whole_model

from hf_spectral_dp.text_encoder import check_text_encoder, encode_text, load_text_encoder, text_encoder_fingerprint


@pytest.mark.parametrize(("kind", "name"), [("bert", "BertModel"), ("t5", "T5EncoderModel"), ("clip", "CLIPTextModel")])
def test_every_kind_is_loaded_as_its_frozen_text_encoder(kind, name, tmp_path):
    encoder, words = text_encoder(tmp_path, kind)
    assert type(encoder).__name__ == name and not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    states = encode_text(encoder, words, ["a red circle", "blue", "", "  "], SLOTS)
    assert states.shape == (4, SLOTS, WIDTH) and states.dtype == torch.float16
    used = (states != 0).any(-1)
    assert used.tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4, [False] * SLOTS, [False] * SLOTS]
    torch.testing.assert_close(states[used].float().square().mean(-1), torch.ones(4), atol=2e-3, rtol=0)
    # The weights are those of the saved model, not new ones.
    whole = {key: value for key, value in whole_model(kind).state_dict().items()}
    for key, value in encoder.state_dict().items():
        assert any(torch.equal(value, other) for other in whole.values() if other.shape == value.shape), key


def test_states_by_hand(tmp_path):
    encoder, words = text_encoder(tmp_path)
    output = encoder(**words(["a red circle"], return_tensors="pt")).last_hidden_state[0]
    expected = output / output.square().mean(-1, keepdim=True).sqrt()
    states = encode_text(encoder, words, ["a red circle"], SLOTS)[0, :3].float()
    torch.testing.assert_close(states, expected, atol=2e-3, rtol=0)  # float16 of values near one


def test_neighbours_and_length_change_no_text(tmp_path):
    encoder, words = text_encoder(tmp_path)
    alone = encode_text(encoder, words, ["a red circle"], SLOTS)[0]
    torch.testing.assert_close(encode_text(encoder, words, ["green", " a red circle "], SLOTS)[1], alone)
    cut = encode_text(encoder, words, ["a red circle " + "blue " * 10**5], 2)[0]  # at once, for all its length
    torch.testing.assert_close(cut, encode_text(encoder, words, ["a red"], 2)[0])


def test_the_fingerprint_sees_weights_and_words(tmp_path):
    encoder, words = text_encoder(tmp_path / "one")
    first = text_encoder_fingerprint(encoder, words)
    assert first == text_encoder_fingerprint(*load_text_encoder(str(tmp_path / "one")))
    words.add_tokens(["purple"])
    assert text_encoder_fingerprint(encoder, words) != first
    with torch.no_grad():
        next(encoder.parameters())[0, 0] += 1
    assert text_encoder_fingerprint(encoder, tokenizer()) != first


def test_what_does_not_fit_is_refused(tmp_path):
    encoder, words = text_encoder(tmp_path)
    config = text_model().config
    check_text_encoder(encoder, words, config)
    with pytest.raises(ValueError, match="text_encoder=None.*load_text_encoder"):
        check_text_encoder(None, words, config)
    with pytest.raises(ValueError, match="tokenizer=None"):
        check_text_encoder(encoder, None, config)
    with pytest.raises(ValueError, match="hidden_size=8 but the model has text_width=12"):
        check_text_encoder(encoder, words, text_model(text_width=12).config)
    with pytest.raises(ValueError, match="max_text_tokens=17 .*at most 16"):
        check_text_encoder(encoder, words, text_model(max_text_tokens=17).config)
    words.pad_token = None
    with pytest.raises(ValueError, match="no pad_token"):
        check_text_encoder(encoder, words, config)


def test_the_real_encoder_knows_what_words_mean():
    encoder, words = load_text_encoder(minilm())
    states = encode_text(encoder, words, ["a crimson disc", "a red circle", "a blue square"], 8).float()
    pooled = torch.nn.functional.normalize(states.sum(1), dim=-1)
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.1
