"""One self-contained page on a generator: what it makes, how good that is, what it leaks, what it cost.

The page asks nothing of the network: pictures and plots lie inside it, and it runs no script. Every figure is from the
assessment or from the privacy card, and stands in `assessment.json` beside the page.
"""

import base64
import io
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from . import plots
from .assessment import Assessment, row_limit
from .metrics.memorisation import EVIDENCE, FLAG
from .privacy.budget import event_from_dict
from .privacy.consequences import privacy_pairs
from .privacy_report import installed_version
from .whole_files import replace_files

PAGE_NAME = "index.html"
FIGURES_NAME = "assessment.json"

_METRICS = {
    "frechet_distance": ("Fréchet distance", "how far mean and spread of the features lie apart, as in FID"),
    "kernel_distance": ("Kernel distance", "the same without assuming a bell curve, as in KID"),
    "cmmd": ("CMMD", "a kernel distance on normalised features; needs few images"),
    "precision": ("Precision", "share of generated images that look like some real ones: faithfulness"),
    "density": ("Density", "precision that outliers cannot inflate; may exceed 1"),
    "recall": ("Recall", "share of real images that generated ones come near: variety"),
    "coverage": ("Coverage", "recall that outliers cannot inflate"),
    "style_distance": ("Style distance", "difference of textures and colours, whatever is where"),
    "wavelet_energy_error": ("Wavelet energy error", "too much or too little detail, per band"),
    "diversity": ("Diversity", "how different two generated images look; best as different as two real ones"),
    "text_agreement": ("Text agreement", "how well images fit their captions"),
}


def write_report(
    assessment: Assessment, card: Mapping[str, Any] | None, folder: str | Path, name: str | None = None
) -> Path:
    """Writes `index.html` and `assessment.json`, both as a whole, and returns the path of the page.

    Args:
        card: the privacy report of the generator, `PrivacyCard.report`; None for a generator that was made from public
            images only, which the page then says.
        folder: made if missing.
        name: what the page calls the generator; default, the name of the private data.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be written; files that were there are still whole.
    """
    folder = Path(folder)
    text = render_report(assessment, card, name)
    figures = json.dumps(assessment.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    replace_files({folder / FIGURES_NAME: figures.encode(), folder / PAGE_NAME: text.encode()})
    return folder / PAGE_NAME


def render_report(assessment: Assessment, card: Mapping[str, Any] | None, name: str | None = None) -> str:
    """The page as text; see `write_report`.

    Raises:
        ValueError: neither a card nor a name.
    """
    if card is None and name is None:
        raise ValueError("name=None: a generator without a privacy card needs a name for its page.")
    leakage = assessment.leakage
    labels = [str(one.label) for one in assessment.utility[0].per_class] if assessment.utility else []
    svg = {"utility": plots.accuracies(assessment.utility, labels) if assessment.utility else ""}
    shares = [
        (label, found.share, found.low, found.high, found.expected)
        for model, leak in leakage.items()
        for label, found in ((model, leak.copying), (f"{model}, 3 % copies put in", leak.copies_noticed))
    ]
    svg["shares"] = plots.shares(shares) if shares else ""
    limit = None
    if card is not None:
        bounds = privacy_pairs(event_from_dict(card["accounting"]["event"]), card["adjacency"]["relation"])
        limit = row_limit(card, bounds)
        svg["attack"] = plots.attack_curve(bounds, [] if limit is None else _best_attacks(assessment))
        svg["profile"] = plots.profile(card["claim"]["profile"])
    return _template().render(
        card=card,
        claim=card["claim"] if card else None,
        name=name if card is None else name or card["data"]["name"],
        assessment=assessment,
        samples=_sample_tiles(assessment),
        columns=_columns(assessment),
        strips=[(caption, [_tile(image) for image in images]) for caption, images in assessment.strips],
        panel=_panel_tiles(assessment),
        quality=[_with_track(row) for row in assessment.quality],
        metrics=_METRICS,
        svg={name: Markup(text) for name, text in svg.items()},
        accesses=_accesses(assessment, card),
        limit=limit,
        evidence=EVIDENCE,
        flag=FLAG,
        version=installed_version("hf-spectral-dp"),
    )


def _best_attacks(assessment: Assessment) -> list[tuple[str, float, float, float]]:
    """The attack with the highest true positive rate on each model, and that rate with its interval."""
    found = []
    for model, leak in assessment.leakage.items():
        best = max(leak.membership, key=lambda result: result.tpr)
        whom = "this model" if model == "this model" else "its twin without privacy"
        found.append((f"best attack on {whom}", best.tpr, best.tpr_low, best.tpr_high))
    return found


# -- pictures --------------------------------------------------------------------------------------------------------


def _tile(image: Tensor) -> str:
    """An image (C, H, W) in [-1, 1] as a data URI of a PNG."""
    levels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _columns(assessment: Assessment) -> int:
    """One column per class where that fits, else ten."""
    labels = assessment.sample_labels
    classes = 0 if labels is None else len(labels.unique())
    return classes if 2 <= classes <= 12 else 10


def _sample_tiles(assessment: Assessment) -> list[tuple[str, str]]:
    """Caption and picture of every sample, row by row, a class in each column where there is one per class."""
    labels, images = assessment.sample_labels, assessment.samples
    if labels is None:
        return [(f"sample {index}", _tile(image)) for index, image in enumerate(images)]
    order = list(range(len(images)))
    if _columns(assessment) == len(labels.unique()):
        ranks: list[int] = []  # how many of the same class come before
        for index, label in enumerate(labels.tolist()):
            ranks.append(labels[:index].tolist().count(label))
        rows = min(int((labels == label).sum()) for label in labels.unique())  # whole rows only
        order = sorted((index for index in order if ranks[index] < rows), key=lambda i: (ranks[i], int(labels[i])))
    return [(f"class {int(labels[index])}", _tile(images[index])) for index in order]


def _panel_tiles(assessment: Assessment) -> list[dict[str, Any]]:
    panel = assessment.panel
    if panel is None:
        return []
    triples = zip(panel.generated, panel.training, panel.heldout, panel.ratios.tolist(), strict=True)
    return [
        {"generated": _tile(one), "training": _tile(two), "heldout": _tile(three), "ratio": ratio}
        for one, two, three, ratio in triples
    ]


# -- tables ----------------------------------------------------------------------------------------------------------


def _with_track(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of quality with the places, in percent, of value, interval and floor on a line from zero."""
    if row["value"] is None:
        return {**row, "track": None}
    figures = {name: row[name] for name in ("value", "low", "high", "floor") if row[name] is not None}
    start = min(0.0, *figures.values())
    width = max(*figures.values(), 1e-12) - start
    return {**row, "track": {name: round(96 * (figure - start) / width + 2, 2) for name, figure in figures.items()}}


def _accesses(assessment: Assessment, card: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Every look at private data: what, how it is covered, and a word for the colour."""
    rows = []
    if card is None:
        rows.append(("training, on public images only", "no private data", "none"))
    else:
        measured = {access["what"] for access in assessment.accesses}
        rows += [
            (access["what"], *(("covered by the claim", "good") if access["accounted"] else ("not accounted", "bad")))
            for access in card["data_accesses"]
            if access["what"] not in measured
        ]
        tuning = card["hyperparameter_tuning"]
        covered = {"none": ("no private data", "none"), "public": ("no private data", "none")}.get(tuning["data"])
        rows.append((f"choice of hyper-parameters: {tuning['statement']}", *(covered or ("not accounted", "bad"))))
    for access in assessment.accesses:
        if not access["private"]:
            rows.append((access["what"], "no private data", "none"))
        elif access["accounted"]:
            rows.append((access["what"], "accounted, on top of the claim", "good"))
        else:
            rows.append((access["what"], "not accounted", "bad"))
    return rows


# -- the page --------------------------------------------------------------------------------------------------------


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "percent": _percent, "chance": _chance}
    return environment.get_template("report.html.jinja")


def _figure(value: float | None) -> str:
    """Three significant digits; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _chance(p: float) -> str:
    """How often chance brings as much: a p-value."""
    shown = "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"
    return shown.replace(" ", "\N{NO-BREAK SPACE}")


__all__ = ["FIGURES_NAME", "PAGE_NAME", "render_report", "write_report"]
