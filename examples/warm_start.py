"""The public model learns the private classes from public photos, which a private critic chose.

Run by train.py when a config has a `critic` section. A few noisy sums over all private images train the critic
(`hf_spectral_dp.critic`), at a part of the budget; what it then says of public photos, and what the public model learns
from these, is post-processing. Writes to the output folder, beside train.py's:

    critic/          the critic, with its ledger in critic/training: as private as the other ledger
    public_tokens/   the token rows of the public photos
    public_model/    what private training starts from
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_spectral_dp import DPTrainer, DPTrainingArguments, SpectralTokenizerForCausalLM
from hf_spectral_dp.critic import ClassCritic, ClassCriticConfig, FeatureRows, Features, features_of
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.metrics.features import load_extractor
from hf_spectral_dp.token_store import TokenStore, build_token_store
from hf_spectral_dp.trainer import LEDGER
from hf_spectral_dp.views import Views

CLASS_DROPOUT = 0.1  # share of rows without a class, so that the model also learns to sample without one
NOTE = "public photos that a private critic found likeliest for each class, learned by ordinary training"


class Chosen(torch.utils.data.Dataset):
    """Public token rows, each as often as the critic chose it, as its class or (one in ten) as none."""

    def __init__(self, store: TokenStore, indices: Tensor, model: SpectralTokenizerForCausalLM):
        self.store, self.config = store, model.config
        self.classes, self.indices = indices.shape[0], indices.flatten()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.store[int(self.indices[index])]
        of_class = self.config.class_token_ids[index // (len(self) // self.classes)]
        row["input_ids"][0] = self.config.null_token_id if torch.rand(()) < CLASS_DROPOUT else of_class
        return {**row, "labels": row["input_ids"]}


def critic_arguments(section: dict[str, Any], args: DPTrainingArguments, output: Path) -> DPTrainingArguments:
    """The critic's own private run: full batches, so that few noisy sums are enough."""
    return DPTrainingArguments(
        output_dir=str(output / "critic" / "training"),
        target_epsilon=section["target_epsilon"],
        target_delta=args.target_delta,
        sampling_rate=1.0,
        max_steps=section.get("max_steps", 20),
        micro_batch_size=section.get("micro_batch_size", 5000),
        optim="sgd",
        optim_args="momentum=0.9",
        learning_rate=section.get("learning_rate", 20.0),
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=args.use_cpu,
    )


def public_rows(section: dict[str, Any], model: Any, processor: Any, folder: Path) -> TokenStore:
    """Token rows of the public photos and of their mirror images; made once, by the first process."""
    with PartialState().local_main_process_first():
        if not folder.exists():
            photos = load_images(section["public"], section.get("public_split", "train"))
            mirrored = Views(count=2, mirror=True)
            build_token_store(photos, model, processor, folder, views=mirrored)
    store = TokenStore.load(folder)
    store.check_codec(model)
    return store


def features_of_rows(store: TokenStore, features: Features) -> Tensor:
    """(N, D), one view of each row."""
    parts = torch.arange(len(store)).split(500)
    return torch.cat([features(store[indices]["input_ids"][:, 1:]) for indices in parts])


def private_critic(
    store: TokenStore, model: Any, features: Features, public: Tensor, args: DPTrainingArguments, folder: Path
) -> ClassCritic:
    """The critic of an earlier start of this run, or a new one: a crash in between has spent its budget."""
    if (folder / "config.json").exists():
        return ClassCritic.from_pretrained(folder).eval()
    critic = ClassCritic(ClassCriticConfig(public.shape[1], model.config.num_classes))
    critic.fit(public)
    trainer = DPTrainer(critic, args, FeatureRows(store, model, features))
    trainer.train()
    critic = trainer.merged_model().cpu().eval()
    if trainer.is_world_process_zero():
        critic.save_pretrained(folder)
    print(f"critic         epsilon {trainer.epsilon_spent:.4f} of {args.target_epsilon:g}", flush=True)
    return critic


def taught(
    section: dict[str, Any],
    model: Any,
    processor: Any,
    detail: Any,
    store: TokenStore,
    args: DPTrainingArguments,
    output: Path,
) -> tuple[SpectralTokenizerForCausalLM, str]:
    """The public model after it learned the classes from public photos, and the ledger of the critic that chose them.

    Args:
        section: the config's `critic`.
        model, processor, detail: public model, its image processor and the super-resolution model.
        store: the private token rows; args: the arguments of the private training that follows.
        output: the run's folder.
    """
    ledger = str(output / "critic" / "training" / LEDGER)
    if (output / "public_model").exists():
        return AutoModelForCausalLM.from_pretrained(output / "public_model"), ledger
    photos = public_rows(section, model, processor, output / "public_tokens")
    features = features_of(model.eval(), detail, load_extractor(section.get("extractor", "public")))
    public = features_of_rows(photos, features)
    critic = private_critic(store, model, features, public, critic_arguments(section, args, output), output / "critic")
    chosen = Chosen(photos, critic.likeliest(public, section.get("share", 0.1)), model)
    training = TrainingArguments(
        output_dir=str(output / "public_training"), max_steps=section.get("public_steps", 1500),
        per_device_train_batch_size=128, learning_rate=1.5e-3, lr_scheduler_type="cosine", warmup_ratio=0.1,
        weight_decay=0.01, save_strategy="no", report_to="none", use_cpu=args.use_cpu, seed=args.seed,
    )  # fmt: skip
    trainer = Trainer(model=model, args=training, train_dataset=chosen)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model).cpu()
    if trainer.is_world_process_zero():
        model.save_pretrained(output / "public_model")
    trainer.accelerator.wait_for_everyone()
    return model, ledger
