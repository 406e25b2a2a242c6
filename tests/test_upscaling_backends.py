"""Backends of other libraries behind `upscaler`: real classes of diffusers and spandrel with small random weights."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LDMSuperResolutionPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hf_spectral_dp import DPSpectralPipeline, SpectralConfig, SpectralImageProcessor, SpectralTokenizerForCausalLM
from hf_spectral_dp.super_resolution import upscale, upscaler

torch.set_num_threads(1)


def text_parts() -> dict:
    """A text encoder of width 8 and a tokenizer that knows the letters a and b."""
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 8
    config = CLIPTextConfig(
        vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer}


def conditional_unet(in_channels: int, out_channels: int, **fields) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
        **fields,
    )


def autoencoder(blocks: int) -> AutoencoderKL:
    """Halves the side `blocks - 1` times."""
    return AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        norm_num_groups=2,
    )


def stable_diffusion() -> DiffusionPipeline:
    return StableDiffusionUpscalePipeline(
        vae=autoencoder(2),
        unet=conditional_unet(7, 4, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(),
        scheduler=DDIMScheduler(prediction_type="v_prediction"),
        **text_parts(),
    )


def latent_upscale() -> DiffusionPipeline:
    unet = conditional_unet(8, 5, time_cond_proj_dim=128 + 8)
    return StableDiffusionLatentUpscalePipeline(
        vae=autoencoder(2), unet=unet, scheduler=EulerDiscreteScheduler(prediction_type="sample"), **text_parts()
    )


def latent_diffusion() -> DiffusionPipeline:
    unet = UNet2DModel(
        in_channels=6,
        out_channels=3,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=2,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    codes = VQModel(block_out_channels=(4, 4, 4), **blocks, latent_channels=3, norm_num_groups=2, num_vq_embeddings=8)
    return LDMSuperResolutionPipeline(vqvae=codes, unet=unet, scheduler=DDIMScheduler())


BACKENDS = {"stable_diffusion": (stable_diffusion, 2), "latent": (latent_upscale, 2), "ldm": (latent_diffusion, 4)}


@pytest.fixture(params=BACKENDS)
def backend(request) -> tuple[DiffusionPipeline, int]:
    make, scale = BACKENDS[request.param]
    torch.manual_seed(0)
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, scale


def options(seed: int = 0) -> dict:
    return {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed)}


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_diffusers_upscalers_take_any_size_and_channels(backend, channels):
    pipeline, scale = backend
    images = torch.rand(2, channels, 11, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    enlarge = upscaler(pipeline, **options())
    result = enlarge(images)
    assert enlarge.scale == scale and result.shape == (2, channels, 11 * scale, 9 * scale)
    assert result.dtype == torch.float32 and result.abs().max() <= 1 and result.std() > 0.01
    assert torch.equal(upscale(pipeline, images, **options()), result)
    assert not torch.equal(upscale(pipeline, images, **options(1)), result)
    assert not torch.equal(upscale(pipeline, -images, **options()), result)


@torch.no_grad()
def test_diffusers_upscalers_get_the_range_that_they_expect():
    """What a user of the pipeline itself gets for the same picture, which diffusers scales on its own."""
    torch.manual_seed(0)
    pipeline = stable_diffusion()
    pipeline.set_progress_bar_config(disable=True)
    levels = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    picture = pipeline.numpy_to_pil((levels / 255).permute(0, 2, 3, 1).numpy())
    direct = pipeline(prompt="a", image=picture, guidance_scale=3.0, output_type="pt", **options()).images
    found = upscale(pipeline, levels / 127.5 - 1, prompt="a", guidance_scale=3.0, **options())
    torch.testing.assert_close((found + 1) / 2, direct, atol=1e-5, rtol=0)
    silent = upscale(pipeline, levels / 127.5 - 1, **options())
    guided = upscale(pipeline, levels / 127.5 - 1, guidance_scale=9.0, **options())
    torch.testing.assert_close(silent, guided, atol=1e-4, rtol=0)  # between two empty texts there is nothing to guide
    assert (silent - found).abs().max() > 1e-4


@torch.no_grad()
def test_ldm_gets_the_range_that_it_expects():
    torch.manual_seed(0)
    pipeline = latent_diffusion()
    pipeline.set_progress_bar_config(disable=True)
    levels = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    picture = pipeline.numpy_to_pil((levels / 255).permute(0, 2, 3, 1).numpy())[0]
    direct = pipeline(picture, output_type="np", **options()).images
    found = upscale(pipeline, levels / 127.5 - 1, **options())
    torch.testing.assert_close((found + 1) / 2, torch.from_numpy(direct).permute(0, 3, 1, 2), atol=1e-5, rtol=0)


def test_half_precision_backends_give_images_of_the_input_s_precision():
    torch.manual_seed(0)
    pipeline = stable_diffusion().to(dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    result = upscale(pipeline, torch.zeros(1, 3, 8, 8), num_inference_steps=1)
    assert result.dtype == torch.float32 and result.isfinite().all()


def test_the_pipeline_takes_a_backend_by_the_call(backend):
    pipeline, scale = backend
    config = tiny_model().config.to_dict() | {"num_channels": 3, "patch_sizes": [2], "codebook_sizes": [16]}
    torch.manual_seed(0)
    model = SpectralTokenizerForCausalLM(SpectralConfig(**config))  # 4x4 coarse pixels of 16x16
    model.codec.codebook(0).normal_()
    pipe = DPSpectralPipeline(model, SpectralImageProcessor(image_size=16, num_channels=3))
    pipe.set_progress_bar_config(disable=True)
    if pipeline.model_cpu_offload_seq is not None:
        pipeline.enable_model_cpu_offload(device="cpu")  # the same hooks as on an accelerator
    images = pipe(class_labels=[1, 2], upscaling=upscaler(pipeline, **options()), output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="upscales by .*never brings coarse_size=4 to image_size=16"):
        pipe(class_labels=1, upscaling=upscaler("nearest", scale=3))


def test_errors_name_value_and_remedy():
    pipeline = stable_diffusion()
    with pytest.raises(ValueError, match="prompt=.*one text"):
        upscaler(pipeline, prompt=["a", "b"])
    with pytest.raises(ValueError, match="scale=4 but StableDiffusionUpscalePipeline upscales by 2"):
        upscaler(pipeline, scale=4)
    with pytest.raises(ValueError, match=r"\['prompt'\] are options of diffusers pipelines; str takes none"):
        upscaler("nearest", prompt="a")
    with pytest.raises(TypeError, match="DPSpectralPipeline is no upscaler; use StableDiffusionUpscalePipeline"):
        upscaler(DPSpectralPipeline(tiny_model(), SpectralImageProcessor(image_size=16, num_channels=1)))
    with pytest.raises(TypeError, match="by a Linear is unknown; use a transformers"):
        upscaler(torch.nn.Linear(1, 1))


_SPANDREL = """
import torch
try:
    import spandrel
except (ImportError, RuntimeError) as error:  # torchvision of another build raises the latter
    raise SystemExit(f"skip: {error}")
from spandrel.architectures.Compact import Compact
from spandrel.architectures.SwinIR import SwinIR
from hf_spectral_dp.super_resolution import upscale, upscaler

torch.set_num_threads(1)
torch.manual_seed(0)
small = Compact(num_feat=8, num_conv=2, upscale=4)
model = spandrel.ModelLoader().load_from_state_dict(small.state_dict())
images = torch.rand(2, 3, 9, 7) * 2 - 1
found = upscale(model, images)
direct = torch.cat([model((image + 1) / 2) for image in images.split(1)]) * 2 - 1
assert upscaler(model).scale == 4 and found.shape == (2, 3, 36, 28)
torch.testing.assert_close(found, direct)
grey = upscale(model, images[:, :1])
torch.testing.assert_close(grey, upscale(model, images[:, :1].expand(-1, 3, -1, -1)).mean(1, keepdim=True))
torch.testing.assert_close(upscaler(model)(images, tile_size=4, tile_overlap=4), found, atol=1e-5, rtol=0)
sizes = {"img_size": 64, "embed_dim": 12, "depths": [2], "num_heads": [2], "window_size": 8, "upscale": 2}
windows = SwinIR(**sizes, upsampler="pixelshuffle")
model = spandrel.ModelLoader().load_from_state_dict(windows.state_dict())
assert upscale(model, images).shape == (2, 3, 18, 14)
"""


def test_models_of_spandrel():
    """In a process of its own, since a torchvision that does not fit leaves its marks in torch."""
    program = [sys.executable, "-c", _SPANDREL]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ, timeout=200, check=False)
    if done.stderr.startswith("skip: "):
        pytest.skip(f"spandrel cannot be imported here: {done.stderr.removeprefix('skip: ').strip()}")
    assert done.returncode == 0, done.stderr
