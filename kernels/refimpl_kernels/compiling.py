"""What to tell the compiler: what to trace once, and how rows keep their bits."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jaxtyping import Int

# Entries in the widest vector of a CPU, in float32. What lies beyond a row's last whole vector is
# computed by other instructions, which may round a product and its sum twice instead of once, or
# take another approximation of tanh; and which entries these are depends on the number of rows. So
# operations with products and sums pad their rows to whole vectors, behind a barrier that keeps the
# padding. Rows of released models are whole vectors.
LANES = 16


def traced_once[**P, R](*static: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`jax.jit` for an operation that programs call many times, with the operation's own type.

    A program traces and lowers it once for each form of its arguments, not once for each layer.
    XLA puts the calls' contents in their places, so that nothing else changes. Outside a program
    the operation runs step by step as it stands: compiled by itself, without the program's
    options, it might skip roundings to bfloat16.

    Args:
        static: names of the arguments that are not arrays.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        compiled = cast(Any, jax).jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            leaves = jax.tree.leaves((args, kwargs))
            is_traced = any(isinstance(leaf, Tracer) for leaf in leaves)
            return (compiled if is_traced else function)(*args, **kwargs)

        return call

    return wrap


def on_all_threads(index: Int[Array, ""]) -> Int[Array, ""]:
    """A loop's index, which lets each of the loop's steps run on all of a CPU's threads.

    XLA's CPU backend (jaxlib 0.12) makes one kernel for one thread of a whole loop, unless the loop
    holds an operation that it has no kernel for: here a sort of the index and itself. Steps must
    be large: to wake another thread takes about 50 microseconds, to hand it work while it waits for
    more about 5.
    """
    return lax.sort(jnp.stack([index, index]))[0]


def row_stable_options(platform: str) -> dict[str, str]:
    """Compiler options for `jax.jit`, under which a program sums each row in an order of its own.

    XLA's CPU backend hands dots, and reductions of 4,096 elements or more, to YNNPACK, which
    chooses the order of a sum by the size of the whole array. So an RMSNorm of width 640 rounds
    otherwise on seven rows than on six, and attention otherwise for two requests than for one.
    The options leave YNNPACK only what no kernel here uses; XLA's own loops take each row alike.

    The pass that simplifies loops stays off. With it on, a tiny Gemma 4 with experts rounded a
    request otherwise among 16 than alone (tests/test_invariance_architectures.py, the long form).
    It puts a loop's only step among its neighbours, where it may round otherwise.

    The pass that moves out of a loop what does not change in it stays off, too. It moves every
    operation by itself, each with an array for its result: some ninety arrays over the vocabulary
    out of the sampler's search in a whole row. A step of decode asked the system for 96 MB, where
    without the pass it asks for 6 (270M, one stream: 0.4 page faults a step, where there were 890).

    The options also let a CPU use the widest vectors it has. XLA keeps to 256 bits where a
    processor has 512, for fear of lower clock rates; a decode step of eight rows took a fifth less
    time with 512 (270M, Xeon with AVX-512).

    Programs whose rows belong to different requests must be compiled with these options.

    Args:
        platform: as `jax.default_backend()` names it. Only "cpu" has these options, and only
            there the tests prove what is said here.
    """
    if platform != "cpu":
        return {}
    return {
        "xla_disable_hlo_passes": "simplify-while-loops,while-loop-invariant-code-motion",
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
        "xla_cpu_prefer_vector_width": "512",
    }
