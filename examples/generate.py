"""Generates images with a saved pipeline, as `hf-spectral-dp generate` does.

    python examples/generate.py runs/digits --out images --class_labels 3 7 --num_images 16 --seed 0

The same in Python:

    pipeline = DPSpectralPipeline.from_pretrained("runs/digits")
    images = pipeline(class_labels=[3, 7], num_images=16, generator=torch.Generator().manual_seed(0)).images
    image_grid(images, columns=16).save("grid.png")
"""

import argparse

from hf_spectral_dp.generation import add_arguments, generate_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    print(f"{generate_files(parser.parse_args())[-1]} shows all images")


if __name__ == "__main__":
    main()
