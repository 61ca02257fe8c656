"""Whether a model fits into some memory, known without loading it: `refimpl models --plan`."""
