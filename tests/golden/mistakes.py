"""Models that are wrong in one way each, which a golden case must tell from the right one.

Owns edits of a transformers configuration. A case is worth recording if every mistake below moves
some of its logits by much more than rounding does; make_golden.py refuses to write it otherwise.
What no configuration can say wrongly is in edits.py.
"""

from collections.abc import Callable
from typing import Any

Change = Callable[[Any], None]


def set_options(**options: Any) -> Change:
    """A change of configuration values."""

    def change(config: Any) -> None:
        for key, value in options.items():
            if not hasattr(config, key):
                raise RuntimeError(f"{config.model_type} has no {key}")
            setattr(config, key, value)

    return change


def set_rope(kind: str | None, **options: Any) -> Change:
    """A change of the rope of one kind of layer, or of a model with a single rope."""

    def change(config: Any) -> None:
        rope = config.rope_parameters if kind is None else config.rope_parameters[kind]
        rope.update(options)

    return change


def swap_layer_types(config: Any) -> None:
    """Local layers become global and global ones local."""
    other = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}
    config.layer_types = [other[kind] for kind in config.layer_types]


def mistakes(name: str) -> dict[str, Change]:
    """Broken variants of a model that the "long" case has to tell from the right one."""
    if name.startswith("gemma4"):
        return mistakes_of_gemma4()
    if name.startswith("gemma_"):
        return {
            "erf gelu": set_options(hidden_act="gelu"),
            "theta 1e6": set_rope(None, rope_theta=1e6),
        }
    found = {"erf gelu": set_options(hidden_activation="gelu")}
    if name in ("gemma2", "gemma3_linear", "vaultgemma"):
        found["scores scaled by head_dim"] = set_options(query_pre_attn_scalar=16)
    if name == "vaultgemma":
        found["scores capped"] = set_options(attn_logit_softcapping=50.0)
        found["logits capped"] = set_options(final_logit_softcapping=30.0)
        found["every other layer local"] = set_options(
            layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        )
        return found
    found["window one less"] = set_options(sliding_window=7)
    found["window one more"] = set_options(sliding_window=9)
    found["local and global swapped"] = swap_layer_types
    if name == "gemma2":
        found["scores not capped"] = set_options(attn_logit_softcapping=None)
        found["logits not capped"] = set_options(final_logit_softcapping=None)
        return found
    if name == "gemma3n":
        found |= mistakes_of_gemma3n()
    found["global theta 1e4"] = set_rope("full_attention", rope_theta=1e4)
    found["local theta 1e6"] = set_rope("sliding_attention", rope_theta=1e6)
    if name in ("gemma3_linear", "gemma3_multimodal"):
        found["no linear scaling"] = set_rope("full_attention", rope_type="default")
        found["linear scaling on local layers"] = set_rope(
            "sliding_attention", rope_type="linear", factor=8.0
        )
    return found


def mistakes_of_gemma4() -> dict[str, Change]:
    """Wrong configurations of any Gemma 4."""
    return {
        "erf gelu": set_options(hidden_activation="gelu"),
        "window one less": set_options(sliding_window=7),
        "window one more": set_options(sliding_window=9),
        "logits not capped": set_options(final_logit_softcapping=None),
        "global theta 1e4": set_rope("full_attention", rope_theta=1e4),
        "local theta 1e6": set_rope("sliding_attention", rope_theta=1e6),
        "all of a global head rotated": set_rope("full_attention", rope_type="default"),
        "half of a global head rotated": set_rope("full_attention", partial_rotary_factor=0.5),
    }


def mistakes_of_gemma3n() -> dict[str, Change]:
    """Wrong configurations of Gemma 3n, beside those it has in common with Gemma 3."""
    return {
        "no gate sparse": set_options(activation_sparsity_pattern=[0.0] * 6),
        "every gate sparse": set_options(activation_sparsity_pattern=[0.95] * 6),
        "output not scaled in front of the per-layer input": set_options(altup_correct_scale=False),
        "last stream active": set_options(altup_active_idx=3),
        # The file has these tensors, as released files do.
        "sharing layers use keys and values of their own": set_options(num_kv_shared_layers=0),
        "logits not capped": set_options(final_logit_softcapping=1e4),
    }
