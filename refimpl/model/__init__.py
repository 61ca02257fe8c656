"""The models: configuration, numerics, layers, checkpoints, tokenizer."""
