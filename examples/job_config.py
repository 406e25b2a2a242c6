"""The YAML file of a job: which sections and fields there are, and what is refused before any image is read.

examples/configs/demo.yaml explains the fields; those of critics are in faces.yaml and cifar10.yaml.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import yaml

from hf_spectral_dp import DPTrainingArguments, bundled_model
from hf_spectral_dp.image_sources import load_images, source_name
from hf_spectral_dp.pipeline_spectral import SAMPLING_VALUES
from hf_spectral_dp.report_rules import check_words
from hf_spectral_dp.views import Views

COLUMNS = {"source", "split", "config_name", "revision", "image_column", "label_column"}
FIELDS = {
    "data": COLUMNS
    | {"num_examples", "description", "unit_column", "max_rows_per_unit", "views", "class_names"}
    | {"caption_column", "caption_files", "white_level"},
    "model": {"prior", "prior_source", "super_resolution", "super_resolution_source", "num_classes"}
    | {"text_encoder", "text_encoder_source", "max_text_tokens"},
    "critic": {"kind", "target_epsilon", "public", "public_split", "public_source", "network", "share", "max_steps"}
    | {"network_source", "learning_rate", "public_steps"},
    "training": set(DPTrainingArguments.__dataclass_fields__) - {"output_dir"},
    "sampling": set(SAMPLING_VALUES),
    "card": {"license", "hyperparameter_tuning", "tuning_data", "outside_guarantee", "prompts", "contact"},
    "evaluation": COLUMNS | {"images_per_class", "twin_epochs", "classifier_steps"},
}
REQUIRED = {
    "data": {"source", "split", "description"},
    "model": {"prior", "prior_source", "super_resolution", "super_resolution_source"},
    "training": {"target_epsilon"},
    "card": {"hyperparameter_tuning", "tuning_data"},
}
EMPTY = {"super_resolution"}  # may be given as nothing, which says that none is needed
TEXT = ("data.caption_column", "model.text_encoder", "model.text_encoder_source", "card.prompts")
CRITICS = {  # by kind: fields that it needs, the config that explains them, and what the bundled network learned from
    "classes": (
        {"target_epsilon", "public", "public_source"}, "cifar10.yaml",
        "Tiny ImageNet, public photos, and what EfficientNet-Lite0, a public classifier of ImageNet, says of them",
    ),
    "mean": ({"target_epsilon"}, "faces.yaml", "Tiny ImageNet, public photos"),
}  # fmt: skip
PUBLIC = ("public", "public_source", "public_split", "public_steps")
WHOLE = {  # the least of each; what training and sampling take, they check themselves
    "data.num_examples": 1, "data.max_rows_per_unit": 1, "data.white_level": 1, "model.num_classes": 0,
    "model.max_text_tokens": 1, "critic.max_steps": 1, "critic.public_steps": 1, "evaluation.images_per_class": 1,
    "evaluation.classifier_steps": 1,
}  # fmt: skip
POSITIVE = ("critic.target_epsilon", "critic.learning_rate", "critic.share", "evaluation.twin_epochs")
LISTS = ("data.class_names", "card.outside_guarantee", "card.prompts")


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as the number that it is, which PyYAML takes for text.

    Refuses a key that is given twice: of two `earlier_ledgers` PyYAML would silently keep the last.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        merged = "tag:yaml.org,2002:merge"  # a field that is merged may be given anew
        names = [key.value for key, _ in node.value if key.tag != merged]
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} stands twice{node.start_mark}; give each field once.")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_config(path: str) -> dict[str, Any]:
    """The YAML file; unknown and missing sections and fields are refused by name.

    A section whose lines are all commented out is an empty one, and a field with nothing behind it is not given.
    """
    config = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no sections; examples/configs/demo.yaml explains them.")
    if unknown := set(config) - set(FIELDS) - {"output"}:
        raise ValueError(f"{path}: unknown sections {_listed(unknown)}; the known ones are output,"
                         f" {', '.join(FIELDS)}.")  # fmt: skip
    for section, fields in FIELDS.items():
        found = config.get(section) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{path}: {section}={found!r} is no section; give its fields, one on a line.")
        config[section] = {name: value for name, value in found.items() if value is not None or name in EMPTY}
        if unknown := set(found) - fields:
            raise ValueError(f"{path}: {section} has unknown fields {_listed(unknown)}; it knows {sorted(fields)}.")
        given = set(config[section])
        needed = REQUIRED.get(section, {"source", "split"} if section == "evaluation" and given else set())
        if missing := needed - given:
            raise ValueError(f"{path}: {section} lacks {sorted(missing)}; examples/configs/demo.yaml explains them.")
    _check_kinds(path, config)
    texts = ("data.description", "model.prior_source", "model.super_resolution_source", "card.hyperparameter_tuning")
    if empty := [name for name in texts if not str(config[name.split(".")[0]][name.split(".")[1]] or "").strip()]:
        raise ValueError(f"{path}: {', '.join(empty)} must say something: the card will hold it, and a card without it"
                         " is refused.")  # fmt: skip
    missing = [name for name in TEXT if not config[name.split(".")[0]].get(name.split(".")[1])]
    textual = not missing
    if missing and missing != list(TEXT):
        raise ValueError(f"{path} lacks {', '.join(missing)}; a model with text needs all of {', '.join(TEXT)}.")
    if config["evaluation"] and not (textual or config["data"].get("label_column")):
        raise ValueError(f"{path}: evaluation trains classifiers on class labels, and data.label_column names none.")
    if textual and config["evaluation"]:
        raise ValueError(f"{path}: evaluation trains classifiers on class labels, which a model with text has none of.")
    if (views := config["data"].get("views")) is not None:
        known = [field.name for field in dataclasses.fields(Views)]
        if not isinstance(views, dict) or "count" not in views or set(views) - set(known):
            raise ValueError(f"{path}: data.views={views!r} takes count, and beside it some of {', '.join(known[1:])}.")
    if critic := config["critic"]:
        if "network" in critic and not Path(located(critic["network"])).is_dir():
            raise ValueError(f"{path}: critic.network={critic['network']!r} is no folder; name one that train_eye.py or"
                             " train_features.py wrote, or bundled:public-eye.")  # fmt: skip
        if ("network" in critic) != bool(str(critic.get("network_source", "")).strip()):
            raise ValueError(f"{path}: critic.network and critic.network_source belong together: the card says from"
                             " which public images a network of your own learned.")  # fmt: skip
        kind = critic.setdefault("kind", "classes")
        if kind not in CRITICS:
            raise ValueError(f"{path}: critic.kind={kind!r} is unknown; use one of {', '.join(CRITICS)}.")
        needed, example, _ = CRITICS[kind]
        if missing := needed - set(critic):
            raise ValueError(f"{path}: critic lacks {sorted(missing)}; examples/configs/{example} explains them.")
        if kind == "classes" and not config["data"].get("label_column"):
            raise ValueError(f"{path}: a critic tells classes apart, and data.label_column names none.")
        if kind == "mean":
            if unused := set(critic) - {"kind", "target_epsilon", "network", "network_source", *PUBLIC}:
                raise ValueError(f"{path}: critic of kind mean takes no {sorted(unused)}; leave them out.")
            if (given := set(critic) & set(PUBLIC)) and not set(PUBLIC[:2]) <= given:
                raise ValueError(f"{path}: critic has {sorted(given)}; the photos that a private mean weighs need both"
                                 f" of {', '.join(PUBLIC[:2])}.")  # fmt: skip
            if config["sampling"].get("attempts", 1) < 2:
                raise ValueError(f"{path}: a critic of kind mean chooses among sampling.attempts images; give 2 or"
                                 " more, 8 are usual.")  # fmt: skip
            if textual:
                raise ValueError(f"{path}: a critic of kind mean would draw all prompts towards one mean; leave it out"
                                 " for a model with text.")  # fmt: skip
        if (share := critic.get("share", 1)) > 1:
            raise ValueError(f"{path}: critic.share={share} must be in (0, 1].")
        if (sampling := config["training"].get("sampling", "poisson")) != "poisson":
            raise ValueError(f"{path}: the critic's batches are those of sampling='poisson', and training.sampling="
                             f"{sampling!r} is accounted under another relation; use poisson for both.")  # fmt: skip
        if "public" in critic and not str(critic["public_source"] or "").strip():
            raise ValueError(f"{path}: critic.public_source must say where the public photos are from.")
    try:
        check_words({name: said for name, said in publisher_words(config).items() if said != []})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _check_kinds(path: str, config: dict[str, Any]) -> None:
    """Refuses text where a number belongs, a number where text does, and numbers that nothing could be done with."""
    given = {f"{section}.{name}": value for section in FIELDS for name, value in config[section].items()}
    for name, value in ({"output": config.get("output", "")} | given).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in WHOLE:
            fits = number and isinstance(value, int) and value >= WHOLE[name]
            rule = f"a whole number of at least {WHOLE[name]}, without quotes"
        elif name in POSITIVE:
            fits, rule = number and 0 < value < math.inf, "a number above 0, without quotes"
        elif name in LISTS:
            fits = isinstance(value, list) and all(isinstance(each, str) for each in value)
            rule = "a list of texts; quotes make a text of a number, and of yes and no"
        elif name.startswith(("training.", "sampling.")) or name == "data.views" or value is None:
            continue
        else:
            fits, rule = isinstance(value, str), "text; put it into quotes"
        if not fits:
            raise ValueError(f"{path}: {name}={value!r} must be {rule}.")


def _listed(names: set[Any]) -> list[str]:
    return sorted(map(str, names))


def publisher_words(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a privacy report that the config's author writes; no run says them."""
    data, models, about, critic = config["data"], config["model"], config["card"], config["critic"]
    sources = {
        "codec and prior": models["prior_source"],
        "super-resolution": models["super_resolution_source"],
        "text encoder": models.get("text_encoder_source"),
        "photos that a private " + ("mean weighed" if critic.get("kind") == "mean" else "critic chose"):
            critic.get("public_source"),
        "network that the critic looks through": critic and critic.get("network_source", CRITICS[critic["kind"]][2]),
    }  # fmt: skip
    return {
        "data": {"name": source_name(data["source"]), "split": data["split"], "description": data["description"]},
        "data_accesses": [
            {"what": look, "accounted": False, "released": True} for look in about.get("outside_guarantee", [])
        ],
        "public_data": [{"role": role, "source": source} for role, source in sources.items() if source],
        "hyperparameter_tuning": {
            "statement": about["hyperparameter_tuning"],
            "data": about["tuning_data"],
            "accounted": about["tuning_data"] != "private",
        },
        "license": about.get("license", "other"),
        "contact": about.get("contact", "the publisher of this repository"),
    }


def opened(section: dict[str, Any]) -> Any:
    """The stream of images that a section names."""
    options = {name: section[name] for name in ("config_name", "revision", "caption_files") if name in section}
    return load_images(section["source"], section["split"], **options)


def located(name: str) -> str:
    """Where a model lies: "bundled:<name>" is a checkpoint inside the package; all else is a folder or a Hub id."""
    return str(bundled_model(name.removeprefix("bundled:"))) if name.startswith("bundled:") else name
