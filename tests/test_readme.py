"""The README's Python runs as it stands, from top to bottom, in a fresh process; small files lie where it looks.

What is marked `py` instead of `python` needs a download or a compiler, and is not run.
"""

import json
import re
from pathlib import Path

import numpy as np
from card_reports import report
from conftest import tiny_model
from datasets import ClassLabel, Dataset, Features, Image
from hub_server import HubServer, fresh
from PIL import Image as Picture
from text_parts import text_encoder, text_model

from hf_spectral_dp import DPSpectralPipeline, PrivacyCard, SpectralImageProcessor
from hf_spectral_dp.super_resolution import SpectralSuperResolution, SpectralSuperResolutionConfig

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
IMAGES = 1100  # a few more than the batch that the README asks for


def test_a_users_lines_run(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3 and any("push_to_hub" in block for block in blocks)
    processor = SpectralImageProcessor(image_size=16, num_channels=1)
    network = SpectralSuperResolution(SpectralSuperResolutionConfig(num_channels=1, features=4, num_blocks=1))
    DPSpectralPipeline(tiny_model(), processor, network).save_pretrained(tmp_path / "runs" / "demo" / "pipeline")
    PrivacyCard(report()).save(tmp_path / "runs" / "demo" / "pipeline")
    with_text = DPSpectralPipeline(text_model(1), processor, network, *text_encoder(tmp_path / "encoder"))
    with_text.save_pretrained(tmp_path / "runs" / "faces-text" / "pipeline")
    tiny_model().save_pretrained(tmp_path / "runs" / "prior")
    processor.save_pretrained(tmp_path / "runs" / "prior")
    generator = np.random.default_rng(0)
    rows = {
        "image": [Picture.fromarray(image) for image in generator.integers(0, 256, (IMAGES, 16, 16), dtype=np.uint8)],
        "label": [index % 10 for index in range(IMAGES)],
    }
    (tmp_path / "path" / "or" / "hub-id").mkdir(parents=True)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "path" / "or" / "hub-id" / "train.parquet")
    code = "\n".join([*blocks, "import json", "print(json.dumps([trainer.epsilon_spent, trainer.privacy_report()]))"])
    with HubServer() as hub:
        spent, facts = fresh(hub, tmp_path, code, CUDA_VISIBLE_DEVICES="")
        assert json.loads(hub.files("you/digits")["privacy.json"])["claim"] == report()["claim"]
    assert 0 < spent <= 8 and facts["claim"]["epsilon"] == spent
    assert Picture.open(tmp_path / "three.png").size == (16, 16)
