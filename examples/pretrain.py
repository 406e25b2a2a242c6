"""Trains the causal model on the tokens of PUBLIC images; the result is where private fine-tuning starts.

    python examples/pretrain.py --codec runs/codec --public glyphs --out runs/prior
    python examples/pretrain.py --codec runs/codec-photos --public path/or/hub-id --out runs/prior-photos
    python examples/pretrain.py --codec runs/codec-fine --start runs/prior-photos --public path/or/hub-id \
        --out runs/prior-fine
    python examples/pretrain.py --codec runs/codec-photos --public path/or/hub-id --caption_column caption \
        --text_encoder sentence-transformers/all-MiniLM-L6-v2 --out runs/prior-text

An ordinary `transformers.Trainer` without privacy: never give it the sensitive images. One label or caption in ten is
left out, so that the model also learns to sample without a condition (classifier-free guidance needs that). Train a
prior with text here if the private model is to take prompts: what a caption means is then learned from public images.

--start goes on from a prior whose scales are the first ones of this codec's (same images, patches, codes, seed): what
it knows of them need not be learned again, only what follows.
"""

import argparse
from pathlib import Path

import torch
from rebuild import parsed, rebuild_command
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.private_marks import refuse_uncounted
from hf_spectral_dp.text_encoder import load_text_encoder
from hf_spectral_dp.token_store import TokenStore, build_token_store
from hf_spectral_dp.views import Views

CARD = """---
library_name: hf_spectral_dp
license: {license}
tags: [wavelet, image-generation]
---
# Public prior: wavelet tokens of {public}

`SpectralTokenizerForCausalLM` with its codec, {parameters:,} parameters, {length} tokens per image. Trained without
privacy on {images:,} public images ({public}); mean loss over the last steps {loss:.3f} nats per token.

Rebuild:

    python examples/pretrain_codec.py {codec_arguments}
    {command}
"""


class Rows(torch.utils.data.Dataset):
    """Rows of a token store as the Trainer wants them; some lose their label or their text, anew each time."""

    def __init__(self, store: TokenStore, config: SpectralConfig, class_dropout: float):
        self.store, self.config, self.class_dropout = store, config, class_dropout

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.store[index]
        if torch.rand(()) < self.class_dropout:
            row["input_ids"][0] = self.config.null_token_id
        if "text_states" in row and torch.rand(()) < self.config.text_dropout:
            row["text_states"].zero_()
        return {**row, "labels": row["input_ids"]}


@torch.no_grad()
def go_on(model: SpectralTokenizerForCausalLM, before: SpectralTokenizerForCausalLM) -> None:
    """Gives `model` the weights of `before`, whose scales are its own or its first ones; the rest stays as it is.

    Raises:
        ValueError: other scales, code words or classes. RuntimeError: a transformer of another shape.
    """
    scales, known = model.config.layout.scales, before.config.layout.scales
    same_books = scales[: len(known)] == known and all(
        torch.equal(model.codec.codebook(index), before.codec.codebook(index)) for index in range(len(known))
    )
    if not same_books:
        raise ValueError(
            f"the prior to go on from has {len(known)} scales that are not the first of this codec's {len(scales)};"
            " fit the codec on the same images, with the same patches, codes and seed, and further scales only."
        )
    codes, starts = before.config.layout.codes, before.config.vocab_size - before.config.layout.codes
    if model.config.vocab_size - model.config.layout.codes != starts:
        raise ValueError(f"the prior to go on from has {starts - 1} classes, this model another number; give the same.")
    weights = model.state_dict()
    for name, weight in before.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name][:codes], weights[name][-starts:] = weight[:codes], weight[codes:]
        elif name == "position_embedding.weight":
            weights[name][: len(weight)] = weight
        elif not name.startswith("codec.") and name != "allowed":
            weights[name].copy_(weight)


def glyph_rows(count: int, seed: int):
    from public_glyphs import render_digits
    from tqdm.auto import tqdm

    for start in tqdm(range(0, count, 1000), desc="drawing", unit="thousand"):
        images, labels = render_digits(min(1000, count - start), seed + start)
        yield from ({"image": image, "label": int(label)} for image, label in zip(images, labels, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", required=True, help="folder written by pretrain_codec.py")
    parser.add_argument("--start", help="folder of a prior with the first scales of this codec, to go on from")
    parser.add_argument("--public", required=True, help="'glyphs' (drawn digits), an image folder, or a Hub id")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default=None)
    parser.add_argument("--caption_column", default=None, help="with --text_encoder: a model that takes prompts")
    parser.add_argument("--caption_files", default=None, help="captions beside a folder of images; see load_images")
    parser.add_argument("--text_encoder", default=None, help="folder or Hub id of a frozen encoder (CLIP, T5, MiniLM)")
    parser.add_argument("--max_text_tokens", type=int, default=32, help="longer captions and prompts are cut")
    parser.add_argument("--text_dropout", type=float, default=0.1, help="share of rows without text; 0: no guidance")
    parser.add_argument("--images", type=int, default=50_000, help="how many drawn digits")
    parser.add_argument("--views", type=int, default=1, help="of every photo: mirrored, moved and zoomed a little")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--class_dropout", type=float, default=0.1)
    parser.add_argument("--bf16", action="store_true", help="faster on GPUs")
    parser.add_argument("--workers", type=int, default=0, help="processes that read rows, where a GPU waits for them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--codec_arguments", default="", help="how the codec was made, for the card")
    parser.add_argument("--out", required=True)
    arguments = parsed(parser)

    encoder, tokenizer, text = None, None, {}
    if arguments.text_encoder:
        encoder, tokenizer = load_text_encoder(arguments.text_encoder)
        text = {name: getattr(arguments, name) for name in ("max_text_tokens", "text_dropout")}
        text["text_width"] = encoder.config.hidden_size
    model = AutoModelForCausalLM.from_pretrained(arguments.codec, **text)
    refuse_uncounted(f"--codec {arguments.codec}", model)
    if arguments.start:
        before = AutoModelForCausalLM.from_pretrained(arguments.start)
        refuse_uncounted(f"--start {arguments.start}", before)
        go_on(model, before)
    processor = AutoImageProcessor.from_pretrained(arguments.codec)
    glyphs = arguments.public == "glyphs"
    if glyphs:
        rows = glyph_rows(arguments.images, arguments.seed)
    else:
        rows = load_images(arguments.public, arguments.split, caption_files=arguments.caption_files)
    features = getattr(rows, "features", None) or {}
    store = build_token_store(
        rows,
        model,
        processor,
        Path(arguments.out) / "tokens",
        image_column=arguments.image_column,
        label_column="label" if glyphs else arguments.label_column,
        # Of public images they may follow the folders that there are.
        class_names=getattr(features.get(arguments.label_column), "names", None),
        caption_column=arguments.caption_column,
        text_encoder=encoder,
        tokenizer=tokenizer,
        views=Views(count=arguments.views, scaling=0.2, shift=0.1, mirror=True) if arguments.views > 1 else None,
        overwrite=True,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(200, arguments.steps // 10),
            weight_decay=0.01,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            seed=arguments.seed,
            bf16=arguments.bf16,
            dataloader_num_workers=arguments.workers,
        ),
        train_dataset=Rows(store, model.config, arguments.class_dropout),
    )
    trainer.train()
    model.save_pretrained(arguments.out)
    processor.save_pretrained(arguments.out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    unused = () if encoder else ("max_text_tokens", "text_dropout")
    options = vars(arguments) | dict.fromkeys(unused)
    codec_arguments = options.pop("codec_arguments") or f"--out {arguments.codec} ..."
    card = CARD.format(
        public="digits drawn by examples/public_glyphs.py" if glyphs else arguments.public,
        license=arguments.license,
        parameters=model.num_parameters(),
        length=model.config.layout.length,
        images=len(store),
        loss=sum(losses[-3:]) / len(losses[-3:]) if losses else float("nan"),
        codec_arguments=codec_arguments,
        command=rebuild_command("pretrain.py", options),
    )
    Path(arguments.out, "README.md").write_text(card, encoding="utf-8")
    print(f"saved to {arguments.out}")


if __name__ == "__main__":
    main()
