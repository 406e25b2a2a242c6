"""The public model learns the private classes from public photos, which a private critic chose.

Run by train.py when a config has a `critic` section (of `kind: classes`; private_mean.py is for the other kind). A few
noisy sums over all private images train the critic (`hf_spectral_dp.critic`), at a part of the budget; what it then
says of public photos, and what the public model learns from these, is post-processing. Writes to the output folder,
beside train.py's:

    critic/          the critic, which the pipeline saves again
    critic_training/ its ledger: keep that private
    public_tokens/   the token rows of the public photos
    public_model/    what private training starts from
"""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast
from critics import ledger_of, trained
from job_config import located
from pretrain import Rows
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_spectral_dp import ClassCritic, DPTrainingArguments, SpectralTokenizerForCausalLM
from hf_spectral_dp.feature_rows import FeatureRows, features_of, features_of_rows
from hf_spectral_dp.image_sources import load_images
from hf_spectral_dp.metrics.features import PublicFeatures
from hf_spectral_dp.metrics.public_features import EYE
from hf_spectral_dp.private_marks import marks
from hf_spectral_dp.token_store import TokenStore, build_token_store
from hf_spectral_dp.views import Views
from hf_spectral_dp.whole_files import new_folder

SHARE, PUBLIC_STEPS = 0.1, 1500  # of the photos that each class is learned from; of 128 of them each
CLASS_DROPOUT = 0.1  # share of rows without a class, so that the model also learns to sample without one
NOTE = "public photos that a private critic found likeliest for each class, learned by ordinary training"


class Chosen:
    """Public token rows (num_classes, K), each as the class that it was chosen for."""

    def __init__(self, store: TokenStore, indices: Tensor, model: SpectralTokenizerForCausalLM):
        self.store, self.class_token_ids = store, model.config.class_token_ids
        self.each, self.indices = indices.shape[1], indices.flatten()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.store[int(self.indices[index])]
        row["input_ids"][0] = self.class_token_ids[index // self.each]
        return row


def public_rows(section: dict[str, Any], model: Any, processor: Any, folder: Path) -> TokenStore:
    """Token rows of the public photos and of their mirror images; made once, by the first process."""
    with PartialState().local_main_process_first():
        if not folder.exists():
            photos = load_images(section["public"], section.get("public_split", "train"))
            build_token_store(photos, model, processor, folder, views=Views(count=2, mirror=True))
    store = TokenStore.load(folder)
    store.check_codec(model)
    return store


def taught(
    section: dict[str, Any], model: Any, processor: Any, detail: Any, store: TokenStore, args: DPTrainingArguments,
    output: Path,
) -> tuple[SpectralTokenizerForCausalLM, ClassCritic, str]:
    """The public model after it learned the classes from public photos, the critic that chose them, and its ledger.

    A run that goes on finds both in its folder. A crash while the critic was trained has spent its budget: its ledger
    refuses to begin again, and a new run needs a folder and a budget of its own.

    Args:
        section: the config's `critic`.
        model, processor, detail: public model, its image processor and the super-resolution model.
        store: the private token rows; args: the arguments of the private training that follows.
        output: the run's folder.
    """  # fmt: skip
    folder = output / "critic"
    ledger = str(ledger_of(output))
    if (output / "public_model").exists():
        learned = AutoModelForCausalLM.from_pretrained(output / "public_model")
        return learned, ClassCritic.from_pretrained(folder), ledger
    photos = public_rows(section, model, processor, output / "public_tokens")
    known = folder.exists()
    if known:
        critic = ClassCritic.from_pretrained(folder)
    else:
        network = PublicFeatures(located(section["network"]) if "network" in section else EYE).network
        critic = ClassCritic.on(network, model.config.num_classes)
    features = features_of(model.eval(), detail, critic.features)
    # Every process draws its own view of a photo; what they whiten by, and choose, must be the same.
    public = broadcast(features_of_rows(photos, features)[1].to(args.device)).cpu()
    if not known:
        critic.fit(public)
        critic = trained(critic, FeatureRows(store, model, features), section, args, output, model, detail)
    chosen = Chosen(photos, critic.likeliest(public, section.get("share", SHARE)), model)
    training = TrainingArguments(
        output_dir=str(output / "public_training"), max_steps=section.get("public_steps", PUBLIC_STEPS),
        per_device_train_batch_size=128, learning_rate=1.5e-3, lr_scheduler_type="cosine", warmup_steps=150,
        weight_decay=0.01, save_strategy="no", report_to="none", use_cpu=args.use_cpu, seed=args.seed,
    )  # fmt: skip
    trainer = Trainer(model=model, args=training, train_dataset=Rows(chosen, model.config, CLASS_DROPOUT))
    trainer.train()
    learned = trainer.accelerator.unwrap_model(trainer.model).cpu()
    learned.config.private_runs = marks(critic, model)
    if trainer.is_world_process_zero():
        new_folder(output / "public_model", learned.save_pretrained)
    trainer.accelerator.wait_for_everyone()
    return learned, critic, ledger
