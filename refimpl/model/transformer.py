"""The forward pass of every Gemma decoder, on one page."""

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int
from refimpl_kernels.rope import rope_angles

from refimpl.model.attention import Attention
from refimpl.model.cache import FullPass, KVCache, Memory
from refimpl.model.config import GemmaConfig
from refimpl.model.implementations import REFERENCE, Implementations
from refimpl.model.layer_spec import AttentionKind, LayerSpec
from refimpl.model.layers import Embedder, FeedForward, RMSNorm
from refimpl.model.numerics import FLOAT32, Numerics
from refimpl.model.trace import Taps

Angles = dict[AttentionKind, Float32[Array, "b t r"]]


class Block(nnx.Module):
    """One decoder layer: attention, then the feed-forward, each adding to the residual stream."""

    def __init__(
        self, config: GemmaConfig, layer: int, numerics: Numerics, *, rngs: nnx.Rngs
    ) -> None:
        self.kind = config.layers[layer].kind
        width = config.layers[layer].feed_forward_width

        def norm(is_there: bool = True) -> RMSNorm | None:
            return RMSNorm(config.width, config, numerics) if is_there else None

        self.norm_before_attention = norm()
        self.attention = Attention(config, layer, numerics, rngs=rngs)
        self.norm_after_attention = norm(config.has_post_norms)
        self.norm_before_feed_forward = norm()
        self.feed_forward = FeedForward(config, width, numerics, rngs=rngs)
        self.norm_after_feed_forward = norm(config.has_post_norms)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        angles: Angles,
        memory: Memory,
        *,
        implementations: Implementations,
        taps: Taps,
    ) -> tuple[Float[Array, "b t d"], Memory]:
        """The stream after this layer, and the memory with this layer's keys and values."""
        y = _normalised(x, self.norm_before_attention)
        taps("attention.input", y)
        y, memory = self.attention(
            y,
            positions,
            angles[self.kind],
            memory,
            implementations=implementations,
            taps=taps.scope("attention"),
        )
        y = _normalised(y, self.norm_after_attention)
        taps("attention.output", y)
        x = _sum(x, y)
        taps("middle", x)

        y = _normalised(x, self.norm_before_feed_forward)
        taps("feed_forward.input", y)
        y = self.feed_forward(
            y, implementation=implementations.linear, taps=taps.scope("feed_forward")
        )
        y = _normalised(y, self.norm_after_feed_forward)
        taps("feed_forward.output", y)
        x = _sum(x, y)
        taps("residual", x)
        return x, memory


class Transformer(nnx.Module):
    """A Gemma decoder: token ids at given positions to logits.

    NNX serves definition, initialisation and loading. Programs split the model once and pass its
    arrays through `jax.jit` (see `refimpl.model.gemma.Gemma`).
    """

    def __init__(
        self, config: GemmaConfig, numerics: Numerics = FLOAT32, *, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.numerics = numerics
        self.embedder = Embedder(config, numerics, rngs=rngs)
        self.layers = nnx.List(
            [Block(config, layer, numerics, rngs=rngs) for layer in range(config.num_layers)]
        )
        self.final_norm = RMSNorm(config.width, config, numerics)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        cache: KVCache | None = None,
        *,
        implementations: Implementations = REFERENCE,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "b t v"], KVCache | None]:
        """Logits at every position; see `hidden` for the arguments."""
        taps = taps or Taps()
        x, cache = self.hidden(tokens, positions, cache, implementations=implementations, taps=taps)
        logits = self.logits(x, implementations=implementations)
        taps("logits", logits)
        return logits, cache

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        cache: KVCache | None = None,
        *,
        implementations: Implementations = REFERENCE,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """The stream after the final norm, at every position.

        Args:
            tokens: ids.
            positions: of the tokens, ascending in a row without gaps; negative ones are padding,
                which nothing attends to and whose results mean nothing.
            cache: earlier positions, or None for a full pass over `tokens` alone.
            implementations: which fast paths to take.
            taps: takes note of intermediates; see `refimpl.model.trace` for their names.

        Returns:
            The stream, and the cache with these positions added (None without one).

        Raises:
            InvalidRequestError: more tokens than the cache takes in one call.
            NotImplementedError: an implementation cannot do this case.
        """
        taps = taps or Taps()
        memory: Memory = FullPass(positions) if cache is None else cache.begin(positions)
        angles = self.angles(positions)
        x = self.embedder.encode(tokens)
        taps("embed", x)

        for index, block in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x, memory = block(
                    x,
                    positions,
                    angles,
                    memory,
                    implementations=implementations,
                    taps=taps.scope(f"layers.{index}"),
                )

        x = self.final_norm(x)
        taps("final_norm", x)
        return x, memory if isinstance(memory, KVCache) else None

    def logits(
        self, x: Float[Array, "b t d"], *, implementations: Implementations = REFERENCE
    ) -> Float[Array, "b t v"]:
        """Logits of a normalised stream. Ids beyond the tokenizer's size get some, too."""
        return self.embedder.decode(x, implementation=implementations.linear)

    def angles(self, positions: Int[Array, "b t"]) -> Angles:
        """Rotary angles for each kind of layer, computed once for all layers of the kind."""
        kinds: dict[AttentionKind, LayerSpec] = {spec.kind: spec for spec in self.config.layers}
        return {
            kind: rope_angles(
                positions,
                head_width=spec.head_width,
                theta=spec.rope.theta,
                factor=spec.rope.factor,
                form=self.numerics.rope_angle,
            )
            for kind, spec in kinds.items()
        }


def _sum(x: Float[Array, "b t d"], y: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """x + y, of a y that was rounded first.

    A norm ends with a product. Without the barrier the compiler may round it once together with
    the sum, and whether it does depends on the shapes: a request alone would have other bits.
    """
    return x + jax.lax.optimization_barrier(y)  # pyright: ignore[reportUnknownMemberType]


def _normalised(x: Float[Array, "b t d"], norm: RMSNorm | None) -> Float[Array, "b t d"]:
    return x if norm is None else norm(x)
