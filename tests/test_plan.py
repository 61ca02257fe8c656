"""What devices would hold of a model: from shapes and shardings, held to what is really loaded."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from refimpl_kernels.matrix import OutputMajorMatrix
from refimpl_weights import synthetic_gguf

from refimpl.engine.programs import Programs
from refimpl.errors import InvalidRequestError
from refimpl.model.layer_spec import AttentionKind
from refimpl.model.numerics import FLOAT32, HF_BFLOAT16
from refimpl.model.sharding import (
    Divided,
    bytes_of_a_device,
    bytes_of_one_copy,
    divide_parameters,
    mesh_of,
    parameter_shapes,
    shares_of,
)
from refimpl.model.storage import Storage
from refimpl.model.variants import VARIANTS
from refimpl.plan.fit import Plan, _largest, divided_state
from refimpl.plan.remedies import remedies
from refimpl.plan.sizes import parse_size
from refimpl.plan.working import working_memory
from tests.checkpoint_files import load
from tests.engines import tiny_gemma

BFLOAT16 = Storage("bfloat16")
LOCAL, GLOBAL = AttentionKind.LOCAL, AttentionKind.GLOBAL


def plan_of(name: str, **changes: Any) -> Plan:
    """A plan for 80 GB devices with nothing but weights and state, but for the changes."""
    given = {
        "config": VARIANTS[name], "devices": 1, "memory": 80 * 10**9, "storage": BFLOAT16,
        "numerics": FLOAT32, "margin": 0, "prefix_bytes": 0,
    }  # fmt: skip
    return Plan(**(given | changes))


def pieces_of(name: str, devices: int) -> dict[str, list[Divided]]:
    """The divided parameters by the path without its layer, and part: "attention.key"."""
    found = dict[str, list[Divided]]()
    for parameter in divide_parameters(VARIANTS[name], mesh_of(devices), BFLOAT16):
        inside = [str(each) for each in parameter.path if each not in ("layers", "weight")]
        inside = [each for each in inside if not each.isdigit()]
        if parameter.part:
            inside[-1] = parameter.part
        found.setdefault(".".join(inside), []).append(parameter)
    return found


def held_by_a_device(parameters: list[Divided]) -> int:
    return bytes_of_a_device([parameter.arrays for parameter in parameters])


def resident_bytes() -> int:
    """What this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_31b_is_planned_without_being_allocated():
    before = resident_bytes()
    plan = plan_of("gemma-4-31b", devices=4)
    parameters = plan.parameters
    assert plan.largest_context(slots=1) == 262_144
    # The weights alone would be 61 GB.
    assert resident_bytes() - before < 300e6
    assert all(type(array) is jax.ShapeDtypeStruct for each in parameters for array in each.arrays)

    count = plan.config.parameter_count
    whole = sum(array.size for each in parameters if not each.unit for array in each.arrays)
    # Every matrix divides by 4; vectors are on all four devices.
    assert all(each.shares == 4 for each in parameters if each.unit)
    assert 4 * plan.weight_bytes == 2 * (count + 3 * whole)
    assert bytes_of_one_copy([each.arrays for each in parameters]) == 2 * count
    shapes = parameter_shapes(plan.config).values()
    assert whole == sum(shape[0] for shape in shapes if len(shape) == 1)


@pytest.mark.parametrize("name", ["gemma-3n-e2b", "gemma-4-26b-a4b"])
@pytest.mark.parametrize("devices", [1, 6, 8])
def test_each_byte_is_held_as_often_as_there_are_devices_to_a_share(name, devices):
    parameters = divide_parameters(VARIANTS[name], mesh_of(devices), BFLOAT16)
    sizes = [(each.shares, bytes_of_one_copy(each.arrays)) for each in parameters]
    assert sum(size for _, size in sizes) == 2 * VARIANTS[name].parameter_count
    assert bytes_of_a_device([each.arrays for each in parameters]) == sum(
        size // shares for shares, size in sizes
    )
    assert all(size % shares == 0 for shares, size in sizes)
    whole = {name for name, shape in parameter_shapes(VARIANTS[name]).items() if len(shape) == 1}
    assert all(each.shares == 1 for each in parameters if each.path in whole)


@pytest.mark.parametrize("name", ["gemma-3n-e2b", "gemma-4-26b-a4b", "gemma-4-31b"])
def test_pieces_are_the_columns_of_the_tree(name):
    columns = dict[Any, int]()
    for each in divide_parameters(VARIANTS[name], mesh_of(1), BFLOAT16):
        columns[each.path] = columns.get(each.path, 0) + each.arrays[0].shape[-1]
    assert columns == {path: shape[-1] for path, shape in parameter_shapes(VARIANTS[name]).items()}


def test_heads_stay_whole():
    """31B has 32 query heads, 16 key/value heads of 256 in local layers and 4 of 512 in global."""
    pieces = pieces_of("gemma-4-31b", devices=8)
    assert {each.shares for each in pieces["attention.query"]} == {8}
    keys = {(each.path[1] % 6 == 5, each.count, each.shares) for each in pieces["attention.key"]}
    assert keys == {(False, 16, 8), (True, 4, 4)}
    # Global layers take their keys for values.
    assert len(pieces["attention.key"]) == 60
    assert len(pieces["attention.value"]) == 50
    [key] = [each for each in pieces["attention.key"] if each.path[1] == 5]
    sharding = key.arrays[0].sharding
    assert sharding is not None
    assert sharding.shard_shape(key.arrays[0].shape) == (5376, 512)


def test_a_layer_that_reads_another_has_queries_alone():
    pieces = pieces_of("gemma-4-e2b", devices=2)
    assert len(pieces["attention.query"]) == 35
    assert len(pieces["attention.key"]) == len(pieces["attention.value"]) == 15
    # One key/value head is on every device.
    assert {each.shares for each in pieces["attention.key"]} == {1}
    assert {each.shares for each in pieces["attention.query"]} == {2}


def test_experts_by_device():
    pieces = pieces_of("gemma-4-26b-a4b", devices=4)
    for name, (inputs, outputs) in {
        "experts.gate_up": (2816, 2 * 704),
        "experts.down": (704, 2816),
    }.items():
        assert len(pieces[name]) == 30
        for each in pieces[name]:
            [array] = each.arrays
            assert array.sharding is not None
            assert array.sharding.shard_shape(array.shape) == (inputs, 32 * outputs)
    # The router looks at every token on every device.
    assert held_by_a_device(pieces["experts.router"]) == 30 * 2 * 2816 * 128


def test_shares():
    assert [mesh_of(n).axis_sizes for n in (1, 2, 8, 12, 97)] == [
        (1,), (2,), (2, 2, 2), (2, 2, 3), (97,),
    ]  # fmt: skip
    assert [shares_of(4, mesh_of(n)) for n in (1, 2, 3, 4, 6, 8, 16)] == [1, 2, 1, 4, 2, 4, 4]
    with pytest.raises(InvalidRequestError, match="devices must be at least 1, got 0"):
        mesh_of(0)


# How weights are stored.


def shape_of(part, matrix):
    """Inputs first, as a plan has it, however the matrix lies."""
    return part.shape[::-1] if isinstance(matrix, OutputMajorMatrix) else part.shape


@pytest.mark.parametrize("tensor_type", ["BF16", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K"])
def test_weights_take_what_a_loaded_file_takes(tmp_path, tensor_type):
    path = synthetic_gguf.write_gguf(
        tmp_path / "x.gguf", architecture="gemma2", tensor_type=tensor_type, layers=1
    )
    loaded = load(path)
    name = "bfloat16" if tensor_type == "BF16" else tensor_type.lower()
    # A GGUF file holds norms as float32 beside matrices of any type.
    planned = {
        parameter: Storage(name if leaf.shape[1:] else "float32").arrays(leaf.shape)
        for parameter, leaf in loaded.items()
    }
    assert {
        parameter: [(a.shape, a.dtype) for a in arrays] for parameter, arrays in planned.items()
    } == {
        parameter: [(shape_of(a, leaf), a.dtype) for a in jax.tree.leaves(leaf)]
        for parameter, leaf in loaded.items()
    }
    assert bytes_of_one_copy(planned) == sum(leaf.nbytes for leaf in loaded.values())


def test_a_quantized_weight_takes_a_byte_and_its_share_of_the_factors():
    def bytes_per_weight(name: str, shape: tuple[int, int]) -> float:
        return bytes_of_one_copy(Storage(name).arrays(shape)) / (shape[0] * shape[1])

    assert bytes_per_weight("q8_0", (2560, 64)) == 1 + 4 / 32
    assert bytes_per_weight("q4_0", (2560, 64)) == 1 + 4 / 32
    assert bytes_per_weight("q4_k", (2560, 64)) == 1 + 8 / 32
    assert bytes_per_weight("q6_k", (2560, 64)) == 1 + 4 / 16
    # 704 inputs, as experts have, are no multiple of 256: a smaller type stands in.
    assert bytes_per_weight("q4_k", (704, 64)) == 1 + 4 / 32
    assert bytes_per_weight("q5_k", (704, 64)) == 1 + 8 / 32
    # No block divides four inputs.
    assert bytes_per_weight("q8_0", (4, 16)) == 4
    assert bytes_of_one_copy(Storage("q8_0").arrays((64,))) == 4 * 64


def test_a_type_that_no_file_has():
    with pytest.raises(InvalidRequestError, match=r"dtype must be one of bfloat16, .*got 'int4'"):
        Storage("int4")


# The state of an engine.


@pytest.mark.parametrize("name", ["gemma3", "gemma4_e2b"])
@pytest.mark.parametrize("numerics", [FLOAT32, HF_BFLOAT16], ids=lambda each: each.name)
def test_the_state_is_what_an_engine_allocates(name, numerics):
    gemma = replace(tiny_gemma(name), numerics=numerics)
    allocated = Programs(gemma=gemma, slots=3, context=300).new_state()
    # A step's logits are planned as working memory, wherever they lie.
    real = jax.tree.leaves(replace(allocated, logits=allocated.logits[:0]))
    state = divided_state(gemma.config, numerics, mesh_of(1), slots=3, context=300)
    planned = jax.tree.leaves(state)
    assert sorted((a.shape, a.dtype.name) for a in planned) == sorted(
        (a.shape, a.dtype.name) for a in real
    )
    need = plan_of("gemma-3-270m", config=gemma.config, numerics=numerics).need(
        slots=3, context=300
    )
    assert sum(need.caches.values()) + need.rows == sum(array.nbytes for array in real)


def test_local_layers_hold_rings():
    """Window 1,024 and a chunk of 128, whatever the context: 50 layers of 31B, 16 heads of 256."""
    plan = plan_of("gemma-4-31b")
    caches = plan.need(slots=2, context=262_144).caches
    assert caches[LOCAL] == 2 * 1152 * (50 * 2 * 16 * 256 * 4 + 4)
    assert caches[GLOBAL] == 2 * 262_144 * (10 * 2 * 4 * 512 * 4 + 4)
    # Below the window a ring is as short as the context, in whole blocks.
    assert plan.need(slots=1, context=200).caches[LOCAL] == 256 * (50 * 2 * 16 * 256 * 4 + 4)


def test_layers_that_share_hold_no_cache():
    """E2B: 15 of 35 layers have keys and values of one head, 12 local and 3 global."""
    caches = plan_of("gemma-4-e2b", numerics=HF_BFLOAT16).need(slots=1, context=4096).caches
    assert caches[LOCAL] == 640 * (12 * 2 * 256 * 2 + 4)
    assert caches[GLOBAL] == 4096 * (3 * 2 * 512 * 2 + 4)


def test_caches_are_divided_by_heads():
    whole, four, eight = (
        plan_of("gemma-4-31b", devices=n).need(slots=1, context=8192) for n in (1, 4, 8)
    )
    positions = {LOCAL: 4 * 1152, GLOBAL: 4 * 8192}
    for kind, held in positions.items():
        assert 4 * (four.caches[kind] - held) == whole.caches[kind] - held
    # Of four global heads each of eight devices holds one.
    assert eight.caches[GLOBAL] == four.caches[GLOBAL]
    assert 2 * (eight.caches[LOCAL] - positions[LOCAL]) == four.caches[LOCAL] - positions[LOCAL]
    # Counts, prompts' ids and biases over the vocabulary; what is left are numbers of a slot.
    assert 262_144 * (4 + 1 + 4) < whole.rows < 262_144 * (4 + 1 + 4) + 200
    assert 4 * four.rows - whole.rows < 3 * 200


# What fits.


def test_a_byte_too_little_is_too_little():
    plan = plan_of("gemma-3-270m", margin=10**6, prefix_bytes=1 << 20)
    needed = plan.need(slots=2, context=1000)
    assert needed.total == (
        2 * 268_098_176 + sum(needed.caches.values()) + needed.rows + needed.working.total
        + 10**6 + (1 << 20)
    )  # fmt: skip
    assert replace(plan, memory=needed.total).fits(slots=2, context=1000)
    assert not replace(plan, memory=needed.total - 1).fits(slots=2, context=1000)


@pytest.mark.parametrize("numerics", [FLOAT32, HF_BFLOAT16], ids=lambda each: each.name)
def test_the_largest_that_fits(numerics):
    plan = plan_of("gemma-3-270m", memory=820_000_000, numerics=numerics)
    for slots in (1, 3):
        context = plan.largest_context(slots=slots)
        assert 0 < context < 32_768
        assert plan.fits(slots=slots, context=context)
        # The next block of positions does not fit.
        assert not plan.fits(slots=slots, context=context + 128)
        assert plan.most_slots(context=context) >= slots
    most = plan.most_slots(context=2000)
    assert plan.fits(slots=most, context=2000)
    assert not plan.fits(slots=most + 1, context=2000)


def test_nothing_fits_where_the_weights_do_not():
    plan = plan_of("gemma-3-270m", memory=500_000_000)
    assert (plan.largest_context(slots=1), plan.most_slots(context=1)) == (0, 0)


@pytest.mark.parametrize("most", [1, 2, 7, 16])
def test_a_search_finds_every_limit(most):
    def below(limit: int) -> Callable[[int], bool]:
        return lambda number: number <= limit

    assert [_largest(most, below(limit)) for limit in range(most + 3)] == [
        min(limit, most) for limit in range(most + 3)
    ]


def test_every_remedy_helps():
    plan = plan_of("gemma-3-270m", memory=850_000_000)
    assert not plan.fits(slots=8, context=4096)
    offered = dict(each.split() for each in remedies(plan, slots=8, context=4096))
    assert set(offered) == {"--slots", "--context", "--dtype", "--devices"}
    assert plan.fits(slots=int(offered["--slots"]), context=4096)
    assert plan.fits(slots=8, context=int(offered["--context"]))
    assert replace(plan, storage=Storage(offered["--dtype"])).fits(slots=8, context=4096)
    assert replace(plan, devices=int(offered["--devices"])).fits(slots=8, context=4096)
    # What does not help by itself is not offered.
    assert not replace(plan, numerics=HF_BFLOAT16).fits(slots=8, context=4096)
    assert remedies(replace(plan, memory=10**7), slots=8, context=4096) == []


def test_work_of_a_program():
    """By hand: 8 rows of the vocabulary ten times; its first 4,096 columns in float32."""
    config = VARIANTS["gemma-3-270m"]
    one = working_memory(
        config, mesh=mesh_of(1), is_wide=False, numerics=FLOAT32, slots=8, context=32_768
    )
    assert one.vocabulary == 10 * 8 * 262_144 * 4
    assert one.widened == 640 * 4_096 * 4
    assert one.attention == 0
    wide = working_memory(
        config, mesh=mesh_of(1), is_wide=True, numerics=HF_BFLOAT16, slots=1, context=32_768
    )
    # Scores and weights of a chunk of 128 in a global layer, and its keys and values.
    assert wide.attention == 32_768 * (2 * 4 * 128 * 4 + 2 * 256 * 2)
    assert wide.widened == 0
    # One slot draws little: a prompt's score, 32 rows and 8 of them four times, is more.
    assert wide.vocabulary == (32 + 4 * 8) * 262_144 * 4


# Sizes of memory.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9), ("80GiB", 80 << 30), ("512MB", 512 * 10**6), ("24 gb", 24 * 10**9),
        ("1.5TB", 1_500_000_000_000), ("0.1kB", 100), ("7B", 7), ("141.5KiB", 144_896),
    ],
)  # fmt: skip
def test_a_size(text, size):
    assert parse_size(text, option="memory") == size


@pytest.mark.parametrize(
    "text", ["", "80", "GB", "80G", "-1GB", "1e3GB", "80 GB!", "nan GB", "٣GB"]
)
def test_what_is_no_size(text):
    with pytest.raises(InvalidRequestError, match="--memory takes a number and a unit") as raised:
        parse_size(text, option="memory")
    assert repr(text) in str(raised.value)
    assert raised.value.parameter == "memory"


def test_a_size_that_is_too_small():
    with pytest.raises(InvalidRequestError, match="--memory must be at least 1 B, got '0GB'"):
        parse_size("0GB", option="memory")
    assert parse_size("0B", option="margin", least=0) == 0
