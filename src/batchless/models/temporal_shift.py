"""The temporal shift module (Lin, Gan and Han, arXiv 1811.08383): 2D networks that see neighbouring frames.

It costs no parameter and no multiplication: some channels of each frame are exchanged for those of its neighbours before
the first convolution of a residual branch (the paper's "residual shift"; `blockres` in the authors' code), so that the
shortcut still carries the frame as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchless.models.cifar_resnet import CifarBlock

Direction = Literal["both", "past"]

SHARE = 8
"""One channel of so many comes from each neighbour: the paper's choice (its section 5.2)."""

_DEEP_STAGE = 23
"""From so many blocks in a stage on, every second block is shifted, as in the authors' code (ResNet-101 and deeper)."""


def temporal_shift(frames: Tensor, *, share: int = SHARE, direction: Direction = "both") -> Tensor:
    """Exchange a part of each frame's channels for those of its neighbours in time.

    With `f = C // share` and zeros before the first and after the last frame:

    - `both`: `out[:, t, :f] = x[:, t + 1, :f]` and `out[:, t, f:2f] = x[:, t - 1, f:2f]`,
    - `past`: `out[:, t, :f] = x[:, t - 1, :f]`, for use while the frames still arrive,

    and all other channels as they are. As in the authors' code (ops/temporal_shift.py; online_demo for `past`).

    Args:
        frames: x, `[N, T, C, ...]`.
        share: one of so many channels comes from each neighbour.
        direction: whether the frame after is a neighbour too.

    Raises:
        ValueError: fewer than `share` channels, of which nothing could be exchanged; `both` with `share` below 2.

    >>> clip = torch.arange(1.0, 4.0).repeat_interleave(8).view(1, 3, 8)
    >>> temporal_shift(clip)[0, :, :3].tolist()
    [[2.0, 0.0, 1.0], [3.0, 1.0, 2.0], [0.0, 2.0, 3.0]]
    """
    fold = _fold(frames.shape[2], share, direction)
    ahead = (0, 0) * (frames.ndim - 2)  # padding of the dimensions after T, as F.pad wants them: the last one first
    if direction == "past":
        before = F.pad(frames[:, :-1, :fold], (*ahead, 1, 0))
        return torch.cat([before, frames[:, :, fold:]], dim=2)
    after = F.pad(frames[:, 1:, :fold], (*ahead, 0, 1))
    before = F.pad(frames[:, :-1, fold : 2 * fold], (*ahead, 1, 0))
    return torch.cat([after, before, frames[:, :, 2 * fold :]], dim=2)


def _fold(channels: int, share: int, direction: Direction) -> int:
    least = 1 if direction == "past" else 2
    if direction not in ("both", "past") or not least <= share <= channels:
        raise ValueError(
            f"a temporal shift of one in share={share} of {channels} channels, direction={direction!r}: share must be from "
            f"{least} to the number of channels, direction 'both' or 'past'"
        )
    return channels // share


class TemporalShift(nn.Module):
    """A layer whose input is shifted in time first: `net(temporal_shift(x))`, with time folded into the batch.

    The state dict has `net.` before the layer's keys (`conv1.net.weight`), as the authors' checkpoints do.

    Args:
        net: a layer that takes `[N * T, C, H, W]`.
        segments: T.
        share: one of so many channels comes from each neighbour.
        direction: `both`, or `past` for use while the frames still arrive.

    Shapes: `[N * T, C, H, W]`, the frames of a clip one after the other; inside `online`, `[N, C, H, W]`, one of each clip.

    Raises:
        ValueError: `segments` below 1.
    """

    def __init__(self, net: nn.Module, *, segments: int, share: int = SHARE, direction: Direction = "both") -> None:
        super().__init__()
        if segments < 1:
            raise ValueError(f"segments={segments}: a clip has 1 or more frames")
        self.net = net
        self.segments, self.share, self.direction = segments, share, direction
        self.is_online = False
        self.earlier: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for the shifted frames."""
        if self.is_online:
            output: Tensor = self.net(self._after_the_one_before(x))
            return output
        clips = x.view(-1, self.segments, *x.shape[1:])
        output = self.net(temporal_shift(clips, share=self.share, direction=self.direction).flatten(0, 1))
        return output

    def _after_the_one_before(self, frame: Tensor) -> Tensor:
        fold = _fold(frame.shape[1], self.share, self.direction)
        earlier = torch.zeros_like(frame[:, :fold]) if self.earlier is None else self.earlier
        self.earlier = frame[:, :fold].clone()
        return torch.cat([earlier, frame[:, fold:]], dim=1)

    def extra_repr(self) -> str:
        """The settings."""
        return f"segments={self.segments}, share={self.share}, direction={self.direction!r}"


def insert_temporal_shift(
    network: nn.Module, *, segments: int, share: int = SHARE, direction: Direction = "both"
) -> tuple[str, ...]:
    """Put a `TemporalShift` before the first convolution of each residual branch of a 2D ResNet, in place.

    The blocks are those of timm's, torchvision's and this package's ResNets, found by their type. In networks with a stage of
    23 or more blocks (ResNet-101), every second block of each stage is shifted, the first one included, as the authors do.

    Args:
        network: before or after conversion.
        segments: T, frames of each clip.
        share: one of so many channels comes from each neighbour.
        direction: `both`, or `past`.

    Returns:
        The names of the shifted blocks.

    Raises:
        ValueError: no such block, or one that is too narrow or shifted already.
    """
    kinds = _residual_blocks()
    stages = [
        (stage_name, found)
        for stage_name, stage in network.named_modules()
        if (found := [(name, block) for name, block in stage.named_children() if type(block) in kinds])
    ]
    if not stages:
        raise ValueError(
            f"{type(network).__name__} has no residual block of timm's, torchvision's or this package's ResNets: the "
            "temporal shift goes into those (resnet18, resnet50, resnext50_32x4d, cifar_resnet8, ...)"
        )
    every = 2 if max(len(found) for _, found in stages) >= _DEEP_STAGE else 1
    shifted = []
    for stage_name, found in stages:
        for name, block in found[::every]:
            full_name = f"{stage_name}.{name}" if stage_name else name
            convolution = block.conv1
            if not isinstance(convolution, nn.Conv2d):
                raise ValueError(f"{full_name}.conv1 is a {type(convolution).__name__}: shift a plain 2D network, once")
            _fold(convolution.in_channels, share, direction)
            block.conv1 = TemporalShift(convolution, segments=segments, share=share, direction=direction)
            shifted.append(full_name)
    return tuple(shifted)


def _residual_blocks() -> tuple[type[nn.Module], ...]:
    """Exact types: each runs `conv1` first in its residual branch."""
    from timm.models import resnet as timm_resnet
    from torchvision.models import resnet

    return (timm_resnet.BasicBlock, timm_resnet.Bottleneck, resnet.BasicBlock, resnet.Bottleneck, CifarBlock)


@contextmanager
def online(network: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, a network of `direction="past"` takes the frames of its clips one at a time, and remembers what it must.

    Yields a function from the next frame of each clip `[N, C, H, W]` to that frame's scores; their mean over the frames is
    what the network says about the whole clip. Each shift keeps a `share`-th of one frame's channels until the next one.

    Args:
        network: with temporal shifts, in evaluation mode; a `SegmentNetwork` is entered by its 2D network.

    Raises:
        ValueError: no temporal shift in it, or one that needs the frame after.
    """
    shifts = [module for module in network.modules() if isinstance(module, TemporalShift)]
    if not shifts or any(shift.direction != "past" for shift in shifts):
        raise ValueError(
            "frame by frame needs temporal shifts that look back only: build the network as tsm-online:<2D network>, or "
            "insert_temporal_shift(..., direction='past')"
        )
    for shift in shifts:
        shift.is_online, shift.earlier = True, None
    try:
        yield network.base_model if isinstance(network, SegmentNetwork) else network
    finally:
        for shift in shifts:
            shift.is_online, shift.earlier = False, None


class SegmentNetwork(nn.Module):
    """A 2D network on every frame of a clip, its scores averaged (temporal segment networks, arXiv 1608.00859).

    With `insert_temporal_shift` this is TSM; without it, the frames' order does not matter. The state dict has `base_model.`
    before the 2D network's keys, as the authors' checkpoints do.

    Args:
        base_model: frames `[N * T, C, H, W]` to scores `[N * T, classes]`.
        segments: T.

    Shapes: clips `[N, T, C, H, W]` to `[N, classes]`.

    Raises:
        ValueError: clips of another number of frames or dimensions.
    """

    def __init__(self, base_model: nn.Module, *, segments: int) -> None:
        super().__init__()
        self.base_model, self.segments = base_model, segments

    def forward(self, clips: Tensor) -> Tensor:
        """Mean over the frames of the scores."""
        if clips.ndim != 5 or clips.shape[1] != self.segments:
            raise ValueError(
                f"got {list(clips.shape)}: clips are [N, T, C, H, W], and this network is built for T={self.segments} frames"
            )
        scores: Tensor = self.base_model(clips.flatten(0, 1))
        return scores.view(-1, self.segments, scores.shape[1]).mean(1)
