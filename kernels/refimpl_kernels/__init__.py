"""Array in, array out: the operations of a Gemma forward pass.

`spec.py` says what every operation means, in plain jnp and float32. Each other file holds the fast
paths of one operation and shares no helper with the spec; one battery of tests holds them against
it. The caller names the implementation. One that cannot do a case raises NotImplementedError, and
nothing falls back to another in silence.

A program of many layers traces the operations that every layer runs once (`compiling.traced_once`),
which otherwise is most of what a start waits for.

Axis letters, here and everywhere: `b` batch or slot, `t` query position, `s` key position, `d`
model width, `n` query heads, `k` key/value heads, `g` queries per key/value head (n = k g), `h`
head width, `f` feed-forward width, `v` vocabulary, `l` layer. A linear map takes `i` inputs to `o`
outputs.
"""
