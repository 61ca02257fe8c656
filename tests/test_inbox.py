"""Deliveries into event loops: their order, how often they wake a loop, and loops that are gone."""

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest

from refimpl.engine.events import Finished
from refimpl.engine.inbox import LoopInbox
from refimpl.errors import EngineError


def test_deliveries_to_a_loop_that_is_gone_harm_nobody() -> None:
    loop = asyncio.new_event_loop()

    async def inbox() -> LoopInbox:
        return LoopInbox(asyncio.get_running_loop())

    made = loop.run_until_complete(inbox())
    loop.close()
    assert [made.put([]) for _ in range(3)] == [False] * 3


def test_deliveries_keep_their_order_and_share_a_wake_up() -> None:
    async def receive() -> tuple[list[int], int]:
        loop = asyncio.get_running_loop()
        boxes = [LoopInbox(loop) for _ in range(3)]
        wakes = 0
        wake = loop.call_soon_threadsafe

        def counted(*arguments: Any, **keywords: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return wake(*arguments, **keywords)

        def send() -> None:
            for number in range(30):
                boxes[number % 3].put([Finished(number, "length", None, 0, None)])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", counted)
            thread = threading.Thread(target=send)
            thread.start()
            thread.join()
        got = list[int]()
        for _ in range(10):
            for box in boxes:
                delivery = await box.get()
                assert not isinstance(delivery, EngineError)
                got += [event.choice for event in delivery if isinstance(event, Finished)]
        return got, wakes

    assert asyncio.run(receive()) == (list(range(30)), 1)


def test_a_closed_loop_is_forgotten() -> None:
    async def inbox() -> weakref.ref[asyncio.AbstractEventLoop]:
        loop = asyncio.get_running_loop()
        box = LoopInbox(loop)
        box.put([])
        await box.get()
        return weakref.ref(loop)

    gone = asyncio.run(inbox())
    gc.collect()
    assert gone() is None
