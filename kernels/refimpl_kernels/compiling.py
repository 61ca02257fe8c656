"""What to tell the compiler: what to trace once, how rows keep their bits, what not to try."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
from jax.core import Tracer

# Fewest entries of a row that an operation with products and sums takes as they are. LLVM rounds a
# product and its sum once, with a fused multiply-add, except where it makes vectors across narrow
# rows: then it rounds twice, for some numbers of rows and not for others. Seen with up to 8
# entries; 16 fill any vector. Narrower rows are padded, behind a barrier that keeps the padding.
LEAST_WIDTH = 16


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


def row_stable_options(platform: str) -> dict[str, str]:
    """Compiler options for `jax.jit`, under which a program sums each row in an order of its own.

    XLA's CPU backend hands dots, and reductions of 4,096 elements or more, to YNNPACK, which
    chooses the order of a sum by the size of the whole array. So an RMSNorm of width 640 rounds
    otherwise on seven rows than on six, and attention otherwise for two requests than for one.
    The options leave YNNPACK only what no kernel here uses; XLA's own loops take each row alike.

    Programs whose rows belong to different requests must be compiled with these options.

    Args:
        platform: as `jax.default_backend()` names it. Only "cpu" has these options, and only
            there the tests prove what is said here.
    """
    if platform != "cpu":
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"}


def short_compilation_options(platform: str) -> dict[str, str]:
    """Compiler options for `jax.jit` that leave out passes which find nothing in our programs.

    XLA repeats its simplifications until nothing changes, each time over the whole program, and
    these passes are most of what the unrolled layers of a decode step take to compile. One of the
    four moves reshapes, one operation a round; three look for what could leave a loop or end it,
    where ours hold a single step.
    """
    if platform != "cpu":
        return {}
    passes = (
        "reshape-mover",
        "simplify-while-loops",
        "while-loop-invariant-code-motion",
        "while-loop-constant-sinking",
    )
    return {"xla_disable_hlo_passes": ",".join(passes)}


def wide_vector_options(platform: str) -> dict[str, str]:
    """Compiler options for `jax.jit` that let a CPU use the widest vectors it has.

    XLA keeps to 256 bits where a processor has 512, for fear of lower clock rates. Products with
    many rows took a fifth to a third less time with 512 (Xeon with AVX-512, 2.8 GHz). But then
    log-probabilities of narrow models differ in the last bits with the number of rows: do not use
    this where rows must keep their bits.
    """
    return {"xla_cpu_prefer_vector_width": "512"} if platform == "cpu" else {}
