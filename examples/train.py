"""The main job: one YAML file in, a differentially private image generator with its privacy card out.

    accelerate launch examples/train.py --config examples/configs/demo.yaml

Streams the images once into token rows, fine-tunes the public model on them with `DPTrainer`, chains it with a public
super-resolution model, and writes to the config's `output` folder:

    pipeline/    a DPSpectralPipeline with privacy.json, README.md (the card) and samples.png: this may be published
    tokens/      the token rows, as private as the images
    training/    checkpoints and the privacy ledger; keep them together and private

With a `critic` section, a small part of the budget goes into a critic that chooses among the images drawn: by the mean
of the private images (`kind: mean`, see private_mean.py), or by their classes (`kind: classes`, see warm_start.py). It
also says from which public photos super-resolution learns detail like that of the private images, or the public model
the classes before private training begins. With an
`evaluation` section it also prints the accuracy on real test images of a classifier trained on the generated ones,
beside its controls. All sections and fields are explained in examples/configs/demo.yaml.
"""

import argparse
import copy
import importlib.resources
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from controls import compare, real_images
from private_mean import learn_to_choose, mean_of, mended, public_photos
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageToImage
from warm_start import NOTE, private_arguments, taught

from hf_spectral_dp import DPSpectralPipeline, DPTrainer, DPTrainingArguments, PrivacyCard
from hf_spectral_dp.generation import image_grid
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.pipeline_spectral import SAMPLING_VALUES
from hf_spectral_dp.super_resolution import SpectralSuperResolution
from hf_spectral_dp.text_encoder import load_text_encoder
from hf_spectral_dp.token_store import TokenStore, build_token_store
from hf_spectral_dp.views import Views

COLUMNS = {"source", "split", "image_column", "label_column"}
FIELDS = {
    "data": COLUMNS
    | {"config_name", "revision", "num_examples", "description", "unit_column", "max_rows_per_unit", "views"}
    | {"caption_column", "caption_files"},
    "model": {"prior", "prior_source", "super_resolution", "super_resolution_source", "num_classes"}
    | {"text_encoder", "text_encoder_source", "max_text_tokens"},
    "critic": {"kind", "target_epsilon", "public", "public_split", "public_source", "network", "share", "max_steps"}
    | {"learning_rate", "public_steps"},
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
TEXT = ("data.caption_column", "model.text_encoder", "model.text_encoder_source", "card.prompts")
CRITICS = {  # by kind: fields that it needs, and the config that explains them
    "classes": ({"target_epsilon", "public", "public_source"}, "cifar10.yaml"),
    "mean": ({"target_epsilon"}, "faces.yaml"),
}
PUBLIC = ("public", "public_source", "public_split", "public_steps")
MENDED = "super-resolution went on from public photos, weighed so that their features have the private mean"
DRAWN = {
    "classes": "the critic keeps the one that shows its class likeliest",
    "mean": "the critic keeps one, at odds for which images kept have the private mean of public features",
}


def read_config(path: str) -> dict[str, Any]:
    """The YAML file; unknown and missing sections and fields are refused by name."""
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if unknown := set(config) - set(FIELDS) - {"output"}:
        raise ValueError(f"{path}: unknown sections {sorted(unknown)}; the known ones are output, {', '.join(FIELDS)}.")
    for section, fields in FIELDS.items():
        given = set(config.setdefault(section, {}))
        if unknown := given - fields:
            raise ValueError(f"{path}: {section} has unknown fields {sorted(unknown)}; it knows {sorted(fields)}.")
        if missing := REQUIRED.get(section, set()) - given:
            raise ValueError(f"{path}: {section} lacks {sorted(missing)}; examples/configs/demo.yaml explains them.")
    texts = ("data.description", "model.prior_source", "model.super_resolution_source", "card.hyperparameter_tuning")
    if empty := [name for name in texts if not str(config[name.split(".")[0]][name.split(".")[1]] or "").strip()]:
        raise ValueError(f"{path}: {', '.join(empty)} must say something: the card will hold it, and a card without it"
                         " is refused.")  # fmt: skip
    missing = [name for name in TEXT if not config[name.split(".")[0]].get(name.split(".")[1])]
    textual = not missing
    if missing and missing != list(TEXT):
        raise ValueError(f"{path} lacks {', '.join(missing)}; a model with text needs all of {', '.join(TEXT)}.")
    if textual and config["evaluation"]:
        raise ValueError(f"{path}: evaluation trains classifiers on class labels, which a model with text has none of.")
    if critic := config["critic"]:
        kind = critic.setdefault("kind", "classes")
        if kind not in CRITICS:
            raise ValueError(f"{path}: critic.kind={kind!r} is unknown; use one of {', '.join(CRITICS)}.")
        needed, example = CRITICS[kind]
        if missing := needed - set(critic):
            raise ValueError(f"{path}: critic lacks {sorted(missing)}; examples/configs/{example} explains them.")
        if kind == "classes" and not config["data"].get("label_column"):
            raise ValueError(f"{path}: a critic tells classes apart, and data.label_column names none.")
        if kind == "mean":
            if unused := set(critic) - {"kind", "target_epsilon", "network", *PUBLIC}:
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
        if (sampling := config["training"].get("sampling", "poisson")) != "poisson":
            raise ValueError(f"{path}: the critic's batches are those of sampling='poisson', and training.sampling="
                             f"{sampling!r} is accounted under another relation; use poisson for both.")  # fmt: skip
    return config


def located(name: str) -> str:
    """Where a model lies: "bundled:<name>" is a checkpoint inside the package; all else is a folder or a Hub id."""
    if not name.startswith("bundled:"):
        return name
    return str(importlib.resources.files("hf_spectral_dp") / "checkpoints" / name.removeprefix("bundled:"))


def private_images(data: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The stream of the config's images, and the names of their columns as `build_token_store` takes them."""
    options = {name: data[name] for name in ("config_name", "revision", "caption_files") if name in data}
    optional = ("image_column", "label_column", "caption_column", "unit_column", "max_rows_per_unit")
    columns = {name: data[name] for name in optional if name in data}
    return load_images(data["source"], data["split"], **options), columns


def tokenise(
    config: dict[str, Any], model: Any, processor: Any, text: tuple[Any, Any], views: Views | None, folder: Path
) -> TokenStore:
    """The token rows: made once by the first process of the machine, opened by the others and by resumed runs."""
    with PartialState().local_main_process_first():
        if not folder.exists():
            images, columns = private_images(config["data"])
            encoder, tokenizer = text
            build_token_store(images, model, processor, folder, **columns, views=views, text_encoder=encoder,
                              tokenizer=tokenizer)  # fmt: skip
    store = TokenStore.load(folder)
    store.check_codec(model)
    if store.captions is not None:
        store.captions.check_encoder(*text)
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; examples/configs/demo.yaml explains every field")
    parser.add_argument("--output", help="instead of the config's output folder")
    parser.add_argument("--target_epsilon", type=float, help="instead of the config's training.target_epsilon")
    parser.add_argument("--lora_rank", type=int, help="train LoRA adapters of this rank only (0: all weights)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint and its ledger")
    arguments = parser.parse_args()

    # 1. Everything that can be refused is refused here, before any image is read.
    config = read_config(arguments.config)
    output = Path(arguments.output or config.get("output", "runs/latest"))
    if output.exists() and not arguments.resume:
        raise SystemExit(f"output={str(output)!r} exists; pass --resume to go on, or choose another --output.")
    for name in ("target_epsilon", "lora_rank"):
        if getattr(arguments, name) is not None:
            config["training"][name] = getattr(arguments, name)
    args = DPTrainingArguments(**{"report_to": "none", **config["training"]}, output_dir=str(output / "training"))
    if config["critic"]:  # refused here, too, if it asks for what cannot work
        asked = private_arguments(config["critic"], args, output)
        if asked.target_epsilon >= args.target_epsilon:
            raise ValueError(
                f"critic.target_epsilon={asked.target_epsilon} is a part of training.target_epsilon="
                f"{args.target_epsilon}, which the training needs most of; a tenth to a third is usual."
            )
    data = config["data"]
    views = Views(**data["views"]) if "views" in data else None
    if "num_examples" in data:
        plan = args.plan(data["num_examples"])
        print(f"plan: {plan.steps} steps, sampling rate {plan.sampling_rate:g}, noise {plan.noise_multiplier:g},"
              f" epsilon {plan.epsilon():.4f} at delta {plan.delta:.3g}")  # fmt: skip
    prior = located(config["model"]["prior"])
    text, textual = (None, None), {}
    if config["model"].get("text_encoder"):
        text = load_text_encoder(located(config["model"]["text_encoder"]))
        textual = {"text_width": text[0].config.hidden_size}  # a prior without text gets new weights for it
        if "max_text_tokens" in config["model"]:
            textual["max_text_tokens"] = config["model"]["max_text_tokens"]
        if args.lora_rank and AutoConfig.from_pretrained(prior).conditioning != "text":
            raise ValueError(
                f"lora_rank={args.lora_rank} trains adapters only, and prior={prior!r} has no text: its new projection"
                " would stay random; use lora_rank 0, or a prior with text (examples/pretrain.py --text_encoder)."
            )
    model = AutoModelForCausalLM.from_pretrained(prior, **textual)
    if (classes := config["model"].get("num_classes", model.config.num_classes)) != model.config.num_classes:
        if args.lora_rank:
            raise ValueError(
                f"num_classes={classes} are new to prior={prior!r}, and lora_rank={args.lora_rank} would leave their"
                " embeddings all alike; use lora_rank 0."
            )
        model = model.with_classes(classes)
    processor = AutoImageProcessor.from_pretrained(prior)
    network = config["model"]["super_resolution"]  # ours, Swin2SR or their kind; none where the tokens need none
    detail = AutoModelForImageToImage.from_pretrained(located(network)) if network else None
    if getattr(getattr(detail, "config", None), "private_mean", False):
        raise ValueError(f"model.super_resolution={network!r} learned from what a private mean weighed, and no run here"
                         " would count what that cost; start from a public network.")  # fmt: skip
    DPSpectralPipeline(model, processor, detail, *text, **config["sampling"])
    weighs = config["critic"].get("kind") == "mean" and "public" in config["critic"]
    if weighs and (not isinstance(detail, SpectralSuperResolution) or model.config.coarse_size == processor.image_size):
        raise ValueError(f"critic.public teaches detail to a SpectralSuperResolution that enlarges what tokens show;"
                         f" model.super_resolution={network!r} is another, or does nothing here.")  # fmt: skip
    if weighs and next(public_photos(config["critic"]), None) is None:
        raise ValueError(f"critic.public={config['critic']['public']!r} holds no image that can be read.")

    # 2. Images to tokens, tokens to a private model. Test images that cannot be used end the run before it spends.
    store = tokenise(config, model, processor, text, views, output / "tokens")
    evaluated = config["evaluation"] if PartialState().is_main_process else None
    test = real_images(evaluated, processor) if evaluated else None
    public, judge = copy.deepcopy(model) if test else None, None
    if critic := config["critic"]:
        if critic["kind"] == "mean":
            judge, ledger = mean_of(critic, *private_images(data), processor, store, args, output)
        else:
            model, judge, ledger = taught(critic, model, processor, detail, store, args, output)
        args.earlier_ledgers = [ledger]
    trainer = DPTrainer(model, args, store)
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    if not trainer.is_world_process_zero():
        return

    # 3. The pipeline with samples of a fixed seed, not picked by hand.
    merged, network = trainer.merged_model().cpu().eval(), detail
    if weighs:
        network = mended(critic, judge, detail, merged, config["sampling"].get("temperature", 1.0), args, output)
    pipeline = DPSpectralPipeline(merged, processor, network, *text, critic=judge, **config["sampling"])
    if critic and critic["kind"] == "mean":
        learn_to_choose(pipeline, args.seed)
    folder = output / "pipeline"
    pipeline.save_pretrained(folder)
    classes = torch.arange(model.config.num_classes).repeat(8) if model.config.num_classes else None
    prompts = config["card"].get("prompts")
    each = 8 if prompts else 1 if classes is not None else 64
    generator = torch.Generator().manual_seed(0)
    images = pipeline(prompts, classes, each, generator=generator).images
    image_grid(images, columns=model.config.num_classes or 8).save(folder / "samples.png")

    # 4. The card, from the run itself.
    evaluation = compare(config["evaluation"], data, pipeline, public, detail, store, args, test) if test else []
    run, about = trainer.privacy_report(), config["card"]
    looks = list(about.get("outside_guarantee", []))
    if evaluation:
        section = config["evaluation"]
        looks.append(f"The figures under Quality: measured on images of {section['source']}, {section['split']}.")
    models, photos = config["model"], critic.get("public_source")
    if weighs:
        run["stages"].append({"name": "learning the detail", "private": False, "note": MENDED})
    elif photos:
        run["stages"].insert(1, {"name": "learning the classes", "private": False, "note": NOTE})
    if critic and (attempts := pipeline.config.attempts) > 1:
        kept = f"of {attempts} images drawn, {DRAWN[critic['kind']]}"
        run["stages"].append({"name": "choosing among samples", "private": False, "note": kept})
    encoder = [{"role": "text encoder", "source": models["text_encoder_source"]}] if prompts else []
    report = {
        **run,
        "data": {"name": data["source"], "split": data["split"], "description": data["description"]},
        "data_accesses": [
            *run["data_accesses"],
            *({"what": look, "accounted": False, "released": True} for look in looks),
        ],
        "public_data": [
            {"role": "codec and prior", "source": models["prior_source"]},
            {"role": "super-resolution", "source": models["super_resolution_source"]},
            *encoder,
            *([{"role": "photos that a private " + ("mean weighed" if weighs else "critic chose"), "source": photos}]
              if photos else []),
        ],
        "hyperparameter_tuning": {
            "statement": about["hyperparameter_tuning"],
            "data": about["tuning_data"],
            "accounted": about["tuning_data"] != "private",
        },
        "audit": [],
        "utility": evaluation,
        "reproduce": {
            "train": f"accelerate launch examples/train.py --config {Path(arguments.config).name}",
            "verify": "hf-spectral-dp verify",
        },
        "license": about.get("license", "other"),
        "contact": about.get("contact", "the publisher of this repository"),
    }
    PrivacyCard(report).save(folder)
    print(f"epsilon spent  {trainer.epsilon_spent:.4f} at delta {trainer.plan.delta:.3g}, unit: {store.unit}")
    print(f"pipeline       {folder}")
    print(f"card           {folder / 'README.md'}  (check it: hf-spectral-dp verify {folder})")
    print(f"samples        {folder / 'samples.png'}")
    print(f"measure it     examples/evaluate.py --pipeline {folder} --update_card (no attack was tried on it so far)")


if __name__ == "__main__":
    main()
