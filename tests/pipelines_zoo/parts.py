"""What the zoo of pipelines is made of: an entry, models, and arguments that many calls share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor, nn

from ..zoo import ENTRIES
from ..zoo.parts import TEXT_TOKENS, random_tensor, text_mask

__all__ = [
    "WIDTH",
    "CoarseAutoencoder",
    "PipelineEntry",
    "Request",
    "Silent",
    "autoencoder",
    "embed",
    "flow",
    "latents",
    "pipeline",
    "random_model",
    "shifting",
    "transformer",
    "wan_autoencoder",
]

WIDTH = 16  # of an embedded token of a prompt


@dataclass(frozen=True)
class PipelineEntry:
    """One pipeline of diffusers: how to build a small one and how to call it.

    name: the class in diffusers. build: a seeded pipeline in eval mode.
    arguments: (seed=0, prompt=0, steps=12, size=0, batch=1, guidance=None) -> keyword arguments of
    the call. `size` is one of two resolutions or lengths, `prompt` another embedding (and another
    picture to edit), `guidance` the scale of classifier-free guidance, or None for the pipeline's;
    pipelines with a guider (a component) have its scale. The results of DiT have but one size.
    variant: what sets it apart from another entry of the same class.
    """

    name: str
    build: Callable[[], Any]
    arguments: Callable[..., dict[str, Any]]
    variant: str = ""

    @property
    def key(self) -> str:
        return f"{self.name} {self.variant}".strip()


@dataclass(frozen=True)
class Request:
    """The call that a test asks for, and what the arguments of such a call are made from."""

    pixels: int
    seed: int = 0
    prompt: int = 0
    steps: int = 12
    size: int = 0
    batch: int = 1
    guidance: float | None = None

    @property
    def height(self) -> int:
        return self.pixels

    @property
    def width(self) -> int:
        return self.pixels * (1 + self.size)

    @property
    def words(self) -> list[str]:
        """Prompts for pipelines that take no embeddings; see `embed`."""
        return [str(self.prompt)] * self.batch

    def text(self, *shape: int, negative: bool = False) -> Tensor:
        """An embedded prompt, [batch, tokens, width] by default."""
        shape = shape or (TEXT_TOKENS, WIDTH)
        return random_tensor(self.batch, *shape, seed=7 if negative else 100 + self.prompt)

    def mask(self) -> Tensor:
        """As of a prompt that is padded by one token, [batch, tokens]."""
        return text_mask(self.batch)

    def picture(self, other: int = 0) -> Tensor:
        """[batch, 3, height, width] in [0, 1]."""
        generator = torch.Generator().manual_seed(1000 + 10 * self.prompt + other)
        coarse = torch.rand(self.batch, 3, 4, 4, generator=generator)
        return nn.functional.interpolate(coarse, (self.height, self.width), mode="bilinear")

    def image(self, other: int = 0) -> Image.Image:
        """One picture, for pipelines that take no tensor."""
        pixels = self.picture(other)[0].permute(1, 2, 0).mul(255).byte()
        return Image.fromarray(pixels.numpy())

    def hole(self) -> Tensor:
        """What to paint: the right half, [batch, 1, height, width]."""
        right = (torch.arange(self.width) >= self.width // 2).float()
        return right.expand(self.batch, 1, self.height, self.width).clone()

    def video(self, frames: int = 5) -> list[Image.Image]:
        """Frames that darken, of one video."""
        return [
            self.image().point(lambda x, i=i: x * (frames - i) // frames) for i in range(frames)
        ]

    def videos(self, frames: int = 5) -> Tensor:
        """[batch, frames, 3, height, width]."""
        return torch.stack([self.picture(frame) for frame in range(frames)], dim=1)

    def usual(self) -> dict[str, Any]:
        """What many pipelines take under the same names."""
        masks = ("prompt_attention_mask", "prompt_embeds_mask")
        return {
            "prompt": None,
            "negative_prompt": None,
            "num_inference_steps": self.steps,
            "generator": torch.Generator().manual_seed(self.seed),
            "output_type": "latent",
            "height": self.height,
            "width": self.width,
            "num_frames": 5,
            "prompt_embeds": self.text(),
            "negative_prompt_embeds": self.text(negative=True),
            "pooled_prompt_embeds": self.text(WIDTH),
            "negative_pooled_prompt_embeds": self.text(WIDTH, negative=True),
            **{name: self.mask() for name in masks},
            **{f"negative_{name}": self.mask() for name in masks},
            # They'd choose another size, or need packages that tidy texts.
            "use_resolution_binning": False,
            "clean_caption": False,
            "_auto_resize": False,
        }


def embed(words: list[str], *shape: int) -> Tensor:
    """Embedded prompts, in place of a text encoder; empty ones are negative."""
    number = "".join(filter(str.isdigit, words[0]))
    return Request(0, prompt=int(number or 0), batch=len(words)).text(*shape, negative=not number)


class Silent:
    """In place of a model or a processor that a pipeline wants to have and does not use here."""

    dtype = torch.float32
    image_processor = None

    def to(self, *_: Any) -> Silent:
        return self


def pipeline(
    name: str,
    components: Callable[[], dict[str, Any]],
    arguments: Callable[[Request], dict[str, Any]] = lambda r: {},
    pixels: int = 16,
    adjust: Callable[[Any], None] = lambda pipe: None,
    variant: str = "",
) -> PipelineEntry:
    """An entry.

    components: the parts of the pipeline that are not None. arguments: those that are not the usual
    ones. pixels: height and width of the smaller resolution. adjust: changes the finished pipeline,
    where its sizes or its text encoders are fixed.
    """
    kind = getattr(diffusers, name)

    def build() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            required = {
                key: None
                for key, each in inspect.signature(kind.__init__).parameters.items()
                if key != "self" and each.default is each.empty
            }
            pipe = kind(**{**required, **components()})
        pipe.set_progress_bar_config(disable=True)
        adjust(pipe)
        return pipe

    def call(
        seed: int = 0,
        prompt: int = 0,
        steps: int = 12,
        size: int = 0,
        batch: int = 1,
        guidance: float | None = None,
    ) -> dict[str, Any]:
        request = Request(pixels, seed, prompt, steps, size, batch, guidance)
        accepted = inspect.signature(kind.__call__).parameters
        given = {key: each for key, each in request.usual().items() if key in accepted}
        scales = [each for each in ("true_cfg_scale", "guidance_scale") if each in accepted]
        if guidance is not None and scales:
            given[scales[0]] = guidance
        return given | arguments(request)

    return PipelineEntry(name, build, call, variant)


def latents(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    """The first result of a call: images, frames or sound. Equal calls have equal results."""
    seed = arguments["generator"].initial_seed()
    fresh = {**arguments, "generator": torch.Generator().manual_seed(seed)}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some pipelines encode pictures with the global generator
        result = pipe(**fresh)[0]
    if isinstance(result, list):
        parts = [torch.as_tensor(each) for each in result]
        # Of a video made in sections, each is the video so far.
        growing = len({each.shape for each in parts}) > 1
        result = parts[-1] if growing else torch.stack(parts)
    return torch.as_tensor(result)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every matrix so that inputs of unit size make outputs of unit size.

    As models are initialised, the gates of most blocks are closed, and skipping them all would
    change nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            elif not parameter.any() or parameter.isnan().any():
                parameter.normal_(std=0.02, generator=generator)
    return model.eval().requires_grad_(False)


def transformer(class_name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of the zoo of transformers, with changes to its configuration."""
    entry = ENTRIES[class_name]
    model = dataclasses.replace(entry, config={**entry.config, **changes}).build()
    return randomise(model, seed)


def random_model(class_name: str, seed: int = 0, **config: Any) -> nn.Module:
    """A model that is not in the zoo of transformers."""
    return randomise(getattr(diffusers, class_name)(**config), seed)


def flow(**config: Any) -> Any:
    """The scheduler of most pipelines, with the shift of SD3."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def shifting() -> Any:
    """The scheduler of Flux, whose shift depends on the resolution."""
    return flow(use_dynamic_shifting=True)


def autoencoder(
    channels: int = 4, levels: int = 2, kind: str = "AutoencoderKL", **config: Any
) -> nn.Module:
    """An autoencoder of pictures, 2 ** (levels - 1) pixels a latent."""
    shared = {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 4,
        "latent_channels": channels,
        "layers_per_block": 1,
        "sample_size": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    if kind == "AutoencoderKL":
        shared |= {"shift_factor": 0.0, "scaling_factor": 1.0}
    return getattr(diffusers, kind)(**shared, **config).eval().requires_grad_(False)


def wan_autoencoder(
    channels: int = 4, kind: str = "AutoencoderKLWan", levels: int = 4, **config: Any
) -> nn.Module:
    """An autoencoder of videos, 2 ** (levels - 1) pixels and 4 frames a latent."""
    return (
        getattr(diffusers, kind)(
            base_dim=3,
            z_dim=channels,
            dim_mult=[1] * levels,
            num_res_blocks=1,
            temperal_downsample=[False, True, True][-levels + 1 :],
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            **config,
        )
        .eval()
        .requires_grad_(False)
    )


class CoarseAutoencoder(ModelMixin, ConfigMixin):
    """In place of an autoencoder where a pipeline enlarges every picture to a million pixels.

    A latent is the mean of 2 ** levels pixels squared.
    """

    @register_to_config
    def __init__(self, levels: int, channels: int = 4) -> None:
        super().__init__()
        self.temperal_downsample = [False] * levels
        self.mix = nn.Linear(3, channels)
        self.register_to_config(
            block_out_channels=[8] * (levels + 1),
            z_dim=channels,
            latent_channels=channels,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        self.eval().requires_grad_(False)

    def encode(self, pixels: Tensor) -> Any:
        """Pictures [batch, 3, height, width], or videos with frames of that shape."""
        side = 2 ** len(self.temperal_downsample)
        video = pixels.dim() == 5
        frames = pixels.transpose(1, 2).flatten(0, 1) if video else pixels
        coarse = nn.functional.avg_pool2d(frames[:, :3], side)
        mixed = self.mix(coarse.movedim(1, -1)).movedim(-1, 1)
        if video:
            mixed = mixed.unflatten(0, (len(pixels), -1)).transpose(1, 2)
        return SimpleNamespace(latents=mixed)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Three channels, a pixel for each latent."""
        return (latents[:, :3],)
