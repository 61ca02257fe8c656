"""Array in, array out: the operations of a Gemma forward pass."""
