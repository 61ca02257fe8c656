"""What to change so that a model fits, each change by itself and tried out."""

from collections.abc import Iterator
from dataclasses import replace

from refimpl.model.numerics import HF_BFLOAT16
from refimpl.model.storage import Storage
from refimpl.plan.fit import Plan

_MOST_DEVICES = 1024


def remedies(plan: Plan, *, slots: int, context: int) -> list[str]:
    """Options of `refimpl models --plan` with which so many slots or fewer fit; [] if none helps.

    Args:
        slots, context: what does not fit.
    """
    return list(_remedies(plan, slots, context))


def _remedies(plan: Plan, slots: int, context: int) -> Iterator[str]:
    fewer, shorter = plan.most_slots(context=context), plan.largest_context(slots=slots)
    if fewer:
        yield f"--slots {fewer}"
    if shorter:
        yield f"--context {shorter}"
    if plan.numerics.activation == "float32":
        narrow = replace(plan, numerics=HF_BFLOAT16)
        if narrow.fits(slots=slots, context=context):
            yield f"--numerics {HF_BFLOAT16.name}"
    if plan.storage.name in ("float32", "float16", "bfloat16"):
        smaller = replace(plan, storage=Storage("q8_0"))
        if smaller.fits(slots=slots, context=context):
            yield "--dtype q8_0"
    devices = 2 * plan.devices
    while devices <= _MOST_DEVICES:
        if replace(plan, devices=devices).fits(slots=slots, context=context):
            yield f"--devices {devices}"
            return
        devices *= 2
