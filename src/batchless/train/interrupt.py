"""Ctrl-C that lets the step end, so that what was computed can be saved."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ShouldStop = Callable[[], bool]


class TrainingStoppedError(Exception):
    """The training was asked to stop, and has saved what it has done.

    Attributes:
        images: training images seen so far.
    """

    def __init__(self, images: int) -> None:
        super().__init__(f"stopped after {images} images")
        self.images = images


def never_stop() -> bool:
    """False."""
    return False


@contextmanager
def stop_on_signals() -> Iterator[ShouldStop]:
    """Within the block, the first Ctrl-C (or SIGTERM, of a cluster's scheduler) makes the yielded function return True.

    A second one ends the process the usual way. Only the main thread may enter.
    """
    asked = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
