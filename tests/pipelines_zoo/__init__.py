"""Tiny random pipelines of diffusers that sample with a transformer, and calls of them.

Every entry is the real class with a transformer of a few narrow blocks and a handful of tokens, no
text encoder and, where it needs one, a tiny autoencoder, so that building it and twelve steps take
a second or so on one CPU core. Nothing is downloaded. Classes that are not here are in `LEFT_OUT`.
"""

from __future__ import annotations

from .audio import AUDIO
from .flux import FLUX
from .image import IMAGE
from .parts import PipelineEntry, latents
from .qwen import QWEN
from .video import VIDEO
from .wan import WAN

__all__ = ["LEFT_OUT", "NO_BATCHES", "PIPELINES", "PipelineEntry", "latents"]

# The key is the class, with the variant where a class is here twice.
PIPELINES: dict[str, PipelineEntry] = {
    entry.key: entry for entry in [*FLUX, *IMAGE, *QWEN, *WAN, *VIDEO, *AUDIO]
}

# Those that make one sample a call, and why; the key is that of `PIPELINES`.
NO_BATCHES: dict[str, str] = {
    "LTXI2VLongMultiPromptPipeline": "makes one video",
    "LongCatImageEditPipeline": "accepts one prompt",
    "MotifVideoImage2VideoPipeline": "accepts one picture",
    "PRXPipeline": "guided, it gives two timesteps to any batch",
    "PRXPixelPipeline": "guided, it gives two timesteps to any batch",
    "QwenImageEditPlusPipeline": "accepts one prompt",
    "QwenImageLayeredPipeline": "returns the layers of a batch at wrong places",
    "WanVACEPipeline": "accepts one video",
}

LEFT_OUT: dict[str, str] = {
    "AmusedImg2ImgPipeline": "fills in masked tokens; no diffusion transformer",
    "AmusedInpaintPipeline": "fills in masked tokens; no diffusion transformer",
    "AmusedPipeline": "fills in masked tokens; no diffusion transformer",
    "ConsisIDPipeline": "needs OpenCV",
    "Cosmos2_5_TransferPipeline": "not tried: a ControlNet, and chunks of videos",
    "Cosmos3OmniPipeline": "builds its inputs with a tokenizer and chat templates",
    "EasyAnimateControlPipeline": "raises TypeError in any call (diffusers 0.42)",
    "JoyImageEditPlusPipeline": "not tried: encodes pictures and prompts in one text encoder",
    "Kandinsky6SRPipeline": "not tried: its attention is flex attention over blocks of 64 tokens",
    "LTX2DFRPipeline": "not tried: takes latents and keyframes from earlier stages",
    "LTX2DFRTemporalRefinePipeline": "not tried: takes latents and keyframes from earlier stages",
    "OmniGenPipeline": "needs torchvision",
    "QwenImage21Pipeline": "its constructor encodes texts with a processor",
    "RFD4ProteinaPipeline": "designs proteins from features of another package; no `scheduler`",
    "SanaWMPipeline": "not tried: takes trajectories of a camera, and a refiner",
    "VQDiffusionPipeline": "fills in masked tokens; no diffusion transformer",
    "VisualClozePipeline": "two pipelines in one; its first is here",
    "ZImageOmniPipeline": "not tried: needs a vision model in the pipeline and in the transformer",
}
