"""Language models whose gradients several test files clip, and the explicit loop that says what must come out."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def llama(tied: bool = False, dtype=torch.float32, vocabulary: int = 19) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def gpt2(dtype=torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=19, n_positions=64, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0,
                        attn_pdrop=0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


def lora(model):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # zero at first, which would hide lora_A
    return adapted


MODELS = {
    "llama": llama,
    "llama tied": lambda dtype=torch.float32: llama(True, dtype),
    "gpt2: tied, Conv1D, LayerNorm, broadcast positions": gpt2,
    "lora": lambda dtype=torch.float32: lora(llama(False, dtype)),
    "lora on tied": lambda dtype=torch.float32: lora(llama(True, dtype)),
}


def token_rows(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(19, (batch, length), generator=torch.Generator().manual_seed(seed))


def losses_of(model, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def looped(model, ids: torch.Tensor, clipping_norm: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Norms and clipped sum by autograd, one example at a time."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norms, sums = [], {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in ids:
        loss = losses_of(model, row[None])[0]
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        used = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
        norm = torch.sqrt(sum(g.square().sum() for g in used.values()))
        norms.append(norm)
        for name, gradient in used.items():
            sums[name] += gradient * min(1.0, clipping_norm / float(norm))
    return torch.stack(norms), sums


def relative_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    difference = torch.sqrt(sum((ours[name] - theirs[name]).square().sum() for name in theirs))
    return float(difference / torch.sqrt(sum(value.square().sum() for value in theirs.values())))
