"""The command on the card of a public network."""

import argparse
import shlex

from rebuild import rebuild_command


def test_the_command_gives_back_the_options_it_was_made_of():
    options = {
        "out": "runs/my eye", "public": "Tiny ImageNet", "widths": [1, 2], "bf16": True, "start": None, "text": "",
        "mirror": False, "weight": 0.0,
    }  # fmt: skip
    words = shlex.split(rebuild_command("train_eye.py", options))
    assert words[:2] == ["python", "examples/train_eye.py"] and words[-2:] == ["--out", "runs/my eye"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--weight", type=float)
    for name in ("--public", "--out"):
        parser.add_argument(name)
    known = {name: options[name] for name in ("public", "widths", "bf16", "weight", "out")}
    assert vars(parser.parse_args(words[2:])) == known
