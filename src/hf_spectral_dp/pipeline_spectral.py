"""Images from a trained model in one call: tokens, coarse image, public super-resolution, crop.

Everything here is post-processing of a model that was trained with differential privacy: it looks at no private image
and costs no privacy, however many images are drawn.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .configuration_spectral import SpectralConfig
from .critic import Critic, check_critic, draw_by_choice
from .image_processing_spectral import SpectralImageProcessor
from .mean_critic import MeanCritic  # noqa: F401  diffusers loads only what was imported
from .modeling_spectral import SpectralTokenizerForCausalLM
from .released_files import check_own_folder
from .safe_loading import check_index, check_shards
from .super_resolution import RESAMPLING_MODES, SpectralSuperResolution, Upscaler, upscale_to, upscaler
from .text_encoder import check_text_encoder, encode_text

Upscaling = Literal["model", "none", "nearest", "bicubic", "lanczos"]
OutputType = Literal["pil", "np", "pt", "latent"]
UPSCALING_MODES = get_args(Upscaling)
OUTPUT_TYPES = get_args(OutputType)
SAMPLING_VALUES = ("guidance_scale", "temperature", "top_k", "top_p", "attempts")
"""What a pipeline saves of how its model is sampled; the arguments of its call of the same names."""


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
        text_encoder, tokenizer: of a model with text: the frozen, PUBLIC encoder that its captions went through, see
            `text_encoder.load_text_encoder`. Without them, such a model can be sampled without a prompt only.
        critic: a `ClassCritic` or `MeanCritic` that `DPTrainer` trained on the same private images; it chooses among
            `attempts`. Its cost belongs to the claim: train the model with `earlier_ledgers` naming its ledger.
        guidance_scale, temperature, top_k, top_p, attempts: sampling values that are saved with the pipeline and hold
            wherever a call does not say otherwise, so that users get what the model was tuned with.

    Raises:
        TypeError: `model` is wrapped (an adapter), or `super_resolution` is no model of transformers or does not say
            its factor.
        ValueError: components that do not fit together, or sampling values out of range.
    """

    model_cpu_offload_seq = "text_encoder->model->super_resolution->critic"
    _optional_components = ["super_resolution", "text_encoder", "tokenizer", "critic"]

    def __init__(
        self,
        model: SpectralTokenizerForCausalLM,
        image_processor: SpectralImageProcessor,
        super_resolution: PreTrainedModel | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        guidance_scale: float = 1.0,
        temperature: float | Sequence[float] = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        attempts: int = 1,
        critic: Critic | None = None,
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
        model.check_sampling(guidance_scale, temperature, top_k, top_p, attempts)
        if super_resolution is not None:
            _check_super_resolution(super_resolution, model.config)
            super_resolution.eval()
        if text_encoder is not None or tokenizer is not None:
            check_text_encoder(text_encoder, tokenizer, model.config)
            assert text_encoder is not None  # checked
            text_encoder.eval()
        if critic is not None:
            check_critic(critic, model.config.num_classes)
            critic.eval()
        self.register_modules(
            model=model,
            image_processor=image_processor,
            super_resolution=super_resolution,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            critic=critic,
        )
        self.register_to_config(
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, attempts=attempts
        )
        self.disable_tiling()

    def enable_tiling(self, tile_size: int = 256, tile_overlap: int = 32) -> None:
        """Adds the detail to squares of coarse pixels one after the other, for images too large for the memory.

        Args: as in `super_resolution.Upscaler`.
        """
        self._tiling: dict[str, int] = {"tile_size": tile_size, "tile_overlap": tile_overlap}

    def disable_tiling(self) -> None:
        """Adds the detail to whole images again."""
        self._tiling = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "DPSpectralPipeline":
        """Loads a saved pipeline from a folder or from the Hub. Reads data only, never code.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub id, "owner/name".
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `dtype`, components by name, and what else
                diffusers takes.

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
        check_index(folder / "model_index.json", cls.__name__)
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
        from .publication import check_saved, publish

        folder = Path(self.config.get("_name_or_path") or "")
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                "this pipeline lies in no local folder, and none is published without its card; call"
                " save_pretrained(folder) and PrivacyCard(report).save(folder) first."
            )
        check_saved(self.components, folder)
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
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_images: int = 1,
        guidance_scale: float | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 64,
        upscaling: Upscaling | Any = "model",
        output_type: OutputType = "pil",
        return_dict: bool = True,
        num_scales: int | None = None,
        callback_on_step_end: Callable[["DPSpectralPipeline", int, int, dict], object] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = None,
        attempts: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generates images.

        Args:
            prompt: what the images should show, for a model with text: one text or several. An empty one is no
                condition. Prompts are not part of the guarantee: a private caption typed here stays as private or as
                exposed as you leave it.
            class_labels: one label or several, each in [0, num_classes), for a model with classes. Without labels and
                prompt, images are sampled without condition.
            num_images: images per prompt or class label, one after the other; without either, images in all.
            guidance_scale: classifier-free guidance; 1 is plain sampling. None takes the value saved with the pipeline
                (without a condition there is nothing to guide, and it is 1).
            temperature, top_k, top_p: see `SpectralTokenizerForCausalLM.sample`; None takes the saved value.
            generator: for reproducible images, on the pipeline's device. The same images need the same `batch_size`.
            batch_size: images that are sampled at once; bounds the memory, not the number of images.
            upscaling: "model" brings the coarse image to `image_size` with `super_resolution`; "nearest", "bicubic" and
                "lanczos" enlarge it without new detail; "none" leaves it at `coarse_size`. Or any other public backend
                that `super_resolution.upscaler` takes, such as a diffusers upscaler or a model of spandrel; with
                options, `upscaler(backend, prompt="a face")`. It is not saved with the pipeline.
            output_type: "pil", "np" or "pt", see `SpectralImageProcessor.postprocess`; "latent" is the coarse image as
                it was sampled, a Tensor (B, C, coarse_size, coarse_size) in [-1, 1], not cropped.
            return_dict: False returns the tuple `(images,)`.
            num_scales: stop after that many scales, coarse to fine, for a blurred image in less time; None takes all.
            callback_on_step_end: as in diffusers, called at the end of each step as `(pipeline, step, timestep,
                tensors)`. A step is a scale, `timestep` the number of tokens so far, and `tensors` holds
                "tokens" (B, timestep) of one batch: `pipeline.model.decode(tokens)` shows the image growing.
            negative_prompt: what the images should not show; one for all prompts, or one each. Needs guidance.
            num_images_per_prompt: `num_images`, by the name that diffusers has for it.
            attempts: above 1, with a critic of classes: images that it takes for another class than theirs go where the
                call wants that one, or are drawn again, up to so many times; then the likeliest for its class stays
                (`critic.draw_by_choice`). With a critic of the mean so many are drawn for each, and it keeps one.
                Without: images that the model itself takes for another class are drawn again, see
                `SpectralTokenizerForCausalLM.sample`. Labels are then right more often, and what lies between two
                classes is rarer. None takes the saved value (with `num_scales`, or without labels unless a critic
                knows no classes, there is no telling, and it is 1).

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: an input out of range, inputs or components that do not go together. Comes before anything is
                sampled.

        Example:
            >>> pipe = DPSpectralPipeline.from_pretrained("runs/digits")  # doctest: +SKIP
            >>> pipe(class_labels=[3, 7], num_images=4).images[0].save("three.png")  # doctest: +SKIP
        """
        # 1. Check everything before the first token.
        config = self.model.config
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is unknown; use one of {', '.join(OUTPUT_TYPES)}.")
        if isinstance(upscaling, str) and upscaling not in UPSCALING_MODES:
            raise ValueError(f"upscaling={upscaling!r} is unknown; use one of {', '.join(UPSCALING_MODES)}.")
        if num_images_per_prompt is not None:
            if num_images != 1 and num_images != num_images_per_prompt:
                raise ValueError(
                    f"num_images={num_images} and num_images_per_prompt={num_images_per_prompt} are two names of one"
                    " number; give one of them."
                )
            num_images = num_images_per_prompt
        if not all(isinstance(number, Integral) and number >= 1 for number in (num_images, batch_size)):
            raise ValueError(f"num_images={num_images} and batch_size={batch_size} must be integers of at least 1.")
        if generator is not None:
            device = self._execution_device.type  # diffusers walks through all modules for it
            if not isinstance(generator, torch.Generator) or generator.device.type != device:
                raise ValueError(
                    f"generator={generator!r} must be one torch.Generator on the pipeline's device; use"
                    f" torch.Generator({device!r})."
                )
        if self.model.training:  # with gradient checkpointing, training mode drops the key-value cache without an error
            raise ValueError("model.training=True, but sampling needs evaluation mode; call `pipe.model.eval()` first.")
        enlarge = self._enlarger("none" if output_type == "latent" else upscaling)
        scales = config.layout.scales
        if num_scales is not None and (not isinstance(num_scales, Integral) or not 1 <= num_scales <= len(scales)):
            raise ValueError(f"num_scales={num_scales} must be in [1, {len(scales)}], the scales of the model.")
        labels = None if class_labels is None else _label_per_image(class_labels, num_images)
        texts = self._encode_prompts(prompt, negative_prompt, num_images)
        if guidance_scale is None:
            guidance_scale = 1.0 if labels is None and not texts else self.config.guidance_scale
        without_classes = self.critic is not None and not self.critic.config.num_classes
        if attempts is None:
            told = num_scales is None and (labels is not None or without_classes)
            attempts = self.config.attempts if told else 1
        sampling = {
            "guidance_scale": guidance_scale,
            "temperature": self.config.temperature if temperature is None else temperature,
            "top_k": self.config.top_k if top_k is None else top_k,
            "top_p": self.config.top_p if top_p is None else top_p,
            "attempts": attempts,
        }
        length = sum(scale.tokens for scale in scales[:num_scales])
        ends = [scale.first_position + scale.tokens for scale in scales]

        def on_scale_end(tokens: Tensor) -> None:
            if callback_on_step_end is not None:
                step = ends.index(tokens.shape[1])
                callback_on_step_end(self, step, tokens.shape[1], {"tokens": tokens})

        total = len(texts["text_states"]) if texts else num_images if labels is None else len(labels)
        chosen_by_critic = self.critic is not None and attempts > 1
        if chosen_by_critic and without_classes:
            sampling["attempts"] = 1
        # Draws nothing, refuses what cannot be drawn.
        self.model.sample(labels, total, num_tokens=0, **texts, **sampling)
        if chosen_by_critic:
            sampling["attempts"] = 1

        # 2. Sample tokens, coarse to fine, and decode them.
        def draw(places: Tensor, attempt: int = 0) -> Tensor:
            return self.model.decode(
                self.model.sample(
                    None if labels is None else labels[places], len(places), generator=generator, num_tokens=length,
                    on_scale_end=None if attempt else on_scale_end,
                    **{name: states[places] for name, states in texts.items()}, **sampling,
                )
            )  # fmt: skip

        with self.progress_bar(total=total) as progress:
            if chosen_by_critic:
                both = partial(self._both_sizes, draw, min(batch_size, total))
                critic, count = self.critic, progress.update
                coarse = draw_by_choice(critic, both, labels, total, attempts, batch_size, generator, on_kept=count)
                batches = list(coarse.split(batch_size))
            else:
                batches = []
                for places in torch.arange(total).split(batch_size):
                    batches.append(draw(places))
                    progress.update(len(places))

        # 3. Add the detail. All batches are sampled by now, so that offloading moves each model once.
        if enlarge is not None:
            batches = [upscale_to(config.image_size, enlarge, images, **self._tiling) for images in batches]
        images = torch.cat(batches)

        # 4. Crop the border and convert.
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _enlarger(self, upscaling: Upscaling | Any) -> Upscaler | None:
        """What brings coarse images to the full size; None where they stay as they are, or have it."""
        config = self.model.config
        if upscaling in RESAMPLING_MODES:
            return upscaler(upscaling, config.image_size // config.coarse_size)
        if upscaling == "none" or config.coarse_size == config.image_size:
            return None
        backend = self.super_resolution if upscaling == "model" else upscaling
        if backend is None:
            raise ValueError(
                f"super_resolution=None, but coarse_size={config.coarse_size} is below image_size={config.image_size};"
                " give the pipeline a public super-resolution model, or ask for upscaling='bicubic' (no new detail) or"
                " 'none' (coarse images)."
            )
        enlarge = upscaler(backend)
        _check_scale(enlarge, config)
        return enlarge

    def _both_sizes(
        self, draw: Callable[[Tensor, int], Tensor], batch: int, places: Tensor, attempt: int
    ) -> tuple[Tensor, Tensor]:
        """Coarse images of those places, and as they are at full size, with the pipeline's own detail."""
        again = -(-batch // len(places)) if self.model._compiled_step else 1  # another size would be compiled anew
        coarse = draw(places.repeat(again)[:batch], attempt)[: len(places)]
        return coarse, upscale_to(self.model.config.image_size, self.super_resolution, coarse, **self._tiling)

    def _encode_prompts(self, prompt: Any, negative_prompt: Any, num_images: int) -> dict[str, Tensor]:
        """Text states (prompts * num_images, K, text_width) of prompts and negative prompts, as `sample` takes them."""
        if prompt is None:
            if negative_prompt is not None:
                raise ValueError(f"negative_prompt={negative_prompt!r} needs a prompt; give one, an empty one will do.")
            return {}
        if self.model.config.conditioning != "text":
            raise ValueError(
                f"prompt={prompt!r}, but the model has conditioning={self.model.config.conditioning!r}; name classes by"
                " class_labels, or use a model that was trained with captions."
            )
        check_text_encoder(self.text_encoder, self.tokenizer, self.model.config)
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        one_for_all = [negative_prompt or ""] * len(prompts)
        negatives = list(negative_prompt) if isinstance(negative_prompt, list | tuple) else one_for_all
        if not prompts or not all(isinstance(text, str) for text in (*prompts, *negatives)):
            raise ValueError(
                f"prompt={prompt!r} and negative_prompt={negative_prompt!r} must be text or non-empty lists of text."
            )
        if len(negatives) != len(prompts):
            raise ValueError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one for all, or one each."
            )
        asked = {"text_states": prompts}
        if any(negatives):  # an empty negative prompt is the null condition
            asked["negative_text_states"] = negatives
        slots = self.model.config.max_text_tokens
        return {
            name: encode_text(self.text_encoder, self.tokenizer, texts, slots).repeat_interleave(num_images, 0)
            for name, texts in asked.items()
        }


def _label_per_image(class_labels: int | Sequence[int] | Tensor, num_images: int) -> Tensor:
    """Labels (images,) of `num_images` images for each of the class labels, one after the other."""
    try:
        labels = torch.as_tensor(class_labels)
    except (RuntimeError, TypeError, ValueError):  # text, None, a set
        labels = torch.empty(0)
    if not labels.numel() or labels.ndim > 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"class_labels={class_labels} must be an integer or a non-empty list of integers.")
    return labels.long().reshape(-1).repeat_interleave(num_images)


def _check_scale(enlarge: Upscaler, config: SpectralConfig) -> None:
    """Raises ValueError if no number of applications brings `coarse_size` to `image_size`."""
    side = config.coarse_size
    while enlarge.scale > 1 and side < config.image_size:
        side *= enlarge.scale
    if side != config.image_size:
        raise ValueError(
            f"{enlarge.name} upscales by {enlarge.scale}, which never brings coarse_size={config.coarse_size} to"
            f" image_size={config.image_size}; use a super-resolution model with factor 2."
        )


def _check_super_resolution(super_resolution: Any, config: SpectralConfig) -> None:
    """Raises TypeError for what is no model of transformers, ValueError for one that does not fit.

    Their models take grey images, too; ours take the channels that they were trained for.
    """
    if not isinstance(super_resolution, PreTrainedModel):
        raise TypeError(
            f"super_resolution is a {type(super_resolution).__name__}, which a pipeline cannot hold; give a model of"
            " transformers, and others to a call: pipeline(upscaling=hf_spectral_dp.super_resolution.upscaler(...))."
        )
    _check_scale(upscaler(super_resolution), config)
    channels = super_resolution.config.num_channels
    if isinstance(super_resolution, SpectralSuperResolution) and channels != config.num_channels:
        raise ValueError(
            f"num_channels={channels} in super_resolution but {config.num_channels} in the model; use a"
            " super-resolution model of the same number of channels."
        )


__all__ = ["OUTPUT_TYPES", "SAMPLING_VALUES", "UPSCALING_MODES", "DPSpectralPipeline", "OutputType", "Upscaling"]
