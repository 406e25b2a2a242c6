"""The causal transformer over coarse-to-fine wavelet tokens, with the frozen codec inside.

The transformer is transformers' own `LlamaModel` (RMSNorm, SwiGLU, SDPA attention, key-value cache). Ours are: the
learned position embedding, which also tells the scale; the rule that a position may only emit code words of its own
scale; conditioning by a start token (class or null) or by projected text states in front of it; and sampling with
classifier-free guidance.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from .codec import SpectralCodec
from .configuration_spectral import SpectralConfig
from .safe_loading import HubModel
from .sampling import StepByStep, draw, step


class CodeHead(nn.Linear):
    """The layer in front of the logits, which can be asked for those of some codes only: `rows` of its weight."""

    takes_rows = True  # for the per-example clipper

    def forward(self, input: Tensor, rows: slice | None = None) -> Tensor:
        return F.linear(input, self.weight if rows is None else self.weight[rows])


class SpectralTokenizerForCausalLM(HubModel, PreTrainedModel, GenerationMixin):
    """Autoregressive model of `config.layout.length` wavelet tokens after one start token.

    Input ids are (B, 1 + t): a start token (`config.class_token_ids[label]` or `config.null_token_id`), then image
    tokens coarse to fine. `codec` turns images into tokens and back; it is frozen and saved with the model.

    With `config.text_width` the model also takes text states (B, K, text_width), K = `config.max_text_tokens`, as
    `text_encoder.encode_text` makes them of captions and prompts. Projected, they stand at K positions in front of the
    start token. A state that is zero marks a slot without text, where a learned vector stands instead; all zeros, or
    None, is the null condition.
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
        self.lm_head = CodeHead(config.hidden_size, config.vocab_size, bias=False)
        if config.text_width:
            self.text_projection = nn.Linear(config.text_width, config.hidden_size, bias=False)
            self.text_null = nn.Embedding(1, config.hidden_size)  # stands in every slot without text
        layout = config.layout
        # allowed[i, v]: may code v follow at image position i? One extra row, for the position after the last.
        allowed = torch.zeros(layout.length + 1, config.vocab_size, dtype=torch.bool)
        for position, index in enumerate([*layout.scale_of_position, len(layout.scales) - 1]):
            scale = layout.scales[index]
            allowed[position, scale.first_id : scale.first_id + scale.codes] = True
        self._compiled_step: Callable[..., Tensor] | None = None
        self.register_buffer("allowed", allowed, persistent=True)
        self.post_init()
        if self.can_generate() and self.generation_config is not None:
            self.generation_config.max_length = layout.length + 1
            self.generation_config.do_sample = True

    def with_classes(self, num_classes: int) -> "SpectralTokenizerForCausalLM":
        """The same model for other classes, of which it knows nothing yet: each starts from the null condition.

        So a public model without classes, or with classes of its own, can be trained on images of any classes.

        Args:
            num_classes: >= 0; 0 gives an unconditional model.

        Returns:
            A new model with copies of all weights; codec and tokens stay the same.

        Raises:
            ValueError: a negative number, or classes for a model with text.
        """
        config = SpectralConfig.from_dict(self.config.to_dict(), num_classes=num_classes)
        codes, null = self.config.layout.codes, self.config.null_token_id
        model, state = type(self)(config), {name: value.clone() for name, value in self.state_dict().items()}
        state["allowed"] = model.allowed  # follows from the configuration
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = torch.cat([state[name][:codes], state[name][null].expand(num_classes + 1, -1)])
        model.load_state_dict(state, assign=True)  # each weight in its own precision: the codec's is never lowered
        model.tie_weights()
        return model.to(self.device).train(self.training)

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
        text_states: Tensor | None = None,
        targets: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, t, vocab_size) for the next token; codes of a foreign scale get the lowest finite value.

        `position_ids` count from the start token, which has 0. `text_states` belong to the first call with a cache;
        later ones do not look at them. `labels` (B, t), as in every causal LM of transformers: equal to `input_ids`,
        shifted inside, -100 ignored; `loss` is the mean negative log-likelihood per token in nats. `targets` (B, t) are
        the tokens that follow each position; `loss` is then each one's own, (B, t).

        A loss takes the codes of each position's scale alone, a fraction of all. So no logits are made, and `logits` is
        None, with `targets`, and with `labels` in training mode.

        Raises:
            ValueError: text states of another shape, or for a model without text; labels or targets without the start
                of the row.
        """
        if (labels is not None or targets is not None) and (past_key_values is not None or position_ids is not None):
            raise ValueError(
                "labels and targets need rows from their start token: leave out past_key_values and position_ids."
            )
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        slots = self.config.text_slots
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            first = past - slots if past else 0
            position_ids = torch.arange(first, first + length, device=inputs_embeds.device)[None]
        position_ids = position_ids.expand(batch, length)
        inputs_embeds, places = inputs_embeds + self.position_embedding(position_ids), position_ids + slots
        if not past and (slots or text_states is not None):
            inputs_embeds = torch.cat([self.text_prefix(text_states, batch), inputs_embeds], 1)
            places = torch.cat([torch.arange(slots, device=places.device).expand(batch, slots), places], 1)
        if slots and attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = F.pad(attention_mask, (slots, 0), value=1)
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=places,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        hidden, logits, loss = outputs.last_hidden_state[:, -length:], None, None
        if targets is not None:
            loss = self._negative_log_likelihood(hidden, targets)
        elif labels is not None:
            wanted = labels[:, 1:]
            loss = self._negative_log_likelihood(hidden[:, :-1], wanted).sum() / (wanted != -100).sum()
        if loss is None or (targets is None and not self.training):
            logits = self.lm_head(hidden)
            logits = logits.masked_fill(~self.allowed[position_ids], torch.finfo(logits.dtype).min)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def _prepare_static_cache(self, *args, max_cache_len: int, **kwargs) -> Cache:
        """For `generate`, which counts ids only: room for the text in front of the start token, too."""
        return super()._prepare_static_cache(*args, max_cache_len=max_cache_len + self.config.text_slots, **kwargs)

    def create_masks_for_generate(self, **kwargs) -> Any:
        """For `generate` with a static cache: with text, `forward` makes the mask, as it knows what stands in front."""
        return kwargs["attention_mask"] if self.config.text_slots else create_masks_for_generate(**kwargs)

    def text_prefix(self, text_states: Tensor | None, batch: int) -> Tensor:
        """What stands in front of the start token: (batch, K, hidden_size) of states (batch, K, text_width) or None."""
        slots, width = self.config.text_slots, self.config.text_width
        if text_states is not None and text_states.shape != (batch, slots, width):
            raise ValueError(
                f"text_states of shape {tuple(text_states.shape)}, but the model takes {(batch, slots, width)}: rows,"
                " max_text_tokens, text_width (0 without text); make them by text_encoder.encode_text."
            )
        null = self.text_null(torch.zeros(batch, slots, dtype=torch.long, device=self.device))
        if text_states is None:
            return null
        text_states = text_states.to(null.device, null.dtype)
        return torch.where((text_states != 0).any(-1, keepdim=True), self.text_projection(text_states), null)

    def per_example_loss(
        self, input_ids: Tensor, text_states: Tensor | None = None, scale_weights: Sequence[float] | None = None
    ) -> Tensor:
        """Mean negative log-likelihood per token, in nats, of each row (B, 1 + T): a Tensor (B,).

        The divisor is the public length T, so that the loss of one row never depends on another row.

        Args:
            scale_weights: one per scale, coarse to fine, for a weighted mean over the tokens; None: all alike.

        Raises:
            IndexError: a token that does not belong to the scale of its position (on a CPU; GPUs end the process).
            ValueError: not one weight per scale.
        """
        rows, targets = input_ids[:, :-1], input_ids[:, 1:]
        losses = self(rows, use_cache=False, text_states=text_states, targets=targets).loss
        if scale_weights is None:
            return losses.mean(1)
        layout = self.config.layout
        if len(scale_weights) != len(layout.scales):
            raise ValueError(
                f"scale_weights={list(scale_weights)} for a model of {len(layout.scales)} scales; give one for each,"
                " coarse to fine."
            )
        weights = losses.new_tensor([scale_weights[index] for index in layout.scale_of_position])
        return (losses * weights).sum(1) / weights.sum()  # no product of matrices, which autocast would round

    def _negative_log_likelihood(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """In nats, (B, t), of the first t tokens, from hidden states (B, t, hidden_size); 0 where a target is -100.

        Scale by scale, each with its own codes only, as no others may be drawn there.
        """
        scales = [scale for scale in self.config.layout.scales if scale.first_position < targets.shape[1]]
        lengths = [min(targets.shape[1] - scale.first_position, scale.tokens) for scale in scales]
        plain, losses = self._head_is_plain and not self.config.tie_word_embeddings, []
        # Otherwise whole, once: an adapter or quantisation is around the head, or it is the embedding as well.
        parts = hidden if plain else self.lm_head(hidden)
        for scale, part, wanted in zip(scales, parts.split(lengths, 1), targets.split(lengths, 1), strict=True):
            codes = slice(scale.first_id, scale.first_id + scale.codes)
            own = (self.lm_head(part, codes) if plain else part[..., codes]).float()
            code, ignored = (wanted - scale.first_id).flatten(), -100 - scale.first_id
            # Flat: with the classes in the middle, as (B, V, T), torch's loss takes seven times as long on a CPU.
            found = F.cross_entropy(own.flatten(0, 1), code, ignore_index=ignored, reduction="none")
            losses.append(found.view(wanted.shape))
        return torch.cat(losses, 1)

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
        temperature: float | Sequence[float] = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        num_tokens: int | None = None,
        text_states: Tensor | None = None,
        negative_text_states: Tensor | None = None,
        on_scale_end: Callable[[Tensor], object] | None = None,
        attempts: int = 1,
    ) -> Tensor:
        """Samples token sequences, coarse to fine.

        Args:
            class_labels: LongTensor (B,); None samples by text, or without condition (then `num_samples`).
            guidance_scale: classifier-free guidance w; logits = null + w * (conditional - null). 1 is plain sampling.
            temperature: divides the logits; above 0. One for all scales, or one per scale, coarse to fine: variety is
                a matter of the coarse tokens, and details are best taken nearly as the likeliest ones.
            top_k: keep the k likeliest codes; 0 keeps all. top_p: keep the smallest set with this mass, in (0, 1].
            generator: for reproducible samples, on the model's device.
            num_tokens: stop early, for a coarser image; default the whole `layout.length`.
            text_states: (B, K, text_width) of the prompts, as `text_encoder.encode_text` makes them.
            negative_text_states: as `text_states`, in the place of the null condition: what to steer away from.
            on_scale_end: called after each scale with all tokens so far, LongTensor (B, t); of the first attempt.
            attempts: above 1, sequences for which the model itself finds another class likelier than the one asked for
                (`class_probabilities`) are drawn again, until each had so many attempts; the last one stays. It looks
                at no private image. Needs class_labels and whole sequences.

        Returns:
            LongTensor (B, num_tokens), for `decode`.

        Raises:
            ValueError: a value out of range, guidance without a condition or by a null condition that was never
                trained, attempts without class labels, or a model that trains with gradient checkpointing.
        """
        length = self.config.layout.length if num_tokens is None else num_tokens
        if not 0 <= length <= self.config.layout.length:
            raise ValueError(f"num_tokens={num_tokens} must be in [0, {self.config.layout.length}].")
        temperatures = self.check_sampling(guidance_scale, temperature, top_k, top_p, attempts)
        self._check_condition(class_labels, text_states, negative_text_states, guidance_scale)
        if attempts > 1 and (class_labels is None or 0 < length < self.config.layout.length):
            raise ValueError(f"attempts={attempts} need class_labels and all tokens; use 1 without.")
        if self.training and self.is_gradient_checkpointing:  # it drops the key-value cache: each token would be blind
            raise ValueError("the model trains with gradient checkpointing; call model.eval() before sampling.")
        current = self.start_tokens(class_labels, num_samples if text_states is None else len(text_states))
        batch, guided = current.shape[0], guidance_scale != 1.0
        if guided:
            current = torch.cat([current, torch.full_like(current, self.config.null_token_id)])
            if text_states is not None:
                null = torch.zeros_like(text_states) if negative_text_states is None else negative_text_states
                text_states = torch.cat([text_states, null])
        cache, tokens = DynamicCache(config=self.config), []
        layout = self.config.layout
        for position, index in enumerate(layout.scale_of_position[:length]):
            scale = layout.scales[index]
            codes = slice(scale.first_id, scale.first_id + scale.codes)  # the only ones that may follow here
            if position == 0:  # by `forward`, whose hooks bring an offloaded model to its device
                start = {"input_ids": current[:, None], "text_states": text_states}
                logits = self(**start, past_key_values=cache, use_cache=True).logits[:, -1, codes]
                places = self.position_embedding(torch.arange(length, device=logits.device))
                following = StepByStep(self.model, cache, length - 1, self._compiled_step)
            else:
                logits = self._head(following(self.model.embed_tokens(current) + places[position]), codes)
            logits = logits.float()
            if guided:
                conditional, null = logits.chunk(2)
                logits = null + guidance_scale * (conditional - null)
            logits = (logits - logits.amax(-1, keepdim=True)) / temperatures[index]
            chosen = draw(logits, top_k, top_p, generator) + scale.first_id
            tokens.append(chosen)
            current = chosen.repeat(2) if guided else chosen
            if on_scale_end is not None and position + 1 == scale.first_position + scale.tokens:
                on_scale_end(torch.stack(tokens, 1))
        drawn = torch.stack(tokens, 1) if tokens else current.new_zeros(batch, 0)
        if attempts > 1 and tokens and class_labels is not None:
            asked = class_labels.to(drawn.device)
            wrong = self.class_probabilities(drawn).argmax(1) != asked
            if wrong.any():
                again = torch.ones_like(wrong) if self._compiled_step else wrong  # another size: compiled anew
                others = self.sample(
                    asked[again], None, guidance_scale, temperature, top_k, top_p, generator, attempts=attempts - 1
                )
                drawn[wrong] = others[wrong[again]]
        return drawn

    def labels_of(self, start_tokens: Tensor) -> Tensor:
        """Class labels of start tokens, the inverse of `start_tokens`; -1 for the null token."""
        return torch.where(start_tokens == self.config.null_token_id, -1, start_tokens - self.config.layout.codes)

    @torch.no_grad()
    def class_probabilities(self, tokens: Tensor) -> Tensor:
        """How likely the model finds each class for token sequences (B, layout.length): a Tensor (B, num_classes).

        By Bayes' rule from the likelihoods of the tokens given each class, all classes equally likely beforehand; one
        forward pass per class.

        Raises:
            ValueError: a model without classes.
        """
        if not self.config.num_classes:
            raise ValueError("num_classes=0: a model without classes cannot tell them apart.")
        rows = [torch.cat([torch.full_like(tokens[:, :1], start), tokens], 1) for start in self.config.class_token_ids]
        losses = torch.stack([self.per_example_loss(some) for some in rows], 1)
        return (-losses.float() * self.config.layout.length).softmax(1)

    def check_sampling(
        self, guidance_scale: float, temperature: float | Sequence[float], top_k: int, top_p: float, attempts: int
    ) -> list[float]:
        """Refuses values with which no call of `sample` could be made.

        Returns:
            The temperature of every scale.

        Raises:
            ValueError: a value out of range.
        """
        scales = len(self.config.layout.scales)
        given: Any = [temperature] * scales if isinstance(temperature, Real) else temperature
        found = [] if isinstance(given, str) else [float(each) for each in given]
        if len(found) != scales or not all(each > 0 for each in found):
            raise ValueError(
                f"temperature={temperature!r} must be > 0: one number, or {scales} of them, one per scale, coarse to"
                " fine."
            )
        mass = isinstance(top_p, Real) and 0 < top_p <= 1
        if not mass or not isinstance(top_k, Integral) or top_k < 0:
            raise ValueError(f"sampling needs top_p={top_p!r} in (0, 1], top_k={top_k!r} a whole number >= 0.")
        finite = isinstance(guidance_scale, Real) and math.isfinite(guidance_scale)
        if not finite or not isinstance(attempts, Integral) or attempts < 1:
            raise ValueError(
                f"guidance_scale={guidance_scale!r} must be finite, attempts={attempts!r} a whole number of at least 1."
            )
        return found

    def _check_condition(
        self, class_labels: Tensor | None, text: Tensor | None, negative_text: Tensor | None, guidance_scale: float
    ) -> None:
        """Refuses, for `sample`, conditions that do not go together."""
        if text is not None and class_labels is not None:
            raise ValueError("class_labels and text_states are both given; a sample has one condition.")
        guided, conditional = guidance_scale != 1.0, text is not None or class_labels is not None
        if guided and not conditional:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs class_labels or text_states; use 1.0 to sample without"
                " condition."
            )
        if guided and text is not None and negative_text is None and not self.config.text_dropout:
            raise ValueError(
                f"guidance_scale={guidance_scale}, but the model was trained with text_dropout=0, so never without a"
                " caption; use 1.0 or a negative prompt, or train it with text_dropout=0.1."
            )
        if negative_text is not None and (text is None or negative_text.shape != text.shape or not guided):
            raise ValueError(
                f"negative_text_states of shape {tuple(negative_text.shape)} with guidance_scale={guidance_scale} and"
                f" text_states of shape {None if text is None else tuple(text.shape)}: they need text_states of their"
                " shape and guidance, for instance guidance_scale=3."
            )

    def _head(self, hidden: Tensor, codes: slice) -> Tensor:
        """Logits (B, codes) of some codes only, of hidden states (B, hidden_size)."""
        return self.lm_head(hidden, codes) if self._head_is_plain else self.lm_head(hidden)[:, codes]

    @property
    def _head_is_plain(self) -> bool:
        """Not inside an adapter, nor quantised."""
        return type(self.lm_head) is CodeHead

    def compile_sampling(self, **options) -> None:
        """Compiles the step that `sample` repeats; the first images after that take up to minutes.

        Where the processor has bfloat16, a model loaded with `dtype=torch.bfloat16` is the faster one: the matrix
        products of a wide model are most of its time. The codec stays in float32.

        Args:
            options: of `torch.compile`, such as `mode="reduce-overhead"` on a GPU.
        """
        self._compiled_step = torch.compile(step, **options)

    def decode(self, tokens: Tensor) -> Tensor:
        """Coarse images (B, C, coarse_size, coarse_size) in [-1, 1] of tokens (B, t); see `SpectralCodec.decode`."""
        return self.codec.decode(tokens)


__all__ = ["CodeHead", "SpectralTokenizerForCausalLM"]
