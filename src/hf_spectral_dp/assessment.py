"""Everything that a report on a generator says: measured once, as plain figures and a few pictures.

Real images that the model never saw are enough for quality and utility. With the training images too, which only their
owner has, it also looks for copies and for what the model knows of them by heart. Every look at private images is
listed, and whether a guarantee covers it: most do not, since measuring is another use of the data.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .metrics.evaluation import Row, evaluate_images
from .metrics.features import FeatureExtractor
from .metrics.membership import MembershipResult, auroc_limit_of, membership_inference
from .metrics.memorisation import (
    EVIDENCE,
    CopyingResult,
    ExtractionResult,
    Neighbours,
    copying,
    extraction,
    nearest_neighbours,
    pixel_features,
)
from .metrics.utility import UtilityResult, check_selection, classifier_utility
from .modeling_spectral import SpectralTokenizerForCausalLM
from .pipeline_spectral import SAMPLING_VALUES, DPSpectralPipeline
from .privacy.budget import event_from_dict
from .privacy.consequences import privacy_pairs
from .real_images import RealImages
from .super_resolution import upscale_to

_SHOWN = 60  # samples on the page
_STRIPS = 6  # images shown coarse to fine
_PANEL = 10  # generated images shown beside their nearest real ones
_COPIES = 0.03  # of the generated images, put in to see whether copies would be noticed
_CHUNK = 512


VERDICTS = {
    "signs": "signs of copying",
    "none": "no sign of copying",
    "unknown": "no verdict: copies that were put in were not noticed either; give more generated and held-out images",
}
_BETTER = {"lower": "lower is better", "higher": "higher is better", "floor": "the nearer to real images the better"}


@dataclasses.dataclass(frozen=True)
class Leakage:
    """What one model shows of its training images.

    Attributes:
        copying: nearest neighbours; copies_noticed: the same after 3 % of the generated images were replaced by
            training images, as proof that it would notice.
        membership, extraction: attacks on the tokens.
    """

    copying: CopyingResult
    copies_noticed: CopyingResult
    membership: list[MembershipResult]
    extraction: ExtractionResult

    @property
    def verdict(self) -> str:
        """A key of `VERDICTS`: a test that would not notice copies cannot say that there are none."""
        return "signs" if self.copying.flagged else "none" if self.copies_noticed.flagged else "unknown"


@dataclasses.dataclass(frozen=True)
class Panel:
    """Generated images (k, C, H, W) that lie closest to a real one, the nearest training and held-out images.

    `ratios` (k,): distance to the nearest over the mean distance to the nearest 50.
    """

    generated: Tensor
    training: Tensor
    heldout: Tensor
    ratios: Tensor


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What was measured. Images lie in [-1, 1].

    Attributes:
        samples: (k, C, H, W), the first that a fixed seed gives, not picked. sample_labels: (k,), or None.
        strips: coarse-to-fine stages of the same images: caption and (s, C, h, w), the last with all detail.
        quality: rows of `metrics.evaluation.evaluate_images`.
        utility: one result per kind of classifier; empty without labels. selection_epsilon: spent on choosing their
            checkpoints on private images, or None if generated ones chose.
        leakage: by model, "this model" first and "without privacy" where a twin was given; empty without training
            images.
        panel: pictures of private images, if they were asked for.
        left_out: what could not be measured, and why.
        accesses: every look at real images: {"what", "private", "accounted", "released"}; `released` if a figure of it
            goes onto the card.
        real, training: names and numbers of the real images: {"name", "images", "public", "unreadable", "resized"}.
        generated: number of generated images that figures are from; seed: of their generator.
    """

    samples: Tensor
    sample_labels: Tensor | None
    strips: list[tuple[str, Tensor]]
    quality: list[Row]
    utility: list[UtilityResult]
    selection_epsilon: float | None
    leakage: dict[str, Leakage]
    panel: Panel | None
    left_out: dict[str, str]
    accesses: list[dict[str, Any]]
    real: dict[str, Any]
    training: dict[str, Any] | None
    generated: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """All figures, as plain values, and no picture."""
        pictures = ("samples", "sample_labels", "strips", "panel")
        names = [field.name for field in dataclasses.fields(self) if field.name not in pictures]
        chosen = {name: getattr(self, name) for name in names}
        return {name: _plain(value) for name, value in chosen.items()} | {"evidence": EVIDENCE}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        properties = {name: getattr(value, name) for name in ("flagged", "caught", "verdict") if hasattr(value, name)}
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)} | properties
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def assess(
    pipeline: DPSpectralPipeline,
    real: RealImages,
    *,
    training: RealImages | None = None,
    twin: Any | None = None,
    private_validation: RealImages | None = None,
    selection_epsilon: float | None = None,
    extractor: FeatureExtractor | None = None,
    num_images: int = 2000,
    seeds: int = 3,
    steps: int = 400,
    show_private: bool = False,
    seed: int = 0,
) -> Assessment:
    """Draws images from a pipeline and measures them.

    Args:
        real: images of the same kind that were not trained on.
        training: the images that were trained on; looks for copies and membership, outside of any guarantee.
        twin: a `SpectralTokenizerForCausalLM` trained on the same images without privacy, to measure beside.
        private_validation, selection_epsilon: see `metrics.utility.classifier_utility`, whose guarantee holds here.
        extractor: see `evaluate_images`.
        num_images: generated images, shared evenly among the classes.
        seeds, steps: trainings per kind of classifier, and steps of each.
        show_private: keep pictures of the training images nearest to generated ones, for the owner's eyes.
        seed: of the generated images.

    Raises:
        ValueError: sizes, classes or models that do not fit together, or private pictures without the training images.
            All of that comes before an image is drawn.
    """
    if show_private and training is None:
        raise ValueError("show_private=True shows training images beside generated ones; give training as well.")
    if twin is not None and training is None:
        raise ValueError("a twin is compared by what it knows of the training images; give training as well.")
    config = pipeline.model.config
    if num_images < max(config.num_classes, 50):
        raise ValueError(f"num_images={num_images} is too small; use at least 50, and one per class.")
    if seeds < 1 or steps < 1:
        raise ValueError(f"seeds={seeds} trainings of steps={steps} make no classifier; give at least 1 of each.")
    for given in filter(None, (real, training, private_validation)):
        given.check_fits(config)
    check_selection(private_validation, selection_epsilon)
    if private_validation is not None and private_validation.labels is None:
        raise ValueError(f"{private_validation.name} has no labels; validation needs them.")
    if twin is not None:
        _with_model(pipeline, twin)
    left_out: dict[str, str] = {}
    images, labels = draw_images(pipeline, pipeline.model, num_images, seed)
    crop = pipeline.image_processor.postprocess
    heldout = crop(real.pixels, "pt") * 2 - 1
    quality = evaluate_images(_chunks(heldout), _chunks(images), extractor)

    utility: list[UtilityResult] = []
    if labels is None or real.labels is None:
        left_out["utility"] = "The model or the real images have no labels."
    else:
        validation = None
        if private_validation is not None:
            assert private_validation.labels is not None  # checked
            validation = crop(private_validation.pixels, "pt") * 2 - 1, private_validation.labels
        utility = classifier_utility(
            images, labels, heldout, real.labels, private_validation=validation, selection_epsilon=selection_epsilon,
            seeds=seeds, steps=steps,
        )  # fmt: skip

    leakage: dict[str, Leakage] = {}
    panel = None
    if training is None:
        left_out["memorisation"] = "The training images were not given; only their owner can look for copies."
    elif config.conditioning == "text":
        left_out["memorisation"] = "Attacks on models that read captions are not in this report yet."
    elif min(len(training.pixels), len(real.pixels)) < 100:
        left_out["memorisation"] = (
            f"{len(training.pixels)} training and {len(real.pixels)} held-out images are too few: at least 100 of each"
            " are needed."
        )
    else:
        known = crop(training.pixels, "pt") * 2 - 1
        models = {"this model": pipeline.model} | ({"without privacy": twin} if twin is not None else {})
        for name, model in models.items():
            drawn = images if model is pipeline.model else draw_images(pipeline, model, num_images, seed)[0]
            leakage[name], neighbours = _leakage(model, drawn, known, heldout, training, real)
            if show_private and model is pipeline.model:
                panel = _panel(neighbours, images, known, heldout)

    return Assessment(
        samples=images[_spread(len(images), _SHOWN)],
        sample_labels=None if labels is None else labels[_spread(len(images), _SHOWN)],
        strips=_strips(pipeline, seed),
        quality=quality,
        utility=utility,
        selection_epsilon=selection_epsilon if utility else None,
        leakage=leakage,
        panel=panel,
        left_out=left_out,
        accesses=_accesses(real, training, private_validation, selection_epsilon, utility, leakage, panel),
        real=_described(real),
        training=None if training is None else _described(training),
        generated=len(images),
        seed=seed,
    )


def _described(images: RealImages) -> dict[str, Any]:
    return {
        "name": images.name,
        "images": len(images.pixels),
        "public": images.public,
        "unreadable": images.unreadable,
        "resized": images.resized,
    }


def _chunks(images: Tensor) -> Iterable[Tensor]:
    return iter(images.split(_CHUNK))


def _spread(total: int, count: int) -> Tensor:
    """Indices of `count` images, evenly spaced, so that every class is among them."""
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def draw_images(
    pipeline: DPSpectralPipeline, model: Any, count: int, seed: int, batch_size: int = _CHUNK
) -> tuple[Tensor, Tensor | None]:
    """`count` images of `model` in [-1, 1] through the rest of the pipeline, class by class, and their labels."""
    chain = _with_model(pipeline, model)
    classes = model.config.num_classes
    labels = torch.arange(count) * classes // count if classes else None
    generator = torch.Generator(model.device.type).manual_seed(seed)
    drawn: Any = chain(
        class_labels=labels, num_images=1 if classes else count, generator=generator, output_type="pt",
        batch_size=batch_size,
    )  # fmt: skip
    return drawn.images.cpu() * 2 - 1, labels


@torch.no_grad()
def shown(pipeline: DPSpectralPipeline, tokens: Tensor, batch_size: int = _CHUNK) -> Tensor:
    """What rows of tokens (N, T) can show at best: images on the CPU in [-1, 1], with all detail and without border."""
    model, processor = pipeline.model, pipeline.image_processor
    size, detail = model.config.image_size, pipeline.super_resolution
    parts = (upscale_to(size, detail, model.decode(some.to(model.device))) for some in tokens.split(batch_size))
    return torch.cat([processor.postprocess(some, "pt").cpu() * 2 - 1 for some in parts])


def _with_model(pipeline: DPSpectralPipeline, model: Any) -> DPSpectralPipeline:
    """The pipeline with another model in it, for instance a twin; raises ValueError if that does not fit."""
    if not isinstance(model, SpectralTokenizerForCausalLM) or model.config.layout != pipeline.model.config.layout:
        raise ValueError(
            f"the twin is a {type(model).__name__} of other tokens than the model; give the same model, trained on the"
            " same images without privacy."
        )
    sampling = {name: pipeline.config[name] for name in SAMPLING_VALUES}
    critic = pipeline.critic if model is pipeline.model else None  # it is private: no part of a floor or a twin
    if critic is not pipeline.critic:
        sampling["attempts"] = 1  # they were its choices; without it the model itself would choose
    chain = DPSpectralPipeline(model, pipeline.image_processor, pipeline.super_resolution, critic=critic, **sampling)
    chain.set_progress_bar_config(disable=True)
    return chain


def _strips(pipeline: DPSpectralPipeline, seed: int) -> list[tuple[str, Tensor]]:
    """A few images decoded from the tokens of ever more scales, then with the detail of super-resolution."""
    model, crop = pipeline.model, pipeline.image_processor.postprocess
    classes = model.config.num_classes
    labels = torch.arange(min(_STRIPS, classes)) if classes else None
    generator = torch.Generator(model.device.type).manual_seed(seed)
    tokens = model.sample(labels, _STRIPS if labels is None else len(labels), generator=generator)
    stages = []
    for scale in model.config.layout.scales:
        end = scale.first_position + scale.tokens
        stages.append((f"{end} of {tokens.shape[1]} tokens", crop(model.decode(tokens[:, :end]), "pt").cpu() * 2 - 1))
    images = model.decode(tokens)
    if pipeline.super_resolution is not None and images.shape[-1] < model.config.image_size:
        images = upscale_to(model.config.image_size, pipeline.super_resolution, images)
        stages.append(("detail by super-resolution", crop(images, "pt").cpu() * 2 - 1))
    return stages


def _rows(model: Any, images: RealImages) -> Tensor:
    """Token rows (N, 1 + T) of real images, with the start token of the label where the model has classes."""
    tokens = torch.cat([model.codec.encode(some.to(model.device)).cpu() for some in images.pixels.split(_CHUNK)])
    labels = images.labels if model.config.num_classes else None
    return torch.cat([model.start_tokens(labels, len(tokens)).cpu()[:, None], tokens], 1)


def _leakage(
    model: Any, drawn: Tensor, known: Tensor, heldout: Tensor, training: RealImages, real: RealImages
) -> tuple[Leakage, Neighbours]:
    members, others = _rows(model, training), _rows(model, real)
    features, references = pixel_features(drawn), [pixel_features(known)]
    neighbours = nearest_neighbours(features, references, [pixel_features(heldout)])
    copies = _spread(len(known), round(_COPIES * len(drawn)))
    replaced = torch.cat([references[0][copies], features[len(copies) :]])
    with_copies = nearest_neighbours(replaced, references, [pixel_features(heldout)])
    return Leakage(
        copying(neighbours), copying(with_copies), membership_inference(model, members, others),
        extraction(model, members, others),
    ), neighbours  # fmt: skip


def _panel(neighbours: Neighbours, images: Tensor, known: Tensor, heldout: Tensor) -> Panel:
    """The generated images that are closest to a real one, each beside its nearest of either set."""
    ratios = neighbours.distance / neighbours.mean_distance
    chosen = ratios.argsort()[:_PANEL]
    features = pixel_features(images[chosen])
    nearest = [some[torch.cdist(features, pixel_features(some)).argmin(1)] for some in (known, heldout)]
    return Panel(images[chosen], nearest[0], nearest[1], ratios[chosen])


def _accesses(
    real: RealImages,
    training: RealImages | None,
    private_validation: RealImages | None,
    selection_epsilon: float | None,
    utility: list[UtilityResult],
    leakage: dict[str, Leakage],
    panel: Panel | None,
) -> list[dict[str, Any]]:
    def access(what: str, private: bool, accounted: bool = False, released: bool = True) -> dict[str, Any]:
        return {"what": what, "private": private, "accounted": accounted, "released": released}

    found = [access(f"quality figures, from {len(real.pixels)} images of {real.name}", not real.public)]
    if utility:
        found.append(access(f"accuracies of classifiers on images of {real.name}", not real.public))
    if utility and private_validation is None:
        found.append(access("choice of classifiers, on generated images only", False))
    elif utility and private_validation is not None:
        images = f"{len(private_validation.pixels)} images of {private_validation.name}"
        what = f"choice of classifiers on {images}, by the exponential mechanism at epsilon {selection_epsilon:g}"
        found.append(access(f"{what}, on top of the claim", True, accounted=True))
    if leakage and training is not None:
        what = f"search for copies and attacks, on {len(training.pixels)} training images of {training.name}"
        found.append(access(what, True))
    if panel is not None:
        found.append(access("pictures of training and held-out images, on this page only", True, released=False))
    return found


# -- for the card ----------------------------------------------------------------------------------------------------


def for_the_card(assessment: Assessment, report: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a privacy report with the figures of an assessment in `utility`, `audit` and `data_accesses`.

    Figures on private images are marked as such, and as not accounted; who publishes the card publishes them. Rows of
    the same name, as an earlier assessment left them, are replaced, but for what an epsilon was spent on: that adds up.
    """
    private = not assessment.real["public"]
    rows = []
    for row in assessment.quality:
        if row["value"] is not None:
            note = f"{_BETTER[row['better']]}; 95 % interval; {row['note']}".rstrip("; ")
            if row["floor"] is not None:
                note = f"real images score {row['floor']:.4g}; {note}"
            figures = {key: _short(row[key]) for key in ("value", "low", "high")}
            metric = f"{row['metric']} ({row['extractor']})"
            rows.append({"metric": metric, **figures, "n": row["n"], "note": note, "private": private})
    for result in assessment.utility:
        metric = f"accuracy on real images of a classifier trained on generated ones ({result.architecture})"
        figures = {"value": result.accuracy, "low": result.low, "high": result.high}
        note = f"mean of {len(result.accuracies)}, standard deviation {result.spread:.4f}; 95 % interval"
        chosen_privately = assessment.selection_epsilon is not None
        rows.append({"metric": metric, **figures, "n": result.n, "note": note, "private": private or chosen_privately})
    utility = [row | {"dataset": assessment.real["name"], "accounted": not row["private"]} for row in rows]
    # The claim is that of the training: what else was spent stands beside it, in words.
    known = [access for access in assessment.accesses if access["private"] and access["released"]]
    looks, spent = (
        [{"what": look["what"], "accounted": False, "released": True} for look in known if look["accounted"] == paid]
        for paid in (False, True)  # the latter stand there as often as they were paid for
    )
    audit = _audit_rows(assessment, report)
    return {
        **report,
        "utility": _joined(report["utility"], utility, ("dataset", "metric")),
        "audit": _joined(report["audit"], audit, ("attack",)),
        "data_accesses": _joined(report["data_accesses"], looks, ("what",)) + spent,
    }


def row_limit(report: Mapping[str, Any], pairs: Sequence[tuple[float, float]]) -> float | None:
    """The AUROC that a report's claim, with its `privacy_pairs`, leaves to attacks on one row; None if it says nothing.

    Where persons are protected it does not: a person who lacks one row shows the others more often, which is another
    change than that the person is missing, and can be easier to notice.
    """
    if report["unit"]["level"] == "person":
        return None
    return auroc_limit_of(pairs)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _joined(old: list[dict[str, Any]], new: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    keys = [tuple(row[name] for name in names) for row in new]
    return [row for row in old if tuple(row[name] for name in names) not in keys] + new


def _audit_rows(assessment: Assessment, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The search for copies, with copies put in as its control; attacks on tokens only where a twin is theirs."""
    if not assessment.leakage:
        return []
    leak, twin = assessment.leakage["this model"], assessment.leakage.get("without privacy")
    found, noticed = leak.copying, leak.copies_noticed
    copies = {
        "attack": "nearest neighbours of generated images among training and held-out images",
        "quantity": f"share nearest to a training image (by chance {found.expected})",
        "shown": found.share,
        "claimed": None,
        "confidence": None,
        "n": found.generated,
        "control": "3 % of the generated images replaced by training images",
        "control_shown": noticed.share,
        "control_caught": noticed.flagged,
        "verdict": "evidence only",
        "note": f"{VERDICTS[leak.verdict]}. {EVIDENCE}",
    }
    if twin is None:
        return [copies]
    event = event_from_dict(report["accounting"]["event"])
    limit = row_limit(report, privacy_pairs(event, report["adjacency"]["relation"]))
    attacks = zip([*leak.membership, leak.extraction.attack], [*twin.membership, twin.extraction.attack], strict=True)
    return [copies] + [
        {
            "attack": f"membership inference on tokens: {result.attack}",
            "quantity": "AUROC",
            "shown": result.auroc,
            "claimed": None if limit is None else _short(limit),
            "confidence": None,
            "n": result.members + result.others,
            "control": "the same model trained without privacy",
            "control_shown": control.auroc,
            "control_caught": control.caught,
            "verdict": "evidence only",
            "note": EVIDENCE,
        }
        for result, control in attacks
    ]


__all__ = ["VERDICTS", "Assessment", "Leakage", "Panel", "assess", "draw_images", "for_the_card", "row_limit", "shown"]
