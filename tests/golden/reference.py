# pyright: reportMissingImports=false
"""Hugging Face's models: loaded whole, run on one case, watched while they run.

Owns everything that reaches into transformers. What is asked and what is kept of it is
make_golden.py's matter.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mistakes import Change
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3nForCausalLM,
    Gemma4ForCausalLM,
    Gemma4UnifiedForCausalLM,
    PreTrainedModel,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "weights"))

from refimpl_weights import synthetic, synthetic_tokenizer  # noqa: E402

__all__ = ["Arrays", "forward", "load", "record", "synthetic", "synthetic_tokenizer"]

Arrays = dict[str, np.ndarray]

# Of these the text model alone: the checkpoints hold no more than a few tensors of the rest.
TEXT_ALONE = {
    "gemma3n": Gemma3nForCausalLM,
    "gemma4": Gemma4ForCausalLM,
    "gemma4_unified": Gemma4UnifiedForCausalLM,
}
NESTED = "model.language_model."


def load(folder: Path, dtype: torch.dtype, change: Change | None = None) -> PreTrainedModel:
    """The model with all its weights; `change` edits the text model's configuration first."""
    config = AutoConfig.from_pretrained(folder)
    passed_over: set[str] = set()
    options: dict[str, Any] = {}
    if config.model_type in TEXT_ALONE:
        factory = TEXT_ALONE[config.model_type]
        config = config.get_text_config()
        options["key_mapping"] = {rf"^{NESTED}": "model."}
        names = synthetic.tensors(folder.name)
        passed_over = {name for name in names if not name.startswith(NESTED)}
    elif config.model_type == "gemma3":
        factory = AutoModelForImageTextToText
    else:
        factory = AutoModelForCausalLM
    if change is not None:
        change(config.get_text_config())
    if getattr(config, "enable_moe_block", False):
        # Expert by expert; the default is a grouped product.
        options["experts_implementation"] = "eager"
    model, report = factory.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
        **options,
    )
    if set(report.pop("unexpected_keys")) != passed_over or any(report.values()):
        raise RuntimeError(f"{folder.name}: not every weight was loaded as it is: {report}")
    return model.eval()


@dataclass
class Taps:
    """What was seen on the way: one entry a layer, and of the stream one more in front."""

    residual: list[torch.Tensor] = field(default_factory=list)
    max_scores: list[float] = field(default_factory=list)
    router_logits: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[Taps]:
    """Residual streams (in front of the first layer, then after each), scores, router logits.

    Of scores the largest absolute one in front of the cap and of the mask, over pairs that the
    mask lets through.
    """
    layers = model.get_decoder().layers
    taps = Taps()
    module: Any = sys.modules[type(layers[0].self_attn).__module__]
    eager = module.eager_attention_forward

    def attend(attention, query, key, value, mask, **options):
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * options["scaling"]
        visible = (mask == 0).expand_as(scores)
        taps.max_scores.append(scores[visible].abs().max().item())
        return eager(attention, query, key, value, mask, **options)

    hooks = [layers[0].register_forward_pre_hook(lambda _, args: taps.residual.append(args[0]))]
    for layer in layers:
        hooks.append(layer.register_forward_hook(lambda _, args, out: taps.residual.append(out)))
        if hasattr(layer, "router"):
            hooks.append(
                layer.router.proj.register_forward_hook(
                    lambda _, args, out: taps.router_logits.append(out)
                )
            )
    module.eager_attention_forward = attend
    try:
        yield taps
    finally:
        module.eager_attention_forward = eager
        for hook in hooks:
            hook.remove()


def forward(model: PreTrainedModel, case: Arrays) -> torch.Tensor:
    """Logits, shape (b, t, v)."""
    # The mask is handed over even when it is all ones: without one, transformers takes a jump in
    # the positions for the border of a second, packed sequence.
    return model(
        input_ids=torch.from_numpy(case["ids"]),
        position_ids=torch.from_numpy(case["positions"]),
        attention_mask=torch.from_numpy(case["mask"]),
        use_cache=False,
    ).logits


def record(model: PreTrainedModel, case: Arrays) -> Arrays:
    """Everything the model says about one case; zero where the input is padding."""
    with watched(model) as taps:
        logits = forward(model, case)
    config = model.config.get_text_config()
    real = torch.from_numpy(case["mask"])[..., None] == 1
    streams = torch.stack(taps.residual)
    if len(streams) != config.num_hidden_layers + 1:
        raise RuntimeError(f"expected one residual stream per layer and one more: {streams.shape}")
    arrays = {
        "logits": bits(torch.where(real, logits, 0)),
        "residual": bits(torch.where(real, streams, 0)),
        "max_score": np.asarray(taps.max_scores, np.float32),
    }
    if taps.router_logits:
        chosen = torch.stack(taps.router_logits)[:, real.flatten()].float()
        ranked = chosen.sort(dim=-1, descending=True).values
        lead = ranked[..., config.top_k_experts - 1] - ranked[..., config.top_k_experts]
        arrays["router_margin"] = lead.amin(dim=-1).numpy()
    return arrays


def bits(tensor: torch.Tensor) -> np.ndarray:
    """float32 as it is; bfloat16, which npz cannot hold, as its bit pattern in uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    return tensor.numpy()
