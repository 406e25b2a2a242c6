"""The main job: one YAML file in, a differentially private image generator with its privacy card out.

    accelerate launch examples/train.py --config examples/configs/demo.yaml

Streams the images once into token rows, fine-tunes the public model on them with `DPTrainer`, chains it with a public
super-resolution model, and writes to the config's `output` folder:

    pipeline/    a DPSpectralPipeline with privacy.json, README.md (the card) and samples.png: this may be published
    tokens/      the token rows, as private as the images; tokens.json says of which data, and by which critic
    training/    checkpoints and the privacy ledger; keep them together and private

With a `critic` section, a part of the budget goes into a critic that chooses among the images drawn: by the mean
of the private images (`kind: mean`, see private_mean.py), or by their classes (`kind: classes`, see warm_start.py). It
also says from which public photos super-resolution learns detail like that of the private images, or the public model
the classes before private training begins. With an
`evaluation` section it also prints the accuracy on real test images of a classifier trained on the generated ones,
beside its controls. All sections and fields are explained in examples/configs/demo.yaml.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from controls import compare, real_images
from critics import check_training, private_arguments
from job_config import located, opened, publisher_words, read_config
from private_mean import learn_to_choose, mean_of, mended, public_photos
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageToImage
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from warm_start import NOTE, taught

from hf_spectral_dp import DPSpectralPipeline, DPTrainer, DPTrainingArguments, PrivacyCard
from hf_spectral_dp.generation import image_grid
from hf_spectral_dp.image_sources import source_name
from hf_spectral_dp.private_marks import refuse_uncounted
from hf_spectral_dp.super_resolution import SpectralSuperResolution
from hf_spectral_dp.text_encoder import load_text_encoder
from hf_spectral_dp.token_store import TokenStore, build_token_store
from hf_spectral_dp.trainer import LEDGER
from hf_spectral_dp.views import Views
from hf_spectral_dp.whole_files import replace_files

MENDED = "super-resolution went on from public photos, weighed so that their features have the private mean"
DRAWN = {
    "classes": "images are drawn, up to {} for each, until the critic takes one for every class asked for",
    "mean": "of {} images drawn the critic keeps one, so that images kept have the private mean of public features",
}


def private_images(data: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The stream of the config's images, and the names of their columns as `build_token_store` takes them."""
    optional = ("image_column", "label_column", "class_names", "caption_column", "unit_column", "max_rows_per_unit")
    columns = {name: data[name] for name in optional if name in data}
    return opened(data), columns


def tokenise(
    config: dict[str, Any], model: Any, processor: Any, text: tuple[Any, Any], views: Views | None, folder: Path
) -> TokenStore:
    """The token rows: made once by the first process of the machine, opened by the others and by resumed runs."""
    asked = {name: value for name, value in config["data"].items() if name not in ("description", "num_examples")}
    asked["critic"] = config["critic"]  # whose photos and network a run that goes on finds in its folder, too
    asked["num_classes"] = model.config.num_classes  # the start token of a row without a class is the one after these
    made_of = folder.with_name("tokens.json")
    with PartialState().local_main_process_first():
        if folder.exists():
            if made_of.exists() and (made := json.loads(made_of.read_bytes())) != json.loads(json.dumps(asked)):
                raise ValueError(
                    f"the tokens in {str(folder)!r} were made of data={made}, not of {asked}; give data, classes and"
                    " critic again as they were, or train in another folder."
                )
        else:
            images, columns = private_images(config["data"])
            encoder, tokenizer = text
            build_token_store(images, model, processor, folder, **columns, views=views, text_encoder=encoder,
                              tokenizer=tokenizer)  # fmt: skip
            replace_files({made_of: json.dumps(asked).encode()})
    store = TokenStore.load(folder)
    store.check_codec(model)
    if store.captions is not None:
        store.captions.check_encoder(*text)
    return store


def begun(folder: Path) -> bool:
    """Whether the private training that writes there was ever charged, as far as its folder can tell."""
    return (folder / LEDGER).exists() or any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def weighs_photos(config: dict[str, Any]) -> bool:
    """Whether super-resolution goes on learning from public photos that the private mean weighs."""
    return config["critic"].get("kind") == "mean" and "public" in config["critic"]


def text_encoder_of(words: dict[str, Any], prior: str, lora_rank: int) -> tuple[tuple[Any, Any], dict[str, int]]:
    """The public text encoder with its tokenizer, or (None, None), and the fields of the prior's config it sets."""
    if not words.get("text_encoder"):
        return (None, None), {}
    text = load_text_encoder(located(words["text_encoder"]))
    width, known = text[0].config.hidden_size, AutoConfig.from_pretrained(prior)
    if known.text_width not in (0, width):
        raise ValueError(f"model.prior={prior!r} was made for text of width {known.text_width}, model.text_encoder="
                         f"{words['text_encoder']!r} has {width}; take the encoder that the prior was pretrained"
                         " with.")  # fmt: skip
    if lora_rank and known.conditioning != "text":
        raise ValueError(
            f"lora_rank={lora_rank} trains adapters only, and prior={prior!r} has no text: its new projection"
            " would stay random; use lora_rank 0, or a prior with text (examples/pretrain.py --text_encoder)."
        )
    lengths = {"max_text_tokens": words["max_text_tokens"]} if "max_text_tokens" in words else {}
    return text, {"text_width": width, **lengths}  # a prior without text gets new weights for it


def public_parts(config: dict[str, Any], args: DPTrainingArguments) -> tuple[Any, Any, Any, tuple[Any, Any]]:
    """Model, image processor, super-resolution (or None), and text encoder with its tokenizer (or None, None).

    Raises:
        ValueError: parts that cannot work together, or a private one that no ledger counts.
    """
    words = config["model"]
    prior = located(words["prior"])
    text, textual = text_encoder_of(words, prior, args.lora_rank)
    model = AutoModelForCausalLM.from_pretrained(prior, **textual)
    # Without labels no private row would have a class, and the classes of the prior would stay what they were.
    known = model.config.num_classes if "label_column" in config["data"] else 0
    if (classes := words.get("num_classes", known)) != model.config.num_classes:
        if args.lora_rank and classes:
            raise ValueError(
                f"num_classes={classes} are new to prior={prior!r}, and lora_rank={args.lora_rank} would leave their"
                " embeddings all alike; use lora_rank 0."
            )
        model = model.with_classes(classes)
    model.config.class_names = config["data"].get("class_names")
    processor = AutoImageProcessor.from_pretrained(prior)
    if (white := config["data"].get("white_level")) is not None:
        processor = type(processor).from_dict({**processor.to_dict(), "white_level": white})
    network = words["super_resolution"]  # ours, Swin2SR or their kind; none where the tokens need none
    detail = AutoModelForImageToImage.from_pretrained(located(network)) if network else None
    counted = {run["ledger_head"] for run in args.earlier_runs()}
    for name, part in (("prior", model), ("super_resolution", detail)):
        refuse_uncounted(f"model.{name}={words[name]!r}", part, counted)
    DPSpectralPipeline(model, processor, detail, *text, **config["sampling"])
    if detail is None and model.config.coarse_size < model.config.image_size:
        sides = f"{model.config.coarse_size} for {model.config.image_size}"
        raise ValueError(f"model.super_resolution is empty, but prior={prior!r} draws images of side {sides}; name a"
                         " public network.")  # fmt: skip
    if weighs_photos(config):
        if not isinstance(detail, SpectralSuperResolution) or model.config.coarse_size == processor.image_size:
            raise ValueError(
                "critic.public teaches detail to a SpectralSuperResolution that enlarges what tokens show;"
                f" model.super_resolution={network!r} is another, or does nothing here."
            )
        try:
            next(public_photos(config["critic"], processor.white_level))
        except ValueError as error:
            raise ValueError(f"critic.public={config['critic']['public']!r}: {error}") from error
    return model, processor, detail, text


def save_samples(pipeline: DPSpectralPipeline, prompts: list[str] | None, path: Path) -> None:
    """A grid of images of a fixed seed, not picked by hand: eight of each class or prompt, or 64."""
    count = pipeline.model.config.num_classes
    classes = torch.arange(count).repeat(8) if count else None
    each = 8 if prompts else 1 if classes is not None else 64
    images = pipeline(prompts, classes, each, generator=torch.Generator().manual_seed(0)).images
    image_grid(images, columns=count or 8).save(path)


def report_of(run: dict[str, Any], config: dict[str, Any], attempts: int, command: str) -> dict[str, Any]:
    """The card's report: what the run accounts for, what became of it, and the publisher's words.

    Args:
        run: `DPTrainer.privacy_report`.
        config: of the job, checked.
        attempts: images that the pipeline draws at most for one that it shows.
        command: that trains the same again.
    """
    words, critic, stages = publisher_words(config), config["critic"], [*run["stages"]]
    if weighs_photos(config):
        stages.append({"name": "learning the detail", "private": False, "note": MENDED})
    elif critic and critic["kind"] == "classes":
        after = 1 + len(run["mechanism"]["earlier_runs"])  # of the start and the earlier runs, the critic's the last
        stages.insert(after, {"name": "learning the classes", "private": False, "note": NOTE})
    if critic and attempts > 1:
        kept = {"name": "choosing among samples", "private": False, "note": DRAWN[critic["kind"]].format(attempts)}
        stages.append(kept)
    return {
        **run,
        **words,
        "stages": stages,
        "data_accesses": [*run["data_accesses"], *words["data_accesses"]],
        "audit": [],
        "utility": [],
        "reproduce": {"train": command, "verify": "hf-spectral-dp verify"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; examples/configs/demo.yaml explains the fields")
    parser.add_argument("--output", help="instead of the config's output folder")
    parser.add_argument("--target_epsilon", type=float, help="instead of the config's training.target_epsilon")
    parser.add_argument("--lora_rank", type=int, help="train LoRA adapters of this rank only (0: all weights)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint and its ledger")
    arguments = parser.parse_args()

    # 1. Everything that can be refused is refused here, before any image is read.
    config = read_config(arguments.config)
    output = Path(arguments.output or config.get("output", "runs/latest"))
    taken = output.is_file() or output.is_dir() and any(output.iterdir())  # a refused run leaves an empty folder
    if taken and not arguments.resume:
        raise SystemExit(f"output={str(output)!r} exists; pass --resume to go on, or choose another --output.")
    for name in ("target_epsilon", "lora_rank"):
        if getattr(arguments, name) is not None:
            config["training"][name] = getattr(arguments, name)
    data, critic = config["data"], config["critic"]
    args = DPTrainingArguments(**{"report_to": "none", **config["training"]}, output_dir=str(output / "training"))
    if critic:  # refused here, too, if it asks for what cannot work
        asked = private_arguments(critic, args, output)
        if asked.target_epsilon >= args.target_epsilon:
            raise ValueError(
                f"critic.target_epsilon={asked.target_epsilon} is a part of training.target_epsilon="
                f"{args.target_epsilon}, which the training needs most of; a tenth to a third is usual."
            )
    views = Views(**data["views"]) if "views" in data else None
    if "num_examples" in data:
        plan = args.plan(data["num_examples"])
        print(f"plan: {plan.steps} steps, sampling rate {plan.sampling_rate:g}, noise {plan.noise_multiplier:g},"
              f" epsilon {plan.epsilon():.4f} at delta {plan.delta:.3g}")  # fmt: skip
    model, processor, detail, text = public_parts(config, args)
    if config["evaluation"] and PartialState().num_processes > 1:
        raise ValueError(f"evaluation trains its controls in one process, and this is one of"
                         f" {PartialState().num_processes}; take the section out, and run examples/evaluate.py on what"
                         " was trained.")  # fmt: skip

    # 2. Images to tokens, tokens to a private model. Test images that cannot be used end the run before either.
    goes_on = begun(output / "training")  # asked before any process can begin it
    test = real_images(config["evaluation"], processor, model.config) if config["evaluation"] else None
    store = tokenise(config, model, processor, text, views, output / "tokens")
    if test and store.report["unlabelled"]:
        raise ValueError("evaluation trains classifiers on the training images, too, and some have no label; give each"
                         " one, or take the section out.")  # fmt: skip
    public, judge = copy.deepcopy(model) if test else None, None
    if critic:
        if goes_on and not (output / "critic").exists():
            raise ValueError(f"{str(output / 'training')!r} was begun without the critic that the config asks for; take"
                             " the section out, or begin again in another folder.")  # fmt: skip
        if not goes_on:
            check_training(critic, model, store, args, output)
        if critic["kind"] == "mean":
            judge, ledger = mean_of(critic, *private_images(data), processor, store, args, output)
        else:
            model, judge, ledger = taught(critic, model, processor, detail, store, args, output)
        args.earlier_ledgers = [*(args.earlier_ledgers or ()), ledger]
    trainer = DPTrainer(model, args, store)
    trainer.train(resume_from_checkpoint=goes_on or None)
    if not trainer.is_world_process_zero():
        return

    # 3. The pipeline, with samples.
    merged, network = trainer.merged_model().cpu().eval(), detail
    if weighs_photos(config):
        temperature = config["sampling"].get("temperature", 1.0)
        network = mended(critic, judge, detail, merged, temperature, processor.white_level, args, output)
    pipeline = DPSpectralPipeline(merged, processor, network, *text, critic=judge, **config["sampling"])
    if critic and critic["kind"] == "mean":
        learn_to_choose(pipeline, args.seed)
    folder = output / "pipeline"
    pipeline.save_pretrained(folder)
    save_samples(pipeline, config["card"].get("prompts"), folder / "samples.png")

    # 4. The card, from the run itself.
    command = f"accelerate launch examples/train.py --config {Path(arguments.config).name}"
    report = report_of(trainer.privacy_report(), config, pipeline.config.attempts, command)
    PrivacyCard(report).save(folder)
    if test:  # the figures come later, so that nothing that ends them leaves a pipeline without its card
        section = config["evaluation"]
        report["utility"] = compare(section, data, pipeline, public, detail, store, args, test)
        images = f"{source_name(section['source'])}, {section['split']}"
        look = f"The figures under Quality: measured on images of {images}."
        report["data_accesses"].append({"what": look, "accounted": False, "released": True})
        PrivacyCard(report).save(folder)
    print(f"epsilon spent  {trainer.epsilon_spent:.4f} at delta {trainer.plan.delta:.3g}, unit: {store.unit}")
    print(f"pipeline       {folder}")
    print(f"card           {folder / 'README.md'}  (check it: hf-spectral-dp verify {folder})")
    print(f"samples        {folder / 'samples.png'}")
    print(f"measure it     examples/evaluate.py --pipeline {folder} --update_card (no attack was tried on it so far)")


if __name__ == "__main__":
    main()
