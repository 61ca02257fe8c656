"""Several streams of events as one, without a wake-up for each event.

Owns the tasks that read the streams. What the engine made in a step has arrived before the reader
wakes up, and is read at once. The buffer is bounded: a reader that does not come leaves the tasks
waiting, and the engine with them.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

# Events that may wait in all. A step makes one or two of each choice.
_MOST_WAITING = 256


async def merge[T](
    streams: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[list[tuple[int, T]]]:
    """Everything that the streams give, each with its stream's number.

    Closing the iterator closes the streams. What one of them raises is raised here, and ends all.

    Args:
        streams: not begun; they are read in tasks of their own.
    """
    queue = asyncio.Queue[tuple[int, T] | BaseException | None](_MOST_WAITING)
    tasks = [
        asyncio.create_task(_pump(number, stream, queue)) for number, stream in enumerate(streams)
    ]
    left = len(tasks)
    try:
        while left:
            arrived = [await queue.get()]
            while not queue.empty():
                arrived.append(queue.get_nowait())
            left -= arrived.count(None)
            batch = [each for each in arrived if isinstance(each, tuple)]
            if batch:
                yield batch
            for each in arrived:
                if isinstance(each, BaseException):
                    raise each
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump[T](
    number: int,
    stream: AsyncGenerator[T, None],
    queue: asyncio.Queue[tuple[int, T] | BaseException | None],
) -> None:
    end: BaseException | None = None
    try:
        async with contextlib.aclosing(stream):
            async for each in stream:
                await queue.put((number, each))
    except Exception as error:
        end = error
    await queue.put(end)
