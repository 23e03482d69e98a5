"""The small networks and data that the tests of an optimizer step share, and what its processes run.

A scenario is a function of a rank that gives plain values: run with rank 0 and 1 in two processes, with None in one
process that has the data of both.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from batchless.nn import (
    BatchChannelNorm,
    CWNConv2d,
    CWNConvTranspose2d,
    CWNLinear,
    EstimatedBatchNorm,
    ScaledWSConv2d,
    ScaledWSConvTranspose2d,
    ScaledWSLinear,
    WNConv2d,
    WNConvTranspose2d,
    WNLinear,
    WSConv2d,
    WSConvTranspose2d,
    WSLinear,
)
from batchless.train import AGC, accumulate

LAYERS: dict[str | None, tuple[Any, Any, Any]] = {
    None: (nn.Conv2d, nn.ConvTranspose2d, nn.Linear),
    "ws": (WSConv2d, WSConvTranspose2d, WSLinear),
    "sws": tuple(
        partial(layer, gain=True, gamma=1.7) for layer in (ScaledWSConv2d, ScaledWSConvTranspose2d, ScaledWSLinear)
    ),
    "wn": (WNConv2d, WNConvTranspose2d, WNLinear),
    "cwn": (CWNConv2d, CWNConvTranspose2d, CWNLinear),
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "gn": partial(nn.GroupNorm, 4),
    "ln": partial(nn.GroupNorm, 1),
    "in": partial(nn.InstanceNorm2d, affine=True),
    "none": lambda channels: nn.Identity(),
    "bn": nn.BatchNorm2d,
    "bcn-micro": partial(BatchChannelNorm, num_groups=2),
}
Counts = Literal["int", "tensor", "mixed"]
Batch = tuple[Tensor, Tensor]


def network(act: str, weight: str | None = None, *, seed: int = 0, **settings: Any) -> nn.Sequential:
    """A dense, a grouped and a transposed convolution and a linear layer, in float64, away from special values."""
    conv, transposed, linear = LAYERS[weight]
    bias = act == "none"  # elsewhere its gradient may be pure rounding, which AdamW blows up to full steps
    torch.manual_seed(seed)
    layers = [
        conv(3, 8, 3, padding=1, bias=bias),
        NORMS[act](8, **settings),
        nn.ReLU(),
        conv(8, 8, 3, stride=2, padding=1, groups=2, bias=bias),
        NORMS[act](8, **settings),
        nn.ReLU(),
        transposed(8, 8, 2, stride=2, groups=2, bias=bias),
        NORMS[act](8, **settings),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        linear(8, 5),
    ]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def micro_batches(sizes: Sequence[tuple[int, int]], *, seed: int) -> list[Batch]:
    """Images and classes for every `(images, labelled)`; the images beyond `labelled` are to be ignored (class -100)."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for images, labelled in sizes:
        targets = torch.randint(0, 5, (images,), generator=generator)
        targets[labelled:] = -100
        batches.append((torch.randn(images, 3, 6, 6, generator=generator, dtype=torch.float64), targets))
    return batches


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the labelled images."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy averaged over the labelled images, 0 if none is."""
    return summed_loss(model, batch) / (batch[1] >= 0).sum().clamp_min(1)


def samples_in(batch: Batch, counts: Counts = "int", *, position: int = 0) -> int | Tensor:
    """Number of labelled images, as the kind of number that `counts` says (mixed: by the position)."""
    labelled = (batch[1] >= 0).sum()
    on_device = counts == "tensor" or (counts == "mixed" and position % 2 == 1)
    return labelled if on_device else int(labelled)


def block_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    counts: Counts = "int",
    *,
    summed: bool = False,
    **options: Any,
) -> None:
    """One step of `accumulate` over the micro-batches, from their mean losses or from their sums."""
    with accumulate(model, optimizer, **options) as step:
        for position, batch in enumerate(batches):
            samples = samples_in(batch, counts, position=position)
            if summed:
                step.backward_sum(summed_loss(model, batch), samples=samples, images=len(batch[0]))
            else:
                step.backward(mean_loss(model, batch), samples=samples, images=len(batch[0]))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """A copy of every parameter's gradient, None where there is none."""
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Micro-batches of each rank in each step, and how it trains on them."""

    ranks: tuple[tuple[tuple[int, int], ...], ...]
    counts: tuple[Counts, Counts] = ("int", "int")
    scaled: bool = False
    process_group: Literal["world"] | None = "world"

    def __call__(self, rank: int | None) -> dict[str, Any]:
        """Train a network with estimates and standardized weights for three steps."""
        # So short a memory that after the first move the images count, not the warm-up.
        model = network("bcn-micro", "ws", memory=5.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        scaler = torch.amp.GradScaler("cpu") if self.scaled else None
        for step in range(3):
            by_rank = [micro_batches(sizes, seed=10 * step + r) for r, sizes in enumerate(self.ranks)]
            batches = [batch for r, own in enumerate(by_rank) if rank in (None, r) for batch in own]
            options: dict[str, Any] = {"process_group": self.process_group, "clip": AGC(0.05), "scaler": scaler}
            block_step(model, optimizer, batches, self.counts[rank or 0], **options)
        return snapshot(model)


class Branches(nn.Module):
    """A stem and one head per branch; a forward uses the stem and the head it is told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = WSConv2d(3, 4, 3).double()
        self.heads = nn.ModuleDict({name: WSConv2d(4, 2, 3).double() for name in ("first", "second", "neither")})

    def forward(self, images: Tensor, head: str) -> Tensor:
        return self.heads[head](self.stem(images)).square().mean()


def branches(rank: int | None) -> dict[str, Any]:
    """Each rank uses its own head, none uses the third."""
    model = Branches()
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    seen: list[dict[str, Tensor | None]] = []
    with accumulate(model, optimizer, clip=lambda clipped: seen.append(gradients(clipped))) as step:
        for r, (head, size) in enumerate((("first", 2), ("second", 3))):
            if rank in (None, r):
                images = micro_batches([(size, size)], seed=r)[0][0]
                step.backward(model(images, head), samples=size)
    return {"before": before, "after": snapshot(model), "gradients": seen[0], "clipped": len(seen)}


def _mistake(sizes: Sequence[tuple[int, int]], *, counts: Counts = "int", **settings: Any) -> Callable[..., Any]:
    """A step that must raise on every rank, and another one after it."""

    def scenario(rank: int | None) -> dict[str, Any]:
        model = network("bcn-micro", "ws", **settings)
        before = snapshot(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        message = "no error"
        try:
            block_step(model, optimizer, micro_batches(sizes, seed=0), counts)
        except ValueError as error:
            message = str(error)
        after = snapshot(model)
        without = [name for name, gradient in gradients(model).items() if gradient is None]
        block_step(model, optimizer, micro_batches([(2, 2)], seed=1), process_group=None)
        return {"message": message, "before": before, "after": after, "without": without, "later": snapshot(model)}

    return scenario


def half(rank: int | None) -> dict[str, Any]:
    """Gradients near the largest float16, from many samples."""
    model = nn.Linear(1, 1, bias=False).half()
    nn.init.ones_(model.weight)
    seen: list[dict[str, Tensor | None]] = []
    with accumulate(
        model, torch.optim.SGD(model.parameters(), lr=0.0), clip=lambda m: seen.append(gradients(m))
    ) as step:
        for r, slope in enumerate((3e4, 1e4)):
            if rank in (None, r):
                step.backward((model(torch.ones(1, 1).half()) * slope).sum(), samples=500)
    return seen[0]


def wrapped(rank: int | None) -> dict[str, Any]:
    """What a model in DistributedDataParallel is told, plain and compiled."""
    messages = {}
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
    for name, form in (("plain", model), ("compiled", torch.compile(model, backend="aot_eager"))):
        messages[name] = "no error"
        try:
            with accumulate(form, torch.optim.SGD(model.parameters(), lr=0.1)) as step:
                step.backward(model(torch.ones(1, 2)).sum(), samples=1)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def groups(rank: int | None) -> dict[str, Any]:
    """The world given as a group, and a group of this process alone."""
    results = {}
    pairs = dist.new_group([0, 1])
    alone = [dist.new_group([r]) for r in (0, 1)][rank or 0]
    for name, group in (("pair", pairs), ("alone", alone)):
        model = network("gn", "ws")
        batches = micro_batches([(2, 2)] if rank else [(3, 3), (1, 1)], seed=rank or 0)
        block_step(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, process_group=group)
        results[name] = snapshot(model)
    return results


SCENARIOS: dict[str, Callable[[int | None], dict[str, Any]]] = {
    "equal shares": Data(ranks=(((2, 2), (2, 2)), ((2, 2), (2, 2)))),
    "unequal shares": Data(ranks=(((3, 3), (1, 1), (2, 2)), ((4, 4),))),
    "ignored images": Data(ranks=(((2, 0), (3, 1)), ((1, 1), (2, 2), (2, 0)))),
    "a rank without data": Data(ranks=(((2, 2), (3, 3)), ())),
    "first rank without data": Data(ranks=((), ((2, 2), (3, 3)))),
    "a rank without labels": Data(ranks=(((2, 2), (3, 2)), ((2, 0),))),
    "tensor counts": Data(ranks=(((2, 1), (3, 3)), ((1, 0), (2, 2))), counts=("tensor", "tensor")),
    "int and tensor counts": Data(ranks=(((2, 1), (3, 3)), ((1, 0), (2, 2))), counts=("mixed", "int")),
    "tensor counts, a rank without labels": Data(ranks=(((2, 0),), ((2, 2), (1, 1))), counts=("tensor", "tensor")),
    "loss scaling": Data(ranks=(((2, 2), (1, 1)), ((3, 3),)), scaled=True),
    "alone": Data(ranks=(((3, 3), (1, 1)), ((2, 2),)), process_group=None),
    "branches": branches,
    "no backward": _mistake([]),
    "no labels": _mistake([(2, 0), (1, 0)]),
    "no labels, tensor counts": _mistake([(2, 0), (1, 0)], counts="tensor"),
    "update in the forward": _mistake([(2, 2)], update="forward"),
    "half": half,
}
DISTRIBUTED_ONLY = {"wrapped": wrapped, "groups": groups}
UNDER_TORCHRUN = ("unequal shares", "a rank without data")


def run(rank: int, folder: str, names: Sequence[str], rendezvous: str) -> None:
    """Run the scenarios as one of two processes and leave what they gave in `folder`."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    scenarios = {**SCENARIOS, **DISTRIBUTED_ONLY}
    torch.save({name: scenarios[name](rank) for name in names}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    # eps: a gain in front of instance normalization has a gradient so small that its rounding would show.
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-5),
}


EXACT = {"rtol": 0, "atol": 1e-12}


assert_close = torch.testing.assert_close


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


SIZES = st.lists(st.integers(1, 3).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=6)


def mixed_network():
    """All that a forward may change: running statistics, estimates of both kinds, standardized weights."""
    parts = (network("bn", "ws"), network("bcn-micro", "ws"), network("bcn-micro", "wn", update="forward"))
    return nn.Sequential(parts[0][:3], parts[1][3:6], parts[2][6:], nn.Dropout(0.0))


def estimated(model):
    return [module for module in model.modules() if isinstance(module, EstimatedBatchNorm)]


if __name__ == "__main__":
    run(int(os.environ["RANK"]), sys.argv[1], UNDER_TORCHRUN, "env://")
