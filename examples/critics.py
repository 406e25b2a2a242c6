"""What both kinds of critic need: the arguments of their private run, the run itself, and what is refused before it.

For warm_start.py (classes) and private_mean.py (a mean).
"""

import copy
from pathlib import Path
from typing import Any

from hf_spectral_dp import DPTrainer, DPTrainingArguments
from hf_spectral_dp.feature_rows import critic_arguments, mean_arguments
from hf_spectral_dp.private_marks import marks
from hf_spectral_dp.token_store import TokenStore
from hf_spectral_dp.trainer import LEDGER
from hf_spectral_dp.whole_files import new_folder


def private_arguments(section: dict[str, Any], args: DPTrainingArguments, output: Path) -> DPTrainingArguments:
    """The critic's own private run, as the config's `critic` section asks for it."""
    asked = {name: section[name] for name in ("max_steps", "learning_rate") if name in section}
    recipe = mean_arguments if section.get("kind") == "mean" else critic_arguments
    machine = {"use_cpu": args.use_cpu, "secure_mode": args.secure_mode}
    return recipe(str(ledger_of(output).parent), section["target_epsilon"], args.target_delta, **machine, **asked)


def ledger_of(output: Path) -> Path:
    """The ledger of the critic's private run, in the folder of the whole run."""
    return output / "critic_training" / LEDGER


def trained(
    critic: Any, rows: Any, section: dict[str, Any], args: DPTrainingArguments, output: Path, *shown_by: Any
) -> Any:
    """A critic after its private run on `rows`, saved to output/critic by the first process.

    It has the marks of the networks that its rows are `shown_by`, too: they may come out of earlier runs, which the
    training counts, but not the ledger of the critic.
    """
    private = DPTrainer(critic, private_arguments(section, args, output), rows)
    private.train()
    critic = private.merged_model().cpu().eval()
    critic.config.private_runs = marks(critic, *shown_by)
    if private.is_world_process_zero():
        new_folder(output / "critic", critic.save_pretrained)
        print(f"critic: epsilon {private.epsilon_spent:.4f} of {args.target_epsilon:g}", flush=True)
    private.accelerator.wait_for_everyone()
    return critic


def check_training(
    section: dict[str, Any], model: Any, store: TokenStore, args: DPTrainingArguments, output: Path
) -> None:
    """Refuses what the private training would refuse, before the critic spends.

    Args:
        section: the config's `critic`. model: as public as the one that will be trained, and of its shape.
        store: the private token rows. args: of the training. output: the run's folder.

    Raises:
        ValueError, LedgerError: as `DPTrainer`, or nothing of the budget is left beside critic and earlier runs. What
            the optimizer and its schedule raise where they cannot take what `args` give them.
    """
    trainer = DPTrainer(copy.deepcopy(model), args, store)
    plan = trainer.plan
    trainer.create_optimizer_and_scheduler(plan.steps)
    asked = private_arguments(section, args, output).plan(plan.num_examples, ())
    args.plan(plan.num_examples, [*plan.earlier, asked])
