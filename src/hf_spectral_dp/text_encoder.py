"""Texts to states: the frozen, public text encoder that captions and prompts pass through.

Any encoder of transformers will do (CLIP's, T5's, BERT and its kind). It is never trained here, so nothing of the
private captions gets into it; what the trained model learns of them is in its own projection of the states.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel, PreTrainedModel

_LONGEST = 10_000
"""Characters of a text that are read: far beyond what any number of slots holds, and a wall against floods."""


def load_text_encoder(source: str, **options: Any) -> tuple[PreTrainedModel, Any]:
    """The text encoder in a folder or Hub repository, frozen and in evaluation mode, and its tokenizer.

    Of a model with two parts (CLIP, T5) only the text encoder is loaded. Weights are read from safetensors only, and no
    code of the repository is run.

    Args:
        source: folder or Hub id of a PUBLIC model.
        options: as in `from_pretrained` of transformers, such as `revision`, `token` or `cache_dir`.
    """
    kind = type(AutoConfig.from_pretrained(source, **options))
    if kind.model_type in ("clip", "clip_text_model"):  # a CLIP repository names the whole model
        family: Any = CLIPTextModel
    else:
        family = AutoModelForTextEncoding if kind in AutoModelForTextEncoding._model_mapping else AutoModel
    encoder = family.from_pretrained(source, use_safetensors=True, **options)
    return encoder.eval().requires_grad_(False), AutoTokenizer.from_pretrained(source, **options)


def check_text_encoder(encoder: Any, tokenizer: Any, config: Any) -> None:
    """Whether a text encoder and its tokenizer fit a `SpectralConfig`.

    Raises:
        ValueError: one is missing, the widths differ, the encoder takes fewer tokens, or nothing pads.
    """
    for name, component in (("text_encoder", encoder), ("tokenizer", tokenizer)):
        if component is None:
            raise ValueError(
                f"{name}=None, and text needs both text_encoder and tokenizer; load them with"
                " text_encoder.load_text_encoder(folder_or_hub_id) and pass both."
            )
    if encoder.config.hidden_size != config.text_width:
        raise ValueError(
            f"text_encoder {type(encoder).__name__} has hidden_size={encoder.config.hidden_size} but the model has"
            f" text_width={config.text_width}{'' if config.text_width else ' (no text)'}; use the encoder that the"
            " model was trained with."
        )
    limit = getattr(encoder.config, "max_position_embeddings", None)
    if limit is not None and limit < config.max_text_tokens:
        raise ValueError(
            f"max_text_tokens={config.max_text_tokens} but {type(encoder).__name__} takes at most {limit} tokens;"
            " use a smaller number."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} has no pad_token; set tokenizer.pad_token = tokenizer.eos_token."
        )


@torch.no_grad()
def encode_text(encoder: Any, tokenizer: Any, texts: Sequence[str], max_text_tokens: int) -> Tensor:
    """States (B, max_text_tokens, width), float16 on the CPU, of B texts; longer texts are cut.

    Every state is scaled to mean square 1, so that one learning rate fits every encoder and float16 holds them all.
    Slots beyond a text's end are zero, and so are all slots of an empty text, the null condition. Texts are always
    padded to the same length, so that the states of one do not depend on its neighbours.
    """
    states = torch.zeros(len(texts), max_text_tokens, encoder.config.hidden_size, dtype=torch.float16)
    given = [index for index, text in enumerate(texts) if text.strip()]
    if given:
        tokens = tokenizer(
            [texts[index].strip()[:_LONGEST] for index in given],
            padding="max_length", truncation=True, max_length=max_text_tokens, return_tensors="pt",
        )  # fmt: skip
        mask = tokens["attention_mask"]
        output = encoder(input_ids=tokens["input_ids"].to(encoder.device), attention_mask=mask.to(encoder.device))
        found = F.rms_norm(output.last_hidden_state.float(), (states.shape[-1],)).cpu()
        states[given] = (found * mask[..., None]).half()
    return states


def text_encoder_fingerprint(encoder: Any, tokenizer: Any) -> str:
    """SHA-256 (hex) of an encoder's weights and its tokenizer's vocabulary."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


__all__ = ["check_text_encoder", "encode_text", "load_text_encoder", "text_encoder_fingerprint"]
