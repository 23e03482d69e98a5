"""What `torch.compile` and bfloat16 autocast add to optimizer steps of ResNet-50 on one 224 px image."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import batchless as bl
from bench.compilation import attempt, backend_name, compiled
from bench.step import IMAGE_SIZE, Forward, accumulated_step, micro_batches, plain_step, require_finite
from bench.timing import Clock, Comparison, interleave

REPEATS = 10
NORMALIZERS = ("bn", "gn+ws", "bcn-micro+ws")


def comparisons(
    *, repeats: int | None, seed: int, clock: Clock, on_round: Callable[[int, int], None]
) -> Iterator[Comparison]:
    """One comparison for each normalizer; what does not compile is left out, with the reason."""
    for normalizer in NORMALIZERS:
        torch.manual_seed(seed)
        images = micro_batches(1, image_size=IMAGE_SIZE)
        model, _ = bl.convert(torchvision.models.resnet50(), normalizer)
        models = {name: copy.deepcopy(model).train() for name in FORWARDS}
        step = plain_step if normalizer == "bn" else accumulated_step
        steps, notes = {}, [processor_note()]
        for name, contestant in models.items():
            run = step(contestant, images, FORWARDS[name](contestant))
            seconds, failure = attempt(run)
            if failure:
                notes.append(f"{name}: left out after {seconds:.0f} s, {failure}")
                continue
            steps[name] = run
            if name.startswith("compiled"):
                notes.append(f"{name}: {backend_name()}, compiled in {seconds:.0f} s")
        times = interleave(steps, repeats=repeats or REPEATS, seed=seed, clock=clock, on_round=on_round)
        require_finite(models)
        yield Comparison(
            title=f"ResNet-50 {normalizer} optimizer step, one {IMAGE_SIZE} px image",
            base="eager",
            times=times,
            notes=tuple(notes),
        )


def in_bfloat16(forward: Forward, images: Tensor) -> Tensor:
    """A forward under autocast, its output in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return forward(images).float()


FORWARDS: dict[str, Callable[[nn.Module], Forward]] = {
    "eager": lambda model: model,
    "bf16": lambda model: partial(in_bfloat16, model),
    "compiled": compiled,
    "compiled, bf16": lambda model: partial(in_bfloat16, compiled(model)),
}
"""What is timed; nothing is compiled before its first call."""


def processor_note() -> str:
    """Whether the processor computes in bfloat16 by itself."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace").split()
    except OSError:
        return "bfloat16 arithmetic of the processor: unknown"
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return f"bfloat16 arithmetic of the processor: {', '.join(found) or 'none'}"
