"""Can a privacy card be edited without `hf-spectral-dp verify` noticing?

Trains a tiny model with DP on random rows, saves the pipeline with its card, keeps the ledger, and then edits copies at
random, one edit each: bytes of privacy.json, README.md, of the weights and configurations, of the ledger; files added,
removed and swapped; records of the ledger dropped, repeated and taken from another run of the same plan; and, hardest,
figures of the claim and of the mechanism, where the forger makes the rest of the card, its hash and its README agree.
Every edit must be rejected by the command, and the untouched folder must not be.

What no edit here can show: a forger who rewrites card, README, hashes and event together tells another story of the
same weights, and only the ledger, which stays with the curator, speaks against that.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write_report
from hf_spectral_dp import DPSpectralPipeline, DPTrainer, DPTrainingArguments, PrivacyCard, SpectralImageProcessor
from hf_spectral_dp.cli import main as command
from hf_spectral_dp.feature_rows import RowsInMemory
from hf_spectral_dp.privacy_report import statement
from hf_spectral_dp.self_audit import random_rows, tiny_model
from hf_spectral_dp.trainer import LEDGER

STEPS = 4
PUBLISHED: dict[str, Any] = {
    "data": {"name": "random rows", "split": "all", "description": "Made on the spot; nobody's."},
    "public_data": [],
    "hyperparameter_tuning": {"statement": "None.", "data": "none", "accounted": True},
    "audit": [],
    "utility": [],
    "reproduce": {"train": "python -m benchmarks.verification", "verify": "hf-spectral-dp verify"},
    "license": "apache-2.0",
    "contact": "nobody",
}


def train(folder: Path) -> None:
    """A pipeline with its card in `folder`/pipeline, and the ledger of its run in `folder`/ledger.jsonl."""
    model = tiny_model()
    # Much noise: the accountant answers sooner, and it is asked a thousand times.
    arguments = DPTrainingArguments(
        output_dir=str(folder / "training"), target_epsilon=1.0, expected_batch_size=100, max_steps=STEPS,
        micro_batch_size=50, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = random_rows(model.config, 1000, torch.Generator().manual_seed(0))  # of every run the same
    trainer = DPTrainer(model, arguments, RowsInMemory(rows))
    trainer.train()
    processor = SpectralImageProcessor(image_size=16, num_channels=1)
    DPSpectralPipeline(trainer.merged_model().eval(), processor).save_pretrained(folder / "pipeline")
    PrivacyCard({**trainer.privacy_report(), **PUBLISHED}).save(folder / "pipeline")
    shutil.copyfile(folder / "training" / LEDGER, folder / "ledger.jsonl")


def rejected(folder: Path) -> bool:
    """Whether the command rejects what lies in a folder."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return command(["verify", str(folder / "pipeline"), "--ledger", str(folder / "ledger.jsonl")]) != 0


# -- edits: each changes one thing below a folder, and says what -------------------------------------------------------

Edit = Callable[[Path, random.Random], str]


def edit_bytes(path: Path, generator: random.Random) -> str:
    """Changes, inserts, deletes, doubles or cuts off bytes."""
    content = bytearray(path.read_bytes())
    place = generator.randrange(len(content))
    end = min(len(content), place + generator.randrange(1, 9))
    kind = generator.choice(["change", "insert", "delete", "double", "cut"])
    if kind == "change":
        content[place] ^= generator.randrange(1, 256)
    elif kind == "insert":
        content[place:place] = bytes([generator.randrange(256)])
    elif kind == "delete":
        del content[place:end]
    elif kind == "double":
        content[place:place] = content[place:end]
    else:
        del content[place:]
    if bytes(content) == path.read_bytes():  # a doubled byte may give the same text only if nothing was doubled
        content += b"\0"
    path.write_bytes(content)
    return f"{kind} at {place}"


def edit_card(folder: Path, generator: random.Random) -> str:
    return edit_bytes(folder / "pipeline" / "privacy.json", generator)


def edit_readme(folder: Path, generator: random.Random) -> str:
    return edit_bytes(folder / "pipeline" / "README.md", generator)


def edit_released(folder: Path, generator: random.Random) -> str:
    names = [entry["path"] for entry in PrivacyCard.load(folder / "pipeline").report["released"]]
    name = generator.choice(names)
    return f"{name}: {edit_bytes(folder / 'pipeline' / name, generator)}"


def edit_ledger(folder: Path, generator: random.Random) -> str:
    return edit_bytes(folder / "ledger.jsonl", generator)


def edit_records(folder: Path, generator: random.Random) -> str:
    """Whole records: dropped, repeated, swapped; or the ledger of another run of the same plan, or none."""
    path, kind = folder / "ledger.jsonl", generator.choice(["drop", "repeat", "swap", "other", "none"])
    lines = path.read_bytes().splitlines(keepends=True)
    place = generator.randrange(1, len(lines))
    if kind == "drop":
        del lines[generator.choice([place, -1])]
    elif kind == "repeat":
        lines.insert(place, lines[place])
    elif kind == "swap":
        other = generator.choice([index for index in range(len(lines)) if index != place])
        lines[place], lines[other] = lines[other], lines[place]
    elif kind == "other":
        lines = (folder / "other.jsonl").read_bytes().splitlines(keepends=True)
    if kind == "none":
        path.unlink()
    else:
        path.write_bytes(b"".join(lines))
    return f"{kind} {place}"


def edit_files(folder: Path, generator: random.Random) -> str:
    """A file of the folder removed, renamed, added or swapped with another."""
    root = folder / "pipeline"
    names = [entry["path"] for entry in PrivacyCard.load(root).report["released"]]
    name, kind = generator.choice(names), generator.choice(["remove", "rename", "add", "swap"])
    if kind == "remove":
        (root / generator.choice([*names, "README.md", "privacy.json"])).unlink()
    elif kind == "rename":
        (root / name).rename(root / f"{name}{generator.randrange(10)}")
    elif kind == "add":
        extra = generator.choice(["model/pytorch_model.bin", "model/more.safetensors", "run.py", "notes.txt", "x.json"])
        (root / extra).write_bytes(b"{}")
    else:
        first, second = generator.sample(names, 2)
        one, two = (root / first).read_bytes(), (root / second).read_bytes()
        (root / first).write_bytes(two)
        (root / second).write_bytes(one)
    return f"{kind} {name}"


def forge(folder: Path, generator: random.Random) -> str:
    """One figure of the card changed in the forger's favour, and the rest of the card made to agree with it."""
    root = folder / "pipeline"
    report = PrivacyCard.load(root).report
    claim, mechanism, sampling, accounting = (report[name] for name in ("claim", "mechanism", "sampling", "accounting"))

    def lower(value: float) -> float:  # by two units of the last recorded place or more
        return max(0.0, round(value - generator.uniform(2.01e-4, max(value, 3e-4)), 4))

    def less(value: float) -> float:
        return value * generator.uniform(0.01, 0.99)

    def more(value: float) -> float:
        return value * generator.uniform(1.001, 3)

    rates = claim["attack"]["true_positive_rates"]
    event = accounting["event"]
    inner = event["event"]
    figures: dict[str, tuple[Any, Any, Callable[[Any], Any]]] = {
        "epsilon": (claim, "epsilon", lower),
        "delta": (claim, "delta", less),
        "epsilon_without_amplification": (claim, "epsilon_without_amplification", lower),
        "mu": (claim["gaussian_dp"], "mu", lower),
        "advantage": (claim["attack"], "advantage", lower),
        **{f"rate {index}": (rates[index], "true_positive_rate", lower) for index in range(len(rates))},
        **{f"profile {index}": (entry, "epsilon", lower) for index, entry in enumerate(claim["profile"])},
        **{f"delta {index}": (entry, "delta", less) for index, entry in enumerate(claim["profile"])},
        **{f"group {index}": (entry, "epsilon", lower) for index, entry in enumerate(claim["groups"])},
        "noise": (mechanism, "noise_multiplier", more),
        "noise of the event": (inner["event"], "noise_multiplier", more),
        "rate": (sampling, "rate", less),
        "rate of the event": (inner, "sampling_probability", less),
        "units": (report["adjacency"], "num_units", lambda value: value + generator.randrange(1, value)),
        "charged steps": (mechanism, "charged_steps", lambda value: generator.randrange(1, value)),
        "count of the event": (event, "count", lambda value: generator.randrange(1, value)),
        "records": (accounting["ledger"], "records", lambda value: value + generator.randrange(1, 9)),
        "head": (accounting["ledger"], "head", lambda value: value[::-1]),
        "clipping norm": (mechanism, "clipping_norm", less),
    }
    name = generator.choice(sorted(figures))
    node, key, change = figures[name]
    node[key] = change(node[key])
    mechanism["noise_standard_deviation"] = mechanism["noise_multiplier"] * mechanism["clipping_norm"]
    sampling["expected_batch_size"] = mechanism["divisor"] = sampling["rate"] * report["adjacency"]["num_units"]
    claim["statement"] = statement(report)
    try:
        PrivacyCard(report).save(root)
    except ValueError:  # the card would not have it; the forger writes the file all the same
        (root / "privacy.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"{name} = {node[key]}"


EDITS: dict[str, tuple[Edit, float]] = {  # with their share of all edits
    "bytes of privacy.json": (edit_card, 0.2),
    "bytes of README.md": (edit_readme, 0.1),
    "bytes of weights and configurations": (edit_released, 0.15),
    "bytes of the ledger": (edit_ledger, 0.15),
    "records of the ledger": (edit_records, 0.05),
    "files added, removed, renamed, swapped": (edit_files, 0.05),
    "a figure, with the rest of the card made to agree": (forge, 0.3),
}


def measure(edits: int, base: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Rows {"check", "tried", "failed"}, one per kind of edit; the first is the folder that nobody edited."""
    original, other = base / "original", base / "other"
    train(original)
    train(other)
    shutil.copyfile(other / "ledger.jsonl", original / "other.jsonl")
    shutil.rmtree(original / "training")
    rows = [{"check": "the untouched folder is accepted", "tried": 1, "failed": int(rejected(original))}]
    generator = random.Random(seed)
    for check, (edit, share) in EDITS.items():
        tried, missed = round(edits * share), []
        for _ in range(tried):
            copy = base / "copy"
            shutil.copytree(original, copy)
            what = edit(copy, generator)
            if not rejected(copy):
                missed.append(what)
            shutil.rmtree(copy)
        rows.append({"check": check, "tried": tried, "failed": len(missed), **({"missed": missed} if missed else {})})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 edits instead of 1,000; ends within 50 seconds")
    parser.add_argument("--out", help="file for the JSON report")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(100 if arguments.quick else 1000, Path(folder))
    quick = " --quick" if arguments.quick else ""
    write_report(f"python -m benchmarks.verification{quick}", rows, arguments.out)
    if any(row["failed"] for row in rows):
        raise SystemExit("an edit was not noticed")


if __name__ == "__main__":
    main()
