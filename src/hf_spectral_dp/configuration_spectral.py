"""Configuration of the spectral tokenizer model: the codec's layout and the causal transformer's size."""

from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .layout import TokenLayout
from .wavelets import check_wavelet


@strict
class SpectralConfig(LlamaConfig):
    """Configuration of `SpectralTokenizerForCausalLM`. Transformer fields are those of `LlamaConfig`.

    Attributes:
        image_size: side of the (square) input image in pixels, divisible by 2**levels.
        num_channels: 1 (grey) or 3 (RGB).
        wavelet: orthogonal PyWavelets filter.
        levels: wavelet levels.
        patch_sizes: patch side per modelled scale, coarse to fine; at most levels + 1 entries. With fewer entries
            the finest details are left to super-resolution and the decoded image has side `coarse_size`.
        codebook_sizes: code words per modelled scale.
        num_classes: number of class labels; 0 means no labels.
        class_names: public names of the classes in order, at most num_classes; None where they are numbers alone.
        text_width: width of the text encoder's states; 0 means no text. Not together with class labels.
        max_text_tokens: K, text states per caption or prompt; longer texts are cut.
        text_dropout: share of the training rows, drawn anew and independently at each use, whose text is left out, so
            that the model learns the empty condition too. 0 rules classifier-free guidance out.
        private_runs: None for a public model. Else the heads of the ledgers of the private runs that it came out of: a
            card must count them, see `private_marks`.

    `vocab_size` follows from these: all codes, one token per class, one null token (also the unconditional start and
    `bos_token_id`).

    Raises:
        ValueError: fields that cannot work together, naming field, value, rule and remedy.
    """

    model_type = "spectral_tokenizer"

    image_size: int = 32
    num_channels: int = 1
    wavelet: str = "haar"
    levels: int = 3
    patch_sizes: list[int] = field(default_factory=lambda: [2, 2, 2])
    codebook_sizes: list[int] = field(default_factory=lambda: [256, 256, 512])
    num_classes: int = 0
    class_names: list[str] | None = None
    text_width: int = 0
    max_text_tokens: int = 32
    text_dropout: float = 0.1
    private_runs: list[str] | None = None

    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 4
    num_attention_heads: int = 4

    def __post_init__(self, **kwargs):
        check_wavelet(self.wavelet)
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels={self.num_channels} must be 1 (grey) or 3 (RGB).")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must be 0 (unconditional) or positive.")
        if self.class_names is not None and len(self.class_names) > self.num_classes:
            raise ValueError(
                f"class_names={self.class_names} are more than num_classes={self.num_classes}; give one for each class."
            )
        if self.text_width < 0 or self.max_text_tokens < 1:
            raise ValueError(
                f"text_width={self.text_width} must be 0 (no text) or the width of the text encoder's states, and"
                f" max_text_tokens={self.max_text_tokens} at least 1."
            )
        if self.text_width and self.num_classes:
            raise ValueError(
                f"text_width={self.text_width} and num_classes={self.num_classes}: a model is conditioned by text or by"
                " classes; set one of them to 0, or write the class into the caption."
            )
        if not 0 <= self.text_dropout < 1:
            raise ValueError(f"text_dropout={self.text_dropout} must be in [0, 1); 0.1 is usual.")
        for name, value in self._derived().items():
            setattr(self, name, value)
        self.eos_token_id = None
        self.pad_token_id = None
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, but overrides (`from_pretrained(path, num_classes=3)`) reach the derived fields too."""
        overrides = {name: kwargs.pop(name) for name in SpectralConfig.__annotations__ if name in kwargs}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers, but a configuration that could not be loaded again is not saved.

        Raises:
            ValueError: fields were changed after construction, to values that do not fit each other or the model.
        """
        for name, expected in self._derived().items():  # `layout` refuses scales that do not fit
            if (value := getattr(self, name)) != expected:
                raise ValueError(
                    f"{name}={value}, but the other fields make it {expected}: one was changed after construction, when"
                    " the model had its shape; make a new SpectralConfig with all fields."
                )
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _derived(self) -> dict[str, int]:
        """What the other fields make of the fields of the backbone."""
        layout = self.layout
        return {
            "vocab_size": layout.codes + self.num_classes + 1,
            "max_position_embeddings": self.text_slots + layout.length + 1,
            "bos_token_id": self.null_token_id,
        }

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.build(self.image_size, self.num_channels, self.levels, self.patch_sizes, self.codebook_sizes)

    @property
    def conditioning(self) -> Literal["none", "class", "text"]:
        """What images can be asked for by."""
        return "text" if self.text_width else "class" if self.num_classes else "none"

    @property
    def text_slots(self) -> int:
        """Positions in front of the start token: `max_text_tokens`, or 0 for a model without text."""
        return self.max_text_tokens if self.text_width else 0

    @property
    def coarse_size(self) -> int:
        """Side of the image that the tokens decode to."""
        return self.image_size // 2 ** (self.levels + 1 - len(self.patch_sizes))

    @property
    def class_token_ids(self) -> list[int]:
        """Token id of each class label."""
        return [self.layout.codes + label for label in range(self.num_classes)]

    @property
    def null_token_id(self) -> int:
        """Start token that names no class."""
        return self.layout.codes + self.num_classes


__all__ = ["SpectralConfig"]
