"""To the Hub and back by the true client, over HTTP to a server on the loopback interface, a fresh process each time.

Each of the traps that transformers and diffusers set for models of other packages has a test with its name.
"""

import inspect
import json
from pathlib import Path

import pytest
import torch
from card_reports import report
from conftest import tiny_model
from diffusers import DiffusionPipeline
from hub_server import TOKEN, HubServer, Repository, fresh

from hf_spectral_dp import DPSpectralPipeline, PrivacyCard, SpectralImageProcessor, SpectralTokenizerForCausalLM
from hf_spectral_dp.released_files import is_public
from hf_spectral_dp.remote_code import save_with_code
from hf_spectral_dp.super_resolution import SpectralSuperResolution, SpectralSuperResolutionConfig

FILES = {
    "README.md", "privacy.json", "samples.png", "model_index.json", "model/config.json", "model/generation_config.json",
    "model/model.safetensors", "image_processor/preprocessor_config.json", "super_resolution/config.json",
    "super_resolution/model.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A pipeline of three components with its card."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    network = SpectralSuperResolution(SpectralSuperResolutionConfig(num_channels=1, features=4, num_blocks=1))
    processor = SpectralImageProcessor(image_size=16, num_channels=1)
    DPSpectralPipeline(tiny_model(), processor, network).save_pretrained(folder)
    (folder / "samples.png").write_bytes(b"\x89PNG")
    PrivacyCard(report()).save(folder)
    return folder


def images_of(pipeline) -> list[float]:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(class_labels=[3, 7], generator=generator, output_type="pt").images.flatten().tolist()


IMAGES = inspect.getsource(images_of)

# One process uploads everything, every download has a fresh one of its own.
PUSH = """
import json
from hf_spectral_dp import DPSpectralPipeline, SpectralImageProcessor, SpectralSuperResolution
from hf_spectral_dp import SpectralTokenizerForCausalLM
from hf_spectral_dp.cli import main
from hf_spectral_dp.publication import publish
pipeline = DPSpectralPipeline.from_pretrained({folder!r})
address = pipeline.push_to_hub("me/digits", private=True)
SpectralTokenizerForCausalLM.from_pretrained({prior!r}).push_to_hub("me/prior")
SpectralImageProcessor.from_pretrained({prior!r}).push_to_hub("me/prior")
SpectralSuperResolution.from_pretrained({detail!r}).push_to_hub("me/detail")
publish({exported!r}, "me/with-code")
print(json.dumps([address, main(["verify", "me/digits"]), main(["verify", "me/with-code"])]))
"""


@pytest.fixture(scope="module")
def pushed(hub, saved, tmp_path_factory) -> list:
    """The address of the pipeline's commit, and what `verify` said of it and of a model with its code."""
    base = tmp_path_factory.mktemp("push")
    model = SpectralTokenizerForCausalLM.from_pretrained(saved / "model")
    processor = SpectralImageProcessor.from_pretrained(saved / "image_processor")
    save_with_code(model, processor, base / "exported")
    PrivacyCard(report()).save(base / "exported")
    for component in (model, processor):
        component.save_pretrained(base / "prior")
    DPSpectralPipeline.from_pretrained(saved).super_resolution.save_pretrained(base / "detail")
    places = {name: str(base / name) for name in ("exported", "prior", "detail")}
    return fresh(hub, base, PUSH.format(folder=str(saved), **places))


def test_one_commit_of_exactly_the_released_files(hub, saved, pushed):
    repository = hub.repositories["me/digits"]
    (_, _, before), (sha, message, after) = repository.commits
    assert repository.private and pushed == [f"{hub.endpoint}/me/digits/commit/{sha}", 0, 0]
    assert set(before) == {".gitattributes"} and message == "Upload model with its privacy card"
    assert set(after) - set(before) == FILES and all(map(is_public, FILES))
    assert all(after[name] == (saved / name).read_bytes() for name in FILES)
    assert hub.tokens_at_storage == []
    assert hub.requests.count("POST /api/models/me/digits/commit/main") == 1


PULL = (
    IMAGES
    + """
import json, torch
from hf_spectral_dp import DPSpectralPipeline
first = DPSpectralPipeline.from_pretrained("me/digits", cache_dir="cache")
again = DPSpectralPipeline.from_pretrained("me/digits", cache_dir="cache", local_files_only=True)
named = DPSpectralPipeline.from_pretrained("me/digits", revision="{sha}", token="{token}")
errors = []
for options in ({{"revision": "{initial}"}}, {{"revision": "no-such-branch"}}, {{"trust_remote_code": True}},
                {{"custom_pipeline": "me/digits"}}, {{"use_safetensors": False}},
                {{"cache_dir": "empty", "local_files_only": True}}):
    try:
        DPSpectralPipeline.from_pretrained("me/digits", **options)
    except (ValueError, OSError) as error:
        errors.append(f"{{type(error).__name__}}: {{error}}")
print(json.dumps([[images_of(pipeline) for pipeline in (first, again, named)], errors]))
"""
)


def test_a_fresh_process_draws_the_same_images_from_the_hub(hub, saved, pushed, tmp_path):
    (initial, _, _), (sha, _, _) = hub.repositories["me/digits"].commits[:2]
    images, errors = fresh(hub, tmp_path, PULL.format(sha=sha, initial=initial, token=TOKEN))
    assert images == [images_of(DPSpectralPipeline.from_pretrained(saved))] * 3 and len(images[0]) == 2 * 16 * 16
    assert (tmp_path / "cache" / "models--me--digits").is_dir()
    empty, unknown, trust, custom, pickles, missing = errors
    assert "model_index.json does not exist, so this is no pipeline" in empty
    assert "RevisionNotFoundError" in unknown
    assert "trust_remote_code would run code" in trust and "custom_pipeline would run code" in custom
    assert "use_safetensors=False would read a pickle" in pickles
    assert "Error" in missing
    # Another process, no network at all, the cache of the first.
    code = (
        IMAGES
        + """
import json, torch
from hf_spectral_dp import DPSpectralPipeline
print(json.dumps(images_of(DPSpectralPipeline.from_pretrained("me/digits", cache_dir="cache"))))
"""
    )
    asked = len(hub.requests)
    assert fresh(hub, tmp_path, code, token=None, HF_HUB_OFFLINE="1") == images[0] and len(hub.requests) == asked


HOSTILE = """
import json, os
from pathlib import Path
from hf_spectral_dp import DPSpectralPipeline
from hf_spectral_dp.cli import main
codes = [main(["verify", "me/digits", "--revision", sha]) for sha in {commits!r}]
codes.append(main(["verify", "me/secret"]))
try:
    DPSpectralPipeline.from_pretrained("me/digits", revision="{outside}")
    error = ""
except ValueError as found:
    error = str(found)
outside = sorted(str(path) for path in Path("home").rglob("*") if "outside" in path.name or path.suffix == ".bin")
print(json.dumps([codes, error, outside]))
"""


def test_verify_of_a_hub_id_finds_what_was_changed_there(hub, saved, pushed, tmp_path):
    repository, before = hub.repositories["me/digits"], dict(hub.files("me/digits"))
    changes = {
        "weights": {"model/model.safetensors": before["model/model.safetensors"][:-1] + b"x"},
        "readme": {"README.md": before["README.md"].replace(b"DP-SGD", b"DP-SGD!")},
        "stranger": {"model/pytorch_model.bin": b"pickle"},
        "code": {"modeling_evil.py": b"print(1)"},
        # Names that would leave the folder; older clients follow them.
        "outside": {"../../outside.json": b"{}", "model/../../outside.json": b"{}",
                    "model/model.safetensors.index.json": b'{"weight_map": {"x": "../../../outside.safetensors"}}'},
    }  # fmt: skip
    commits = [repository.commit(name, {**before, **change}) for name, change in changes.items()]
    untouched = repository.commit("as it was", before)
    hub.repositories["me/secret"] = Repository(private=True)
    code = HOSTILE.format(commits=[untouched, *commits], outside=commits[-1])
    codes, error, outside = fresh(hub, tmp_path, code)
    assert codes == [0, 1, 1, 1, 1, 1, 1]
    assert "names the file '../../../outside.safetensors', which may lie outside of its folder" in error
    assert outside == []


# -- models alone ----------------------------------------------------------------------------------------------------

ALONE = """
import json
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM
from transformers import AutoModelForImageToImage
try:
    AutoConfig.from_pretrained("me/prior")
    unknown = ""
except ValueError as error:
    unknown = str(error)
import hf_spectral_dp
model = AutoModelForCausalLM.from_pretrained("me/prior", trust_remote_code=True)  # the installed class wins
processor = AutoImageProcessor.from_pretrained("me/prior")
network = AutoModelForImageToImage.from_pretrained("me/detail")
exact = hf_spectral_dp.SpectralTokenizerForCausalLM.from_pretrained("me/prior", revision="main", cache_dir="cache")
torch.manual_seed(0)
tokens = model.sample(torch.tensor([3]))
kinds = [f"{type(x).__module__}.{type(x).__name__}" for x in (model, processor, network, exact)]
side = AutoConfig.from_pretrained("me/prior").image_size
print(json.dumps([unknown, kinds, tokens.tolist(), model.generation_config.max_length, side]))
"""


def test_nothing_imports_the_package_but_once_imported_the_auto_classes_know_it(hub, saved, pushed, tmp_path):
    files = hub.files("me/prior")
    weights = {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"}
    assert set(files) == {".gitattributes", "README.md", *weights}
    assert files["model.safetensors"] == (saved / "model" / "model.safetensors").read_bytes()
    stock = files["README.md"].decode()
    assert "library_name: transformers" in stock and "differential" not in stock  # transformers' own, without a claim
    unknown, kinds, tokens, length, side = fresh(hub, tmp_path, ALONE)
    assert "spectral_tokenizer" in unknown and "does not recognize" in unknown
    assert kinds == [
        "hf_spectral_dp.modeling_spectral.SpectralTokenizerForCausalLM",
        "hf_spectral_dp.image_processing_spectral.SpectralImageProcessor",
        "hf_spectral_dp.super_resolution.SpectralSuperResolution",
        "hf_spectral_dp.modeling_spectral.SpectralTokenizerForCausalLM",
    ]
    model = SpectralTokenizerForCausalLM.from_pretrained(saved / "model")
    torch.manual_seed(0)
    assert tokens == model.sample(torch.tensor([3])).tolist()
    assert length == model.config.layout.length + 1 and side == 16


WITHOUT = """
import json, sys
sys.modules["hf_spectral_dp"] = None  # as where the package is not installed
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM
errors = []
for load in (AutoConfig, AutoModelForCausalLM, AutoImageProcessor):
    try:
        load.from_pretrained("me/with-code", trust_remote_code=False)
    except (ValueError, OSError) as error:
        errors.append(str(error))
model = AutoModelForCausalLM.from_pretrained("me/with-code", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("me/with-code", trust_remote_code=True)
torch.manual_seed(0)
tokens = model.sample(torch.tensor([3]))
pixels = processor(torch.zeros(16, 16))["pixel_values"]
print(json.dumps([errors, tokens.tolist(), type(model).__module__, list(pixels.shape), model.decode(tokens).shape[-1]]))
"""


def test_a_class_whose_name_holds_tokenizer_loads_by_remote_code_without_the_package(hub, saved, pushed, tmp_path):
    config, readme = (hub.files("me/with-code")[name].decode() for name in ("config.json", "README.md"))
    assert json.loads(config)["auto_map"]["AutoModelForCausalLM"] == "modeling_spectral.SpectralTokenizerForCausalLM"
    assert "SpectralTokenizerForCausalLM.from_pretrained" in readme
    errors, tokens, module, shape, side = fresh(hub, tmp_path, WITHOUT, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert len(errors) == 3 and all("trust_remote_code" in error for error in errors)
    model = SpectralTokenizerForCausalLM.from_pretrained(saved / "model")
    torch.manual_seed(0)
    assert tokens == model.sample(torch.tensor([3])).tolist()
    assert module.startswith("transformers_modules.") and shape == [1, 1, 16, 16] and side == model.config.coarse_size


def test_weights_do_not_leave_their_card_behind(saved):
    with pytest.raises(ValueError, match="pipeline' holds a privacy card, which would stay behind"):
        SpectralTokenizerForCausalLM.from_pretrained(saved / "model").push_to_hub("me/model")
    with pytest.raises(ValueError, match="holds a privacy card"):
        DPSpectralPipeline.from_pretrained(saved).model.push_to_hub("me/model")


def test_the_generic_pipeline_class_does_not_know_ours(saved):
    with pytest.raises(AttributeError, match="DPSpectralPipeline"):  # so the class says: load it with the class itself
        DiffusionPipeline.from_pretrained(saved)
