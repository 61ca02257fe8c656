"""The HTTP server: the legacy completions contract over an engine."""
