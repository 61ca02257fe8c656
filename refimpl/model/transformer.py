"""The forward pass of every Gemma decoder, on one page."""

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int
from refimpl_kernels.rope import rope_angles

from refimpl.model.attention import Attention
from refimpl.model.cache import FullPass, KVCache, Memory
from refimpl.model.config import GemmaConfig
from refimpl.model.experts import Experts
from refimpl.model.implementations import REFERENCE, Implementations
from refimpl.model.laurel import Laurel
from refimpl.model.layer_spec import AttentionKind, LayerSpec
from refimpl.model.layers import Embedder, FeedForward, RMSNorm, Scalar, add, normalised
from refimpl.model.numerics import FLOAT32, Numerics
from refimpl.model.per_layer_input import PerLayerEmbedder, PerLayerInput
from refimpl.model.streams import AltUp, OneStream, StreamProjections
from refimpl.model.trace import Taps

Angles = dict[AttentionKind, Float32[Array, "b t r"]]


class Block(nnx.Module):
    """One decoder layer: attention, then the feed-forward, each adding to the residual stream.

    A part that the model does not have is None.
    """

    def __init__(
        self, config: GemmaConfig, layer: int, numerics: Numerics, *, rngs: nnx.Rngs
    ) -> None:
        spec = config.layers[layer]
        self.kind = spec.kind

        def norm(is_there: bool = True) -> RMSNorm | None:
            return RMSNorm(config.width, config, numerics) if is_there else None

        self.norm_before_attention = norm()
        self.attention = Attention(config, layer, numerics, rngs=rngs)
        self.norm_after_attention = norm(config.has_post_norms)
        self.norm_before_feed_forward = norm()
        self.feed_forward = FeedForward(config, spec, numerics, rngs=rngs)
        self.norm_after_feed_forward = norm(config.has_post_norms)

        altup, rank, experts = config.altup, config.laurel_rank, config.experts
        given = config.per_layer_input
        self.streams = OneStream() if altup is None else AltUp(config, altup, numerics, rngs=rngs)
        self.laurel = None if rank is None else Laurel(config, rank, numerics, rngs=rngs)
        self.experts = None if experts is None else Experts(config, experts, numerics, rngs=rngs)
        self.per_layer_input = (
            None if given is None else PerLayerInput(config, given, numerics, rngs=rngs)
        )
        self.scalar = Scalar() if config.has_layer_scalar else None

    def __call__(
        self,
        x: Float[Array, "*u b t d"],
        positions: Int[Array, "b t"],
        angles: Angles,
        memory: Memory,
        *,
        given: Float[Array, "b t p"] | None = None,
        implementations: Implementations,
        taps: Taps,
    ) -> tuple[Float[Array, "*u b t d"], Memory]:
        """The stream, or all streams, after this layer, and the memory with what it adds.

        Args:
            given: this layer's inputs beside the stream, where the model has per-layer inputs.
        """
        linear = implementations.linear
        predicted, x = self.streams.predict(x, implementation=linear)
        x, memory = self._attend(x, positions, angles, memory, implementations, taps)
        taps("middle", x)

        y = normalised(x, self.norm_before_feed_forward)
        taps("feed_forward.input", y)
        y = self.feed_forward(y, implementation=linear, taps=taps.scope("feed_forward"))
        if self.experts is not None:
            y = self.experts(x, y, implementation=linear, taps=taps.scope("experts"))
        y = normalised(y, self.norm_after_feed_forward)
        taps("feed_forward.output", y)
        x = self.streams.correct(predicted, add(x, y), implementation=linear)

        if self.per_layer_input is not None:
            assert given is not None  # Such a model embeds them before its first layer.
            y = self.per_layer_input(self.streams.shown(x), given, implementation=linear)
            taps("per_layer_input", y)
            x = self.streams.with_input(x, y)
        if self.scalar is not None:
            x = self.scalar(x)
        taps("residual", x)
        return x, memory

    def _attend(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        angles: Angles,
        memory: Memory,
        implementations: Implementations,
        taps: Taps,
    ) -> tuple[Float[Array, "b t d"], Memory]:
        """The stream after attention, and the memory with this layer's keys and values."""
        normed = normalised(x, self.norm_before_attention)
        taps("attention.input", normed)
        y, memory = self.attention(
            normed,
            positions,
            angles[self.kind],
            memory,
            implementations=implementations,
            taps=taps.scope("attention"),
        )
        y = normalised(y, self.norm_after_attention)
        taps("attention.output", y)
        x = add(x, y)
        if self.laurel is not None:
            x = self.laurel(normed, x, implementation=implementations.linear)
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
        given, altup = config.per_layer_input, config.altup
        self.per_layer_embedder = (
            None if given is None else PerLayerEmbedder(config, given, numerics, rngs=rngs)
        )
        self.streams = OneStream() if altup is None else StreamProjections(config, altup, rngs=rngs)

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
        x, given = self.enter(tokens, implementations=implementations, taps=taps)
        for index, block in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x, memory = block(
                    x,
                    positions,
                    angles,
                    memory,
                    given=given[index],
                    implementations=implementations,
                    taps=taps.scope(f"layers.{index}"),
                )
        x = self.leave(x, implementations=implementations)
        taps("final_norm", x)
        return x, memory if isinstance(memory, KVCache) else None

    def enter(
        self,
        tokens: Int[Array, "b t"],
        *,
        implementations: Implementations = REFERENCE,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "*u b t d"], list[Float[Array, "b t p"] | None]]:
        """The stream, or all streams, before the first layer, and what each layer gets beside."""
        taps, linear = taps or Taps(), implementations.linear
        x = self.embedder.encode(tokens)
        taps("embed", x)
        given: list[Array | None] = [None] * self.config.num_layers
        if self.per_layer_embedder is not None:
            inputs = self.per_layer_embedder(tokens, x, implementation=linear)
            given = [inputs[:, :, layer] for layer in range(self.config.num_layers)]
        x = self.streams.enter(x, implementation=linear)
        if self.config.altup is not None:
            taps("streams", x)
        return x, given

    def leave(
        self, x: Float[Array, "*u b t d"], *, implementations: Implementations = REFERENCE
    ) -> Float[Array, "b t d"]:
        """The stream after the final norm, from what the last layer gives."""
        return self.final_norm(self.streams.leave(x, implementation=implementations.linear))

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
                proportion=spec.rope.proportion,
                form=self.numerics.rope_angle,
            )
            for kind, spec in kinds.items()
        }


def abstract_transformer(config: GemmaConfig, numerics: Numerics = FLOAT32) -> Transformer:
    """The module with shapes in the place of arrays; nothing is computed."""
    return nnx.eval_shape(lambda: Transformer(config, numerics, rngs=nnx.Rngs(0)))
