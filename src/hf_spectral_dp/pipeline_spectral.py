"""Images from a trained model in one call: tokens, coarse image, public super-resolution, crop.

Everything here is post-processing of a model that was trained with differential privacy: it looks at no private image
and costs no privacy, however many images are drawn.
"""

import filecmp
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from .configuration_spectral import SpectralConfig
from .image_processing_spectral import SpectralImageProcessor
from .modeling_spectral import SpectralTokenizerForCausalLM
from .released_files import check_own_folder
from .safe_loading import check_shards
from .super_resolution import RESAMPLING_MODES, SpectralSuperResolution, upscale

Upscaling = Literal["model", "none", "nearest", "bicubic", "lanczos"]
OutputType = Literal["pil", "np", "pt", "latent"]
UPSCALING_MODES = ("model", "none", *RESAMPLING_MODES)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DPSpectralPipeline(DiffusionPipeline):
    """Samples coarse images from a `SpectralTokenizerForCausalLM` and adds the detail with a public model.

    Load it with `DPSpectralPipeline.from_pretrained(folder_or_hub_id)`; the generic
    `DiffusionPipeline.from_pretrained` knows the classes of diffusers only. `enable_model_cpu_offload` works;
    `enable_sequential_cpu_offload` does not, because sampling reads the code words outside of `forward`.

    Args:
        model: the (privately) trained model, codec included. Put into evaluation mode, as is `super_resolution`.
        image_processor: the processor of the training images; its `pad` border is cropped from the output.
        super_resolution: `SpectralSuperResolution` or an image-to-image model of transformers such as
            `Swin2SRForImageSuperResolution`, trained on PUBLIC images. Applied as often as it takes to come from
            `model.config.coarse_size` to `model.config.image_size`; not used where these are equal.
        guidance_scale, temperature, top_k, top_p: sampling values that are saved with the pipeline and hold wherever a
            call does not say otherwise, so that users get what the model was tuned with.

    Raises:
        TypeError: `model` is wrapped (an adapter), or `super_resolution` does not say its factor.
        ValueError: components that do not fit together.
    """

    model_cpu_offload_seq = "model->super_resolution"
    _optional_components = ["super_resolution"]

    def __init__(
        self,
        model: SpectralTokenizerForCausalLM,
        image_processor: SpectralImageProcessor,
        super_resolution: PreTrainedModel | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        super().__init__()
        if not isinstance(model, SpectralTokenizerForCausalLM):
            raise TypeError(
                f"model is a {type(model).__name__}, which a pipeline cannot save; give a SpectralTokenizerForCausalLM,"
                " with adapters merged by merge_and_unload()."
            )
        for name in ("image_size", "num_channels"):
            of_model, of_processor = getattr(model.config, name), getattr(image_processor, name)
            if of_model != of_processor:
                raise ValueError(
                    f"{name}={of_model} in the model but {of_processor} in the image_processor; use the processor that"
                    " the training images went through."
                )
        model.eval()
        if super_resolution is not None:
            _factor(super_resolution, model.config)
            super_resolution.eval()
        self.register_modules(model=model, image_processor=image_processor, super_resolution=super_resolution)
        self.register_to_config(guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "DPSpectralPipeline":
        """Loads a saved pipeline from a folder or from the Hub. Reads data only, never code.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub id, "owner/name".
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `torch_dtype`, components by name, and what
                else diffusers takes.

        Raises:
            ValueError: remote code or pickles are asked for, a file is damaged or names one outside of its folder, or
                the components do not fit together.
            OSError: a component or the repository is missing.
        """
        for name in ("trust_remote_code", "custom_pipeline", "custom_revision"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name} would run code from a repository; this pipeline needs none, leave it out.")
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False would read a pickle, which can run code; leave it out.")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(cls.download(str(pretrained_model_name_or_path), **kwargs))
        index = folder / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"{index} does not exist, so this is no pipeline; name a folder or Hub id that save_pretrained or"
                " push_to_hub wrote, or load a model alone by AutoModelForCausalLM.from_pretrained."
            )
        check_shards(folder)
        try:
            return super().from_pretrained(folder, use_safetensors=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"weights in {str(folder)!r} are damaged ({error}); `hf-spectral-dp verify` names the file. Save or"
                " download them again."
            ) from error

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Downloads a pipeline from the Hub into the cache, as `from_pretrained` does for a Hub id.

        Args:
            pretrained_model_name: Hub id, "owner/name".
            kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`; all else is ignored.

        Returns:
            The local folder.
        """
        # diffusers' own download refuses components of other packages unless the repository carries their code, and
        # leaves out files such as generation_config.json. The classes are installed here: data files are all it takes.
        from .publication import fetch  # not above: the card brings the accountants along, which take time

        names = ("revision", "token", "cache_dir", "force_download", "local_files_only")
        return fetch(pretrained_model_name, **{name: kwargs[name] for name in names if kwargs.get(name) is not None})

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves the pipeline, as diffusers does, to a folder of its own.

        Args:
            save_directory: a folder that holds nothing but a pipeline, or does not exist.
            push_to_hub: afterwards call `push_to_hub`, for a folder whose card is there already.
            args, kwargs: as in diffusers; with `push_to_hub=True` also `repo_id` (default: the folder's name),
                `commit_message`, `private`, `token` and `create_pr`.

        Raises:
            ValueError: other files lie in the folder; nothing was saved.
        """
        check_own_folder(save_directory, pipeline=True)
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        upload = {name: kwargs.pop(name) for name in names if name in kwargs} if push_to_hub else {}
        super().save_pretrained(save_directory, *args, **kwargs)
        self.register_to_config(_name_or_path=str(save_directory))
        if push_to_hub:
            self.push_to_hub(upload.pop("repo_id", Path(save_directory).name), **upload)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads the folder that this pipeline was saved to or loaded from, with its card; see `publication.publish`.

        Raises:
            FileNotFoundError: there is no such folder, or no card in it.
            ValueError: the card does not speak of these weights, or is contradicted.
        """
        from .publication import publish

        folder = Path(self.config.get("_name_or_path") or "")
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                "this pipeline lies in no local folder, and none is published without its card; call"
                " save_pretrained(folder) and PrivacyCard(report).save(folder) first."
            )
        for name, component in self.components.items():
            if isinstance(component, PreTrainedModel) and not _is_saved(component, folder / name):
                raise ValueError(
                    f"the weights of {name} in memory are not those in {str(folder)!r}; save the pipeline and its card"
                    " again."
                )
        return publish(
            folder, repo_id, commit_message=commit_message, private=private, token=token, create_pr=create_pr
        )

    def to_json_string(self) -> str:
        """What `model_index.json` holds: not the folder that the pipeline was loaded from, a path of this machine."""
        fields = json.loads(super().to_json_string())
        fields.pop("_name_or_path", None)
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_images: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 64,
        upscaling: Upscaling = "model",
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generates images.

        Args:
            class_labels: one label or several, each in [0, num_classes); None samples without condition.
            num_images: images per class label, label by label; without labels, images in all.
            guidance_scale: classifier-free guidance; 1 is plain sampling. None takes the value saved with the pipeline
                (without class labels there is nothing to guide, and it is 1).
            temperature, top_k, top_p: see `SpectralTokenizerForCausalLM.sample`; None takes the saved value.
            generator: for reproducible images, on the pipeline's device. The same images need the same `batch_size`.
            batch_size: images that are sampled at once; bounds the memory, not the number of images.
            upscaling: "model" brings the coarse image to `image_size` with `super_resolution`; "nearest", "bicubic" and
                "lanczos" enlarge it without adding detail; "none" leaves it at `coarse_size`.
            output_type: "pil", "np" or "pt", see `SpectralImageProcessor.postprocess`; "latent" is the coarse image as
                it was sampled, a Tensor (B, C, coarse_size, coarse_size) in [-1, 1], not cropped.
            return_dict: False returns the tuple `(images,)`.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: an input out of range, or upscaling without a model for it. Comes before anything is sampled.

        Example:
            >>> pipe = DPSpectralPipeline.from_pretrained("runs/digits")  # doctest: +SKIP
            >>> pipe(class_labels=[3, 7], num_images=4).images[0].save("three.png")  # doctest: +SKIP
        """
        # 1. Check everything before the first token.
        config, device = self.model.config, self._execution_device
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is unknown; use one of {', '.join(OUTPUT_TYPES)}.")
        if upscaling not in UPSCALING_MODES:
            raise ValueError(f"upscaling={upscaling!r} is unknown; use one of {', '.join(UPSCALING_MODES)}.")
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images={num_images} and batch_size={batch_size} must be at least 1.")
        if generator is not None and not (
            isinstance(generator, torch.Generator) and generator.device.type == device.type
        ):
            raise ValueError(
                f"generator={generator!r} must be one torch.Generator on the pipeline's device; use"
                f" torch.Generator({device.type!r})."
            )
        if self.model.training:  # with gradient checkpointing, training mode drops the key-value cache without an error
            raise ValueError("model.training=True, but sampling needs evaluation mode; call `pipe.model.eval()` first.")
        if output_type == "latent":
            upscaling = "none"
        factor = None
        if upscaling == "model" and config.coarse_size < config.image_size:
            if self.super_resolution is None:
                raise ValueError(
                    f"super_resolution=None, but coarse_size={config.coarse_size} is below"
                    f" image_size={config.image_size}; give the pipeline a public super-resolution model, or ask for"
                    " upscaling='bicubic' (no new detail) or 'none' (coarse images)."
                )
            factor = _factor(self.super_resolution, config)
        labels = None
        if class_labels is not None:
            labels = torch.as_tensor(class_labels)
            if not labels.numel() or labels.ndim > 1 or labels.is_floating_point() or labels.dtype == torch.bool:
                raise ValueError(f"class_labels={class_labels} must be an integer or a non-empty list of integers.")
            labels = labels.long().reshape(-1).repeat_interleave(num_images)
        if guidance_scale is None:
            guidance_scale = 1.0 if labels is None else self.config.guidance_scale
        sampling = {
            "guidance_scale": guidance_scale,
            "temperature": self.config.temperature if temperature is None else temperature,
            "top_k": self.config.top_k if top_k is None else top_k,
            "top_p": self.config.top_p if top_p is None else top_p,
        }
        total = num_images if labels is None else len(labels)
        self.model.sample(labels, total, num_tokens=0, **sampling)  # draws nothing, refuses what cannot be drawn

        # 2. Sample tokens, coarse to fine, and decode them.
        batches = []
        with self.progress_bar(total=total) as progress:
            for start in range(0, total, batch_size):
                count = min(batch_size, total - start)
                chosen = None if labels is None else labels[start : start + count]
                tokens = self.model.sample(chosen, count, generator=generator, **sampling)
                batches.append(self.model.decode(tokens))
                progress.update(count)

        # 3. Add the detail. All batches are sampled by now, so that offloading moves each model once.
        if upscaling in RESAMPLING_MODES:
            batches = [upscale(upscaling, images, config.image_size // config.coarse_size) for images in batches]
        elif upscaling == "model":
            while batches[0].shape[-1] < config.image_size:
                batches = [upscale(self.super_resolution, images, factor) for images in batches]
        images = torch.cat(batches)

        # 4. Crop the border and convert.
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _is_saved(model: PreTrainedModel, folder: Path) -> bool:
    """Whether a folder holds exactly the weights that saving the model now would write."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        names = {path.name for path in Path(scratch).glob("*.safetensors")}
        return names == {path.name for path in folder.glob("*.safetensors")} and all(
            filecmp.cmp(Path(scratch) / name, folder / name, shallow=False) for name in names
        )


def _factor(super_resolution: PreTrainedModel, config: SpectralConfig) -> int:
    """Output side over input side of a super-resolution model that brings `coarse_size` to `image_size`.

    Raises:
        TypeError: the model's configuration names no factor.
        ValueError: no number of applications ends at `image_size`, or the model takes other channels.
    """
    name = type(super_resolution).__name__
    # Our configuration calls it `scale`, Swin2SR's `upscale`.
    factor = getattr(super_resolution.config, "scale", None) or getattr(super_resolution.config, "upscale", None)
    if not isinstance(factor, int):
        raise TypeError(
            f"super_resolution is a {name}, whose config has no integer `scale` or `upscale`; use"
            " SpectralSuperResolution or Swin2SRForImageSuperResolution."
        )
    channels = super_resolution.config.num_channels
    if isinstance(super_resolution, SpectralSuperResolution) and channels != config.num_channels:
        raise ValueError(
            f"num_channels={channels} in super_resolution but {config.num_channels} in the model; use a"
            " super-resolution model of the same number of channels."
        )
    side = config.coarse_size
    while factor > 1 and side < config.image_size:
        side *= factor
    if side != config.image_size:
        raise ValueError(
            f"{name} upscales by {factor}, which never brings coarse_size={config.coarse_size} to"
            f" image_size={config.image_size}; use a super-resolution model with factor 2."
        )
    return factor


__all__ = ["OUTPUT_TYPES", "UPSCALING_MODES", "DPSpectralPipeline", "OutputType", "Upscaling"]
