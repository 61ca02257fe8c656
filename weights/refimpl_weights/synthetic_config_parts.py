"""What the configurations of all synthetic checkpoints have alike.

Owns the entries that every tiny model shares, and nothing of any one generation.
"""

from refimpl_weights import synthetic_tokenizer as tokenizer

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": tokenizer.BOS,
    "eos_token_id": tokenizer.EOS,
    "head_dim": 16,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "pad_token_id": tokenizer.PAD,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": tokenizer.NUM_PIECES,
}
GELU = {"hidden_activation": "gelu_pytorch_tanh"}


def sizes(*, hidden: int, ffn: int, layers: int, kv_heads: int) -> dict[str, int]:
    """Widths and counts under the names that every generation gives them."""
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
    }
