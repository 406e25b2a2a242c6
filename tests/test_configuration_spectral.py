"""Configuration: derived fields follow from the layout, also after loading; errors come before a model."""

import json
import subprocess
import sys

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig

from hf_spectral_dp import SpectralConfig

FIELDS = {
    "image_size": 64,
    "num_channels": 3,
    "wavelet": "db2",
    "levels": 2,
    "patch_sizes": [4, 2],
    "codebook_sizes": [32, 100],
    "num_classes": 5,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


def assert_derived_fields_agree(config: SpectralConfig) -> None:
    layout = config.layout
    assert config.vocab_size == layout.codes + config.num_classes + 1
    assert config.max_position_embeddings == layout.length + 1
    assert config.bos_token_id == config.null_token_id == config.vocab_size - 1
    assert [*config.class_token_ids, config.null_token_id] == list(range(layout.codes, config.vocab_size))
    assert config.eos_token_id is None and config.pad_token_id is None


@pytest.mark.parametrize("fields", [{}, FIELDS, {"num_classes": 1}, {"patch_sizes": [1], "codebook_sizes": [2]}])
def test_derived_fields_agree(fields):
    assert_derived_fields_agree(SpectralConfig(**fields))


@pytest.mark.parametrize("stale", [{"vocab_size": 7}, {"max_position_embeddings": 7}, {"bos_token_id": 1}])
def test_a_stale_derived_field_is_computed_anew(stale):
    assert_derived_fields_agree(SpectralConfig(**stale))


def test_derived_fields_by_hand():
    config = SpectralConfig(**FIELDS)
    assert config.layout.length == 4 * 4 + 8 * 8
    assert config.vocab_size == 132 + 5 + 1
    assert config.class_token_ids == [132, 133, 134, 135, 136] and config.null_token_id == 137
    assert config.coarse_size == 32  # two of three scales: the finest details are missing
    assert SpectralConfig().coarse_size == 16
    assert SpectralConfig(patch_sizes=[1] * 4, codebook_sizes=[2] * 4).coarse_size == 32
    assert SpectralConfig().class_token_ids == []


@pytest.mark.parametrize("load", [SpectralConfig.from_pretrained, AutoConfig.from_pretrained])
def test_saved_and_loaded(tmp_path, load):
    config = SpectralConfig(**FIELDS)
    config.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is SpectralConfig
    assert again.to_json_string() == config.to_json_string()
    assert {name: getattr(again, name) for name in FIELDS} == FIELDS
    assert again.layout == config.layout
    assert_derived_fields_agree(again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: setattr(config, "patch_sizes", [3, 2, 2]), r"patch_sizes\[0\]=3 does not divide the side 4"),
        (lambda config: config.patch_sizes.append(2), r"patch_sizes=\[2, 2, 2, 2\] and codebook_sizes=.*same length"),
        (lambda config: setattr(config, "levels", 2), r"max_position_embeddings=25, but the other fields make it 97"),
        (lambda config: setattr(config, "num_classes", 3), "vocab_size=1025, but the other fields make it 1028: .*new"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path, change, message):
    """Scales that do not fit are refused at construction; a field changed later on, before anything is written."""
    config = SpectralConfig()
    change(config)
    with pytest.raises(ValueError, match=message):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_registering_again_changes_nothing():
    """A notebook that reloads the package, or imports it anew, still finds its own classes under their name."""
    code = (
        "import importlib, sys\n"
        "import hf_spectral_dp\n"
        "from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM\n"
        "importlib.reload(hf_spectral_dp)\n"
        "for anew in (False, True):\n"
        "    if anew:\n"
        "        for name in [name for name in sys.modules if name.split('.')[0] == 'hf_spectral_dp']:\n"
        "            del sys.modules[name]\n"
        "        import hf_spectral_dp\n"
        "    config = AutoConfig.for_model('spectral_tokenizer', num_classes=2, num_hidden_layers=1)\n"
        "    assert type(config) is hf_spectral_dp.SpectralConfig, anew\n"
        "    model = AutoModelForCausalLM.from_config(config)\n"
        "    assert type(model) is hf_spectral_dp.SpectralTokenizerForCausalLM, anew\n"
        "print('the same')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "the same\n", done.stderr


def test_auto_config_makes_one():
    config = AutoConfig.for_model("spectral_tokenizer", num_classes=4)
    assert type(config) is SpectralConfig and config.num_classes == 4
    assert_derived_fields_agree(config)


@pytest.mark.parametrize("load", [SpectralConfig.from_pretrained, AutoConfig.from_pretrained])
def test_overrides_reach_the_derived_fields(tmp_path, load):
    SpectralConfig(**FIELDS).save_pretrained(tmp_path)
    config = load(tmp_path, num_classes=2, codebook_sizes=[8, 8], use_cache=False)
    assert (config.num_classes, config.codebook_sizes, config.use_cache) == (2, [8, 8], False)
    assert_derived_fields_agree(config)
    with pytest.raises(ValueError, match="num_classes=-1"):
        load(tmp_path, num_classes=-1)


def test_fields_of_two_configurations_are_not_shared():
    one, other = SpectralConfig(), SpectralConfig()
    one.patch_sizes.append(1)
    assert other.patch_sizes == [2, 2, 2] == SpectralConfig().patch_sizes


def test_edited_json_is_checked_and_unknown_fields_are_kept(tmp_path):
    """As everywhere in transformers, a field that this version does not know is kept: newer files still load."""
    SpectralConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())

    path.write_text(json.dumps({**stored, "codebook_sizes": [4, 4, 4], "made_by": "a later version"}))
    config = SpectralConfig.from_pretrained(tmp_path)
    assert config.made_by == "a later version" and config.codebook_sizes == [4, 4, 4]
    assert_derived_fields_agree(config)

    path.write_text(json.dumps({**stored, "patch_sizes": [3, 2, 2]}))
    with pytest.raises(ValueError, match=r"patch_sizes\[0\]=3"):
        SpectralConfig.from_pretrained(tmp_path)

    path.write_text(json.dumps({**stored, "levels": "3"}))
    with pytest.raises(StrictDataclassFieldValidationError, match="levels"):
        SpectralConfig.from_pretrained(tmp_path)


def test_the_type_of_a_field_changed_afterwards_is_checked():
    config = SpectralConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match="levels"):
        config.levels = "three"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 30}, r"image_size=30 .*2\*\*levels=8.*pad the images or use fewer levels"),
        ({"image_size": 0}, "image_size=0"),
        ({"num_channels": 2}, r"num_channels=2 must be 1 \(grey\) or 3 \(RGB\)"),
        ({"wavelet": "bior2.2"}, "wavelet='bior2.2' is not an orthogonal .* choose one of"),
        ({"levels": 0}, "levels=0 must be at least 1"),
        ({"patch_sizes": [2, 2, 3]}, r"patch_sizes\[2\]=3 does not divide the side 8.*choose a divisor"),
        ({"patch_sizes": [2, 2]}, r"patch_sizes=\[2, 2\] and codebook_sizes=.* one entry per scale"),
        ({"codebook_sizes": [256, 256, 1]}, r"codebook_sizes\[2\]=1 must be at least 2"),
        ({"num_classes": -1}, r"num_classes=-1 must be 0 \(unconditional\) or positive"),
    ],
)
def test_errors_name_field_value_rule_and_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        SpectralConfig(**fields)


@pytest.mark.parametrize("fields", [{"levels": 2.0}, {"levels": True}, {"patch_sizes": 2}, {"codebook_sizes": ["8"]}])
def test_types_are_checked(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        SpectralConfig(**fields)


def test_heads_divide_the_hidden_size():
    with pytest.raises(StrictDataclassClassValidationError, match=r"hidden size \(30\).*attention heads \(4\)"):
        SpectralConfig(hidden_size=30)
