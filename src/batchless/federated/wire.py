"""What the server and a client's machine tell each other: orders and answers as JSON, arrays as numpy's files.

Nothing that comes from outside is unpickled, and no memory is taken that an array's sender only claims to need.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchless.federated.config import FederateConfig
from batchless.federated.update import LeftOut, Update

_RUN = re.compile(r"[0-9a-f]{16}")
_LONGEST_REASON = 500
_NO_FIGURES = {"kind", "round", "images", "domain"}
"""What else is in a line of figures in the run's log."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a client's machine is to do.

    Attributes:
        run: its name, 16 hexadecimal digits: of the folder in which clients keep their tensors.
        round: rounds done.
        config: of the run, with the names of all domains and classes.
        clients: by id, the round that has left the client's own tensors as they are now; 0: it has none yet.
        domains: to evaluate the global network on.
    """

    run: str
    round: int
    config: FederateConfig
    clients: Mapping[int, int] = field(default_factory=dict)
    domains: tuple[str, ...] = ()

    def text(self) -> str:
        """As it is sent."""
        return json.dumps(
            {
                "run": self.run,
                "round": self.round,
                "config": self.config.plain(),
                "clients": list(self.clients.items()),
                "domains": list(self.domains),
            }
        )

    @classmethod
    def read(cls, text: str) -> "Order":
        """The inverse of `text`; ValueError for anything else."""
        try:
            plain = json.loads(text)
            order = cls(
                run=plain["run"],
                round=plain["round"],
                config=FederateConfig.from_plain(plain["config"], source="the server's order"),
                clients=dict(plain["clients"]),
                domains=tuple(plain["domains"]),
            )
            numbers = [order.round, *order.clients, *order.clients.values()]
            if not (_RUN.fullmatch(order.run) and all(type(number) is int and number >= 0 for number in numbers)):
                raise ValueError("a name or a number that cannot be")
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"this is no order of a server of this version of batchless: {error}") from error
        return order


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client says of its part in a round, besides the tensors.

    Attributes:
        update: without tensors; its metrics are under one name, whatever the domain.
        began_anew: whether its own tensors were lost, so that it began with the initial ones.
    """

    update: Update
    began_anew: bool = False

    def text(self) -> str:
        """As it is sent."""
        update = self.update
        if update.left_out is not None:
            return json.dumps({"left_out": update.left_out.reason})
        return json.dumps(
            {
                "weight": update.weight,
                "images": update.images,
                "seconds": update.seconds,
                "metrics": next(iter(update.metrics.values())) if update.metrics else {},
                "began_anew": self.began_anew,
            }
        )

    @classmethod
    def read(cls, text: str, *, client: int, domain: str) -> "Answer":
        """The inverse of `text`, of that client; ValueError for anything else."""
        try:
            plain = json.loads(text)
            if "left_out" in plain:
                return cls(update=Update(left_out=LeftOut(client=client, reason=_line(plain["left_out"]))))
            weight, images, seconds = float(plain["weight"]), int(plain["images"]), float(plain["seconds"])
            metrics = {str(name): (float(total), float(count)) for name, (total, count) in plain["metrics"].items()}
            known = [weight, seconds, *(number for pair in metrics.values() for number in pair)]
            if not all(map(math.isfinite, known)) or images < 0 or "loss" not in metrics:
                raise ValueError("a number that cannot be, or no loss")
            update = Update(weight=weight, images=images, seconds=seconds, metrics={domain: metrics})
            return cls(update=update, began_anew=bool(plain["began_anew"]))
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"sent an answer that cannot be read: {error}") from error


def figures_text(figures: Mapping[Any, Mapping[str, float]]) -> str:
    """Figures by client or domain, as they are sent."""
    return json.dumps([[key, dict(named)] for key, named in figures.items()])


def read_figures(text: str) -> dict[Any, dict[str, float]]:
    """The inverse of `figures_text`; ValueError for anything else."""
    try:
        found = {key: {str(name): float(value) for name, value in named.items()} for key, named in json.loads(text)}
        if taken := sorted({name for named in found.values() for name in named} & _NO_FIGURES):
            raise ValueError(f"{taken[0]} is no figure")
        return found
    except (TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"sent figures that cannot be read: {error}") from error


def sent_tensors(update: Update) -> dict[str, Tensor]:
    """The tensors of one client's update that go to the server, by their keys."""
    return {**update.values, **update.counters}


def with_sent(update: Update, tensors: Mapping[str, Tensor]) -> Update:
    """The update with what `sent_tensors` has made of it."""
    values = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    counters = {name: tensor for name, tensor in tensors.items() if name not in values}
    return replace(update, values=values, counters=counters)


def read_array(data: bytes, *, name: str, like: Tensor, wider: bool = False) -> Tensor:
    """The tensor in the bytes of a numpy file, with the shape and type of `like`.

    Args:
        data: of the file.
        name: of the tensor, for messages.
        like: what it has to be.
        wider: whether it may be in float64 too.

    Raises:
        ValueError: anything else; of the header's claims nothing is believed before it is compared.
    """
    file = BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of the format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy reads the header as Python literals, twice: these raise anything
        raise ValueError(f"{name} is no array: {_line(str(error))}") from error
    own = _dtype(like.dtype)
    if shape != tuple(like.shape):
        raise ValueError(f"{name} has the shape {shape}, here it is {tuple(like.shape)}")
    if dtype != own and not (wider and like.is_floating_point() and dtype == np.dtype(np.float64)):
        raise ValueError(f"{name} has the type {_line(str(dtype))}, here it is {own}")
    begin = file.tell()
    if fortran or len(data) - begin != dtype.itemsize * like.numel():
        raise ValueError(f"{name} has {len(data) - begin} bytes, {dtype.itemsize * like.numel()} are expected")
    return torch.from_numpy(np.frombuffer(data, dtype, offset=begin).reshape(shape).copy())


def _dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype


def _line(text: Any) -> str:
    return " ".join(str(text).split())[:_LONGEST_REASON]
