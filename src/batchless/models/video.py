"""Video networks by name: 2D networks on every frame, with or without temporal shifts, and torchvision's 3D networks."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from batchless.models.temporal_shift import Direction, SegmentNetwork, insert_temporal_shift

VIDEO_KINDS = (
    "tsm:<2D network> (such as tsm:torchvision:resnet50; tsm-online: looks back only, tsn: does not shift), "
    "torchvision:<video network> (such as torchvision:r3d_18)"
)
_DIRECTIONS: dict[str, Direction | None] = {"tsm": "both", "tsm-online": "past", "tsn": None}
SEGMENTS = 8
"""Frames of a clip, of 2D networks by name: what the authors of TSM use most."""


def segment_kind(name: str) -> tuple[str, str] | None:
    """`tsm`, `tsm-online` or `tsn`, and the name of the 2D network; None for other names.

    >>> segment_kind("tsm:torchvision:resnet18"), segment_kind("torchvision:r3d_18")
    (('tsm', 'torchvision:resnet18'), None)
    """
    kind, _, rest = name.partition(":")
    return (kind, rest) if kind in _DIRECTIONS else None


def on_segments(kind: str, network: nn.Module, *, segments: int = SEGMENTS) -> SegmentNetwork:
    """A 2D network as a network for clips of so many frames.

    Raises:
        ValueError: temporal shifts are wanted and it is not one of the ResNets that they go into.
    """
    direction = _DIRECTIONS[kind]
    if direction is not None:
        insert_temporal_shift(network, segments=segments, direction=direction)
    return SegmentNetwork(network, segments=segments)


def is_3d(network: nn.Module) -> bool:
    """Whether the first convolution has three dimensions: then clips are `[N, C, T, H, W]`, as torchvision's networks want."""
    first = next((module for module in network.modules() if isinstance(module, _ConvNd)), None)
    return isinstance(first, nn.Conv3d)


def clip_input(network: nn.Module, clips: Tensor) -> Tensor:
    """Clips `[N, T, C, H, W]` as the network takes them."""
    return clips.transpose(1, 2) if is_3d(network) else clips
