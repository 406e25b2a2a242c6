"""Draws a synthetic dataset from a saved pipeline: Parquet files, with a card that inherits the guarantee.

    python examples/export_dataset.py runs/demo/pipeline --out runs/synthetic --num_images 10000
    accelerate launch --multi_gpu --num_processes 4 examples/export_dataset.py owner/name --out synthetic \\
        --num_images 1000000 --push_to_hub owner/synthetic-faces

Any number of images costs no further privacy: drawing is post-processing. An export that was interrupted goes on where
it stopped when the same command is given again, and ends with the same files. Afterwards:

    datasets.load_dataset("runs/synthetic", split="train")
"""

import argparse
from pathlib import Path

from accelerate import PartialState

from hf_spectral_dp.dataset_export import export_dataset, publish_dataset
from hf_spectral_dp.pipeline_spectral import UPSCALING_MODES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of a saved pipeline with its card, or a Hub id such as owner/name")
    parser.add_argument("--out", required=True, type=Path, help="folder for the dataset; made if missing")
    parser.add_argument("--num_images", required=True, type=int, help="how many images, in all")
    parser.add_argument(
        "--class_labels", type=int, nargs="+", help="labels, in turn; repeat one to have more of it; default all alike"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="for a model with text: a file, one prompt per line, taken in turn and published too",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    parser.add_argument("--shard_size", type=int, default=1000, help="images per file, and lost at most by a crash")
    parser.add_argument("--batch_size", type=int, default=64, help="images drawn at once; lower it if memory runs out")
    parser.add_argument("--upscaling", default="model", choices=UPSCALING_MODES, help="how coarse images become large")
    parser.add_argument("--guidance_scale", type=float, help="above 1: closer to the label; default as saved")
    parser.add_argument("--device", help="default: the accelerator of each process, or the CPU")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="then upload the dataset with its card")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    try:
        export(parser.parse_args())
    except (OSError, ValueError) as error:
        raise SystemExit(f"export_dataset.py: {error}") from error


def export(arguments: argparse.Namespace) -> None:
    """Draws the images, and uploads them where it was asked to."""
    sampling = {} if arguments.guidance_scale is None else {"guidance_scale": arguments.guidance_scale}
    prompts = arguments.prompts and arguments.prompts.read_text(encoding="utf-8").splitlines()
    folder = export_dataset(
        arguments.pipeline,
        arguments.out,
        arguments.num_images,
        class_labels=arguments.class_labels,
        prompts=prompts and [line for line in prompts if line.strip()],
        seed=arguments.seed,
        shard_size=arguments.shard_size,
        batch_size=arguments.batch_size,
        upscaling=arguments.upscaling,
        device=arguments.device,
        **sampling,
    )
    if PartialState().is_main_process:
        print(f"{arguments.num_images} images in {folder}")
        if arguments.push_to_hub:
            print(publish_dataset(folder, arguments.push_to_hub, private=arguments.private or None))


if __name__ == "__main__":
    main()
