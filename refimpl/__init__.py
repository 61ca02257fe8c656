"""Reference implementation of Google's Gemma language models in pure Python on JAX."""
