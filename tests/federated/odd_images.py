"""Images of clients that something happens to; in a module of their own, so that worker processes can import them."""

import os
import signal
import time
from dataclasses import dataclass

from torch import Tensor

from batchless.data.memory import TensorImages


@dataclass(frozen=True, kw_only=True, eq=False)
class Unreadable(TensorImages):
    """The file is damaged."""

    def image(self, index: int) -> Tensor:
        raise ValueError(f"image {index} is damaged")


@dataclass(frozen=True, kw_only=True, eq=False)
class Deadly(TensorImages):
    """The process that reads them is killed, as for want of memory."""

    def image(self, index: int) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@dataclass(frozen=True, kw_only=True, eq=False)
class Buggy(TensorImages):
    """Our own mistake: not a client's failure."""

    def image(self, index: int) -> Tensor:
        raise RuntimeError("a bug of ours")


@dataclass(frozen=True, kw_only=True, eq=False)
class Hanging(TensorImages):
    """They cannot be read for minutes, until the file `unblocked` is there; the first attempt makes it."""

    unblocked: str

    def image(self, index: int) -> Tensor:
        if not os.path.exists(self.unblocked):
            with open(self.unblocked, "x"):
                pass
            time.sleep(600)
        return super().image(index)


@dataclass(frozen=True, kw_only=True, eq=False)
class Slow(TensorImages):
    """A client that others overtake."""

    def image(self, index: int) -> Tensor:
        time.sleep(0.1)
        return super().image(index)
