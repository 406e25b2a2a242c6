"""The causal transformer over coarse-to-fine wavelet tokens, with the frozen codec inside.

The transformer is transformers' own `LlamaModel` (RMSNorm, SwiGLU, SDPA attention, key-value cache). Ours are: the
learned position embedding, which also tells the scale; the rule that a position may only emit code words of its own
scale; conditioning by a start token (class or null); and sampling with classifier-free guidance.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from .codec import SpectralCodec
from .configuration_spectral import SpectralConfig
from .safe_loading import SafetensorsOnly


class SpectralTokenizerForCausalLM(SafetensorsOnly, PreTrainedModel, GenerationMixin):
    """Autoregressive model of `config.layout.length` wavelet tokens after one start token.

    Input ids are (B, 1 + t): a start token (`config.class_token_ids[label]` or `config.null_token_id`), then image
    tokens coarse to fine. `codec` turns images into tokens and back; it is frozen and saved with the model.
    """

    config: SpectralConfig
    config_class = SpectralConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["LlamaDecoderLayer"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict = ["codec"]  # rounded code words would change the tokens
    accepts_loss_kwargs = False  # `loss` is the mean of its batch: the Trainer divides by the accumulation steps

    def __init__(self, config: SpectralConfig):
        super().__init__(config)
        self.codec = SpectralCodec(config)
        self.model = LlamaModel(config)
        self.position_embedding = nn.Embedding(config.layout.length + 1, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        layout = config.layout
        # allowed[i, v]: may code v follow at image position i? One extra row, for the position after the last.
        allowed = torch.zeros(layout.length + 1, config.vocab_size, dtype=torch.bool)
        for position, index in enumerate([*layout.scale_of_position, len(layout.scales) - 1]):
            scale = layout.scales[index]
            allowed[position, scale.first_id : scale.first_id + scale.codes] = True
        self.register_buffer("allowed", allowed, persistent=True)
        self.post_init()
        if self.can_generate() and self.generation_config is not None:
            self.generation_config.max_length = layout.length + 1
            self.generation_config.do_sample = True

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, t, vocab_size) for the next token; codes of a foreign scale get the lowest finite value.

        `labels` (B, t), as in every causal LM of transformers: equal to `input_ids`, shifted inside, -100 ignored;
        `loss` is the mean negative log-likelihood per token in nats.
        """
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
        position_ids = position_ids.expand(batch, length)
        outputs = self.model(
            inputs_embeds=inputs_embeds + self.position_embedding(position_ids),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        logits = logits.masked_fill(~self.allowed[position_ids], torch.finfo(logits.dtype).min)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def per_example_loss(self, input_ids: Tensor) -> Tensor:
        """Mean negative log-likelihood per token, in nats, of each row (B, 1 + T): a Tensor (B,).

        The divisor is the public length T, so that the loss of one row never depends on another row.
        """
        logits, targets = self(input_ids=input_ids[:, :-1], use_cache=False).logits.float(), input_ids[:, 1:]
        # Flat: with the classes in the middle, as (B, V, T), torch's loss takes seven times as long on a CPU.
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1)

    def start_tokens(self, class_labels: Tensor | None, num_samples: int | None = None) -> Tensor:
        """Start token ids (B,): of the class labels, or null tokens.

        Raises:
            ValueError: labels for an unconditional model, labels out of range, or neither labels nor a number.
        """
        if class_labels is None:
            if num_samples is None:
                raise ValueError("num_samples=None without class_labels; say how many images to sample.")
            return torch.full((num_samples,), self.config.null_token_id, device=self.device)
        classes = self.config.num_classes
        if class_labels.numel() and not (0 <= int(class_labels.min()) and int(class_labels.max()) < classes):
            raise ValueError(
                f"class_labels in [{int(class_labels.min())}, {int(class_labels.max())}] but the model has"
                f" num_classes={classes}; labels run from 0 to num_classes - 1."
            )
        return class_labels.to(self.device) + self.config.layout.codes

    @torch.no_grad()
    def sample(
        self,
        class_labels: Tensor | None = None,
        num_samples: int | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Samples token sequences, coarse to fine.

        Args:
            class_labels: LongTensor (B,); None samples without condition (then `num_samples`).
            guidance_scale: classifier-free guidance w; logits = null + w * (class - null). 1 is plain sampling.
            temperature: divides the logits; above 0.
            top_k: keep the k likeliest codes; 0 keeps all. top_p: keep the smallest set with this mass, in (0, 1].
            generator: for reproducible samples, on the model's device.
            num_tokens: stop early, for a coarser image; default the whole `layout.length`.

        Returns:
            LongTensor (B, num_tokens), for `decode`.

        Raises:
            ValueError: a value out of range, guidance without class labels, or a model that trains with
                gradient checkpointing.
        """
        length = self.config.layout.length if num_tokens is None else num_tokens
        if not 0 <= length <= self.config.layout.length:
            raise ValueError(f"num_tokens={num_tokens} must be in [0, {self.config.layout.length}].")
        if not temperature > 0 or not 0 < top_p <= 1 or top_k < 0:
            raise ValueError(f"temperature={temperature} must be > 0, top_p={top_p} in (0, 1], top_k={top_k} >= 0.")
        if not math.isfinite(guidance_scale) or (guidance_scale != 1.0 and class_labels is None):
            raise ValueError(
                f"guidance_scale={guidance_scale} must be finite and needs class_labels; use 1.0 to sample without"
                " condition."
            )
        if self.training and self.is_gradient_checkpointing:  # it drops the key-value cache: each token would be blind
            raise ValueError("the model trains with gradient checkpointing; call model.eval() before sampling.")
        current = self.start_tokens(class_labels, num_samples)
        batch, guided = current.shape[0], guidance_scale != 1.0
        if guided:
            current = torch.cat([current, torch.full_like(current, self.config.null_token_id)])
        cache, tokens = DynamicCache(config=self.config), []
        for position in range(length):
            logits = self(input_ids=current[:, None], past_key_values=cache, use_cache=True).logits[:, -1].float()
            if guided:
                conditional, null = logits.chunk(2)
                logits = null + guidance_scale * (conditional - null)
            # A heat that evens out even the lowest finite value must not let foreign codes in.
            logits = (logits - logits.amax(-1, keepdim=True)) / temperature
            logits = logits.masked_fill(~self.allowed[position], float("-inf"))
            chosen = _draw(logits, top_k, top_p, generator)
            tokens.append(chosen)
            current = chosen.repeat(2) if guided else chosen
        return torch.stack(tokens, 1) if tokens else current.new_zeros(batch, 0)

    def decode(self, tokens: Tensor) -> Tensor:
        """Coarse images (B, C, coarse_size, coarse_size) in [-1, 1] of tokens (B, t); see `SpectralCodec.decode`."""
        return self.codec.decode(tokens)


def _draw(logits: Tensor, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One draw per row of logits (B, V), restricted to the top k codes and to the nucleus of mass top_p."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


__all__ = ["SpectralTokenizerForCausalLM"]
