"""The loop of autoregressive sampling: one token per image at a time, with keys and values in preallocated memory.

`generate` of transformers is general: it builds masks, positions and cache objects anew at every step, computes the
logits of the whole vocabulary and draws from all of it. For small models that is most of the time. Here a step is the
arithmetic of the Llama layers (RMSNorm, rotary embedding, attention, SwiGLU) and nothing else, through the layers' own
modules, so that LoRA, quantised weights and half precision work as they do in `forward`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaModel

_KINDS = ("keys", "values")


class StepByStep:
    """Continues the sequences of a filled cache, one position per call.

    Args:
        model: the transformer; its modules and adapters are used as they are.
        cache: keys and values of the positions that `forward` went through; copied.
        steps: how many positions will follow.
        compiled: `torch.compile` of `step`, or None. A compiled step always has the same shapes, so it attends over all
            positions and masks those to come; the plain one attends over those that are there.
    """

    def __init__(self, model: LlamaModel, cache: Cache, steps: int, compiled: Callable[..., Tensor] | None = None):
        self.model, self.compiled, self.past, self.index = model, compiled, cache.get_seq_length(), 0
        self.keys, self.values = ([_room(getattr(layer, name), steps) for layer in cache.layers] for name in _KINDS)
        self.places = torch.arange(self.past, self.past + steps, device=self.keys[0].device)
        cosine, sine = (table[0] for table in model.rotary_emb(self.keys[0], self.places[None]))  # (steps, head_dim)
        # Rotating swaps the halves and turns the sign of what becomes the first one: the sign goes into the table.
        first, second = sine.chunk(2, -1)
        self.rotations = torch.stack([cosine, torch.cat([-first, second], -1)], 1)
        self.bias = self.keys[0].new_zeros(steps, self.past + steps)
        self.bias.masked_fill_(
            torch.arange(self.past + steps, device=self.places.device) > self.places[:, None], -math.inf
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, hidden_size) of the next position, out of its embeddings (B, hidden_size)."""
        index, self.index = self.index, self.index + 1
        place, rotation = self.places[index : index + 1], self.rotations[index]
        if self.compiled is not None:
            return self.compiled(self.model, hidden, self.keys, self.values, place, rotation, self.bias[index])
        there = self.past + self.index
        keys, values = ([memory[:, :there] for memory in layers] for layers in (self.keys, self.values))
        return step(self.model, hidden, keys, values, place, rotation)


def _room(filled: Tensor, steps: int) -> Tensor:
    """(rows, heads, t, head_dim) copied into (rows * heads, t + steps, head_dim).

    The rest is zero, because what is masked is still multiplied, and not-a-number times zero is none.
    """
    rows, heads, past, width = filled.shape
    memory = filled.new_zeros(rows * heads, past + steps, width)
    memory[:, :past] = filled.flatten(0, 1)
    return memory


def step(
    model: LlamaModel,
    hidden: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    place: Tensor,
    rotation: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """One position through all layers; writes its keys and values.

    Args:
        hidden: embeddings (B, hidden_size).
        keys, values: per layer (B * key-value heads, t, head_dim).
        place: LongTensor (1,), where among the t positions this one is.
        rotation: (2, head_dim), cosine and signed sine of the rotary embedding.
        bias: (t,), added to the attention scores.

    Returns:
        (B, hidden_size) after the last norm.
    """
    rows, width, cosine, sine = len(hidden), rotation.shape[-1], rotation[0], rotation[1]
    for layer, past_keys, past_values in zip(model.layers, keys, values, strict=True):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, key = attention.q_proj(normed), attention.k_proj(normed)
        heads = key.shape[1] // width
        both = torch.cat([query, key], 1).view(rows, -1, width)
        both = torch.addcmul(both * cosine, both.roll(width // 2, -1), sine)
        query, key = both[:, :-heads] * attention.scaling, both[:, -heads:]
        past_keys.index_copy_(1, place, key.reshape(rows * heads, 1, width).to(past_keys.dtype))
        value = attention.v_proj(normed).view(rows * heads, 1, width)
        past_values.index_copy_(1, place, value.to(past_values.dtype))
        # The query heads of one key-value head stand together: they are the rows of one product.
        scores = torch.bmm(query.reshape(rows * heads, -1, width), past_keys.transpose(1, 2))
        if bias is not None:
            scores = scores + bias
        hidden = hidden + attention.o_proj(torch.bmm(scores.softmax(-1), past_values).view(rows, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.norm(hidden)


def draw(logits: Tensor, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One draw per row of logits (B, V), restricted to the top k codes and to the nucleus of mass top_p: (B,)."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    # On a CPU, multinomial draws one random number per code: ten times as long as inverting the distribution function.
    mass = probabilities.cumsum(-1)
    uniform = torch.rand(len(mass), 1, generator=generator, dtype=mass.dtype)
    whole = mass[:, -1:]
    drawn = torch.minimum(uniform * whole, whole.nextafter(torch.zeros_like(whole)))  # the product may round up to it
    # The first code whose sum of probabilities exceeds the number drawn has a probability above zero.
    return torch.searchsorted(mass, drawn, right=True)[:, 0]


__all__ = ["StepByStep", "draw", "step"]
