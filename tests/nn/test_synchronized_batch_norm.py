"""Batch statistics over two processes (gloo) equal those of one process on the whole batch."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

import batchless.nn as bnn

SHARES = {"equal": (3, 3), "unequal": (5, 1), "one-empty": (6, 0)}
LAYERS = {
    "BatchNorm": lambda: bnn.BatchNorm(4, sync=True, momentum=0.3),
    "without-affine": lambda: bnn.BatchNorm(4, sync=True, affine=False),
    "BatchChannelNorm": lambda: bnn.BatchChannelNorm(4, statistics="batch", sync=True),
    "far-mean": lambda: bnn.BatchNorm(4, sync=True, momentum=1.0),
    "bf16": lambda: bnn.BatchNorm(4, sync=True, momentum=1.0),
    "fp16": lambda: bnn.BatchNorm(4, sync=True, momentum=1.0),
}


def layer_of(case: str) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[case]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return layer.to(dtype_of(case))


def dtype_of(case: str) -> torch.dtype:
    return {"far-mean": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(case, torch.float64)


def whole_batch(case: str) -> tuple[Tensor, Tensor]:
    """Inputs, and the functional whose gradient is taken."""
    torch.manual_seed(1)
    # bf16 counts exactly to 256, fp16 to 2,048 and not beyond 65,504.
    shape = {"bf16": (6, 4, 33, 31), "fp16": (6, 4, 105, 105)}.get(case, (6, 4, 5, 3))
    x = 2 * torch.randn(shape, dtype=torch.float64) + (1e4 if case == "far-mean" else 1.0)
    return x.to(dtype_of(case)), torch.randn(shape, dtype=torch.float64)


def two_forwards(layer: nn.Module, x: Tensor, functional: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    outputs = [layer(x), layer(0.5 * x)]  # two before one backward, which torch's wrapper does not allow
    sum((y * functional.to(y.dtype)).sum() for y in outputs).backward()
    result = {"first output": outputs[0], "second output": outputs[1], "input gradient": x.grad}
    result |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    return {name: value.detach() for name, value in (result | dict(layer.named_buffers())).items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for case in LAYERS:
        for share, sizes in SHARES.items():
            x, functional = whole_batch(case)
            part = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
            results[case, share] = two_forwards(layer_of(case), x[part], functional[part])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes() -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, args=(folder,), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("case", LAYERS)
def test_two_processes_equal_one(case, share, of_two_processes):
    expected = two_forwards(layer_of(case).double(), *(value.double() for value in whole_batch(case)))
    ours = [results[case, share] for results in of_two_processes]
    tolerance = {
        "far-mean": 2e-3,  # a float32 near 1e4 is known to 5e-4
        "bf16": 4 * 2**-8,  # a few roundings relative to the largest value; statistics in float32
        "fp16": 4 * 2**-11,
    }.get(case, 1e-10)
    for name, value in expected.items():
        if "output" in name or name == "input gradient":
            both = torch.cat([result[name] for result in ours])
        elif name.startswith("gradient of"):
            both = ours[0][name] + ours[1][name]  # as data-parallel training sums them
        else:
            torch.testing.assert_close(ours[0][name], ours[1][name], rtol=0, atol=0)
            both = ours[0][name]
        atol = tolerance * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(both.double(), value.double(), rtol=0, atol=atol, msg=lambda t, n=name: f"{n}: {t}")
