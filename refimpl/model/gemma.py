"""A model ready to run: architecture, numerics, weights as plain arrays, and tokenizer."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from refimpl_kernels.matrix import Quantized
from refimpl_weights.gguf import GGUFFile

from refimpl.errors import CheckpointError
from refimpl.model.checkpoint import Checkpoint, open_checkpoint, read_json
from refimpl.model.config import GemmaConfig
from refimpl.model.numerics import FLOAT32, Numerics
from refimpl.model.prepared import Identity, identity_of, keep_prepared, read_prepared
from refimpl.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    # What has been compiled and prepared by an earlier start runs without Flax, which takes half a
    # second to import. So it is imported where it is needed.
    import refimpl.model.transformer


@dataclass(frozen=True)
class Gemma:
    """What programs need of a model.

    The module is split once into its graph and a plain tree of arrays, because passing an NNX
    module or state through `jax.jit` walks it in Python at every call.

    Attributes:
        path: where the checkpoint lies.
        config: the architecture.
        numerics: where the forward pass rounds.
        parameters: the arrays, a tree that `jax.jit` takes as it is.
        tokenizer: text to ids and back.
        eos_ids: every id that ends a text, as checkpoint and tokenizer name them.
        suppressed_ids: ids that are never drawn, as the checkpoint names them: the pieces for
            images and sound of a model that reads them and does not write them.
    """

    path: Path
    config: GemmaConfig
    numerics: Numerics
    parameters: Mapping[str, Any]
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...] = ()

    @cached_property
    def graph(self) -> Any:
        """The module without its arrays, an `nnx.GraphDef`; needed by what is to be compiled."""
        from flax import nnx

        from refimpl.model.transformer import abstract_transformer

        return nnx.split(abstract_transformer(self.config, self.numerics))[0]

    @property
    def vocab_size(self) -> int:
        """Ids that may be sampled. The embedding may have more rows; their logits mean nothing."""
        return min(self.config.vocab_size, self.tokenizer.vocab_size)

    def module(self, parameters: Mapping[str, Any]) -> "refimpl.model.transformer.Transformer":
        """The module around these arrays; for use inside a compiled function.

        Args:
            parameters: all of them, or those of some parts and layers, of which alone the module
                can make use then.
        """
        from flax import nnx

        # A shape cannot be computed with, so that what is missing is not taken for something else.
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
            dict(self.parameters),
            is_leaf=lambda leaf: isinstance(leaf, Quantized),
        )
        layers = {**shapes["layers"], **parameters.get("layers", {})}
        return nnx.merge(self.graph, {**shapes, **parameters, "layers": layers})


def load_checkpoint(
    path: str | Path,
    *,
    numerics: Numerics = FLOAT32,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Gemma:
    """Load a model from a GGUF file or a Hugging Face folder.

    Args:
        path: a file `x.gguf`, or a folder with config.json, safetensors and tokenizer.json.
        numerics: where the forward pass rounds.
        cache_dir: folder that keeps what is derived from a GGUF file, its vocabulary and weights,
            for the next start; None keeps nothing.
        progress: called with parameters read so far and in all.

    Raises:
        CheckpointError, ConfigError, TokenizerError: the checkpoint is not complete, sound and of
            an architecture that we carry.
    """
    # A folder of safetensors is read fast as it is. Whatever else a file is, opening it will tell.
    is_gguf = cache_dir is not None and Path(path).suffix == ".gguf" and Path(path).is_file()
    identity = identity_of(Path(path)) if is_gguf else None
    checkpoint = open_checkpoint(path)
    # Side by side: the vocabulary takes about as long as the weights of a small model.
    with ThreadPoolExecutor(max_workers=1) as beside:
        reading = beside.submit(_tokenizer, checkpoint, cache_dir)
        parameters = _parameters(
            checkpoint, numerics, progress, kept_in=cache_dir, identity=identity
        )
        tokenizer = reading.result()
    return Gemma(
        path=checkpoint.path,
        config=checkpoint.config,
        numerics=numerics,
        parameters=parameters,
        tokenizer=tokenizer,
        eos_ids=tuple(dict.fromkeys((*checkpoint.config.eos_ids, *tokenizer.eos_ids))),
        suppressed_ids=checkpoint.suppressed_ids,
    )


def _parameters(
    checkpoint: Checkpoint,
    numerics: Numerics,
    progress: Callable[[int, int], None] | None,
    *,
    kept_in: Path | None,
    identity: Identity | None,
) -> Mapping[str, Any]:
    """The arrays, from where an earlier start kept them or from the checkpoint."""
    if kept_in is not None and identity is not None:
        kept = read_prepared(kept_in, identity)
        if kept is not None:
            if progress is not None:
                total = checkpoint.config.parameter_count
                progress(total, total)
            return kept

    from flax import nnx

    from refimpl.model.parameters import load_model

    _, state = nnx.split(load_model(checkpoint, numerics, progress=progress))
    parameters = nnx.to_pure_dict(state)
    if kept_in is not None and identity is not None:
        keep_prepared(kept_in, identity, parameters)
    return parameters


def _tokenizer(checkpoint: Checkpoint, cache_dir: Path | None) -> Tokenizer:
    if isinstance(checkpoint.source, GGUFFile):
        return Tokenizer.from_gguf(checkpoint.source.metadata, cache_dir=cache_dir)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():
        raise CheckpointError(
            f"there is no tokenizer.json in {folder}; fetch it from where the weights come from"
        )
    config = read_json(config_file) if config_file.is_file() else {}
    if (folder / "chat_template.jinja").is_file():
        # Where newer folders keep the template, whose being there says that the model chats.
        config = {"chat_template": "", **config}
    return Tokenizer.from_file(file, tokenizer_config=config, eos_ids=checkpoint.config.eos_ids)
