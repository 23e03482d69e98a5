"""Residual blocks, told by their type: how the branch that is added to the shortcut begins and ends."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torchvision.models import resnet

from batchless.nn.branch_scale import branch_betas
from batchless.nn.residual_block import ResidualBlock
from batchless.surgery.recognize import imported, is_activation, is_convolution

KNOWN_BLOCKS = "torchvision's and timm's BasicBlock and Bottleneck, and CifarBlock"
SCALED_BLOCKS = "torchvision's BasicBlock and Bottleneck, and CifarBlock"


@dataclass(frozen=True)
class _Block:
    """A residual block: its qualified name, and the names of parts in it (the shortcut's is empty where it has none)."""

    name: str
    module: nn.Module
    first: str
    last: str
    last_normalization: str
    shortcut: str

    def within(self, part: str) -> str:
        return f"{self.name}.{part}".lstrip(".")


def residual_ends(model: nn.Module) -> frozenset[str]:
    """The qualified names of the normalizations that end a residual branch, in blocks of `KNOWN_BLOCKS`.

    ValueError if there is none.

    >>> sorted(residual_ends(resnet.BasicBlock(4, 4)))
    ['bn2']
    """
    found = frozenset(block.within(block.last_normalization) for block in _blocks(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no residual block of a known type ({KNOWN_BLOCKS}) for skip=skip-init: use none "
            "without it, where a last gain of 0 becomes SkipInit"
        )
    return found


def branch_scales(model: nn.Module, *, alpha: float) -> dict[str, float]:
    """By the qualified name of a convolution, what its weight is to be multiplied with for `skip=alpha-beta`.

    1 / beta for the first one of each branch and for the one of a shortcut, alpha for the last one of each branch. Blocks
    follow each other in the order of their declaration, in each network anew (`branch_betas`).

    Raises:
        ValueError: no block of `SCALED_BLOCKS`, a block of another known type, or one whose activation is no ReLU.
    """
    chains: dict[str, list[_Block]] = {}
    for block in _blocks(model):
        _require_scalable(block)
        chains.setdefault(".".join(block.name.split(".")[:-2]), []).append(block)
    if not chains:
        raise ValueError(
            f"{type(model).__name__} has no residual block of a known type ({SCALED_BLOCKS}) for skip=alpha-beta: use none"
        )
    scales = {}
    for chain in chains.values():
        shortcuts = [_convolutions(block, block.shortcut) for block in chain]
        betas = branch_betas([bool(found) for found in shortcuts], alpha=alpha)
        for block, shortcut, beta in zip(chain, shortcuts, betas, strict=True):
            for name in (*_convolutions(block, block.first), *shortcut):
                scales[name] = 1 / beta
            scales[block.within(block.last)] = alpha
    return scales


def _blocks(model: nn.Module) -> Iterator[_Block]:
    basic = (resnet.BasicBlock, *imported("timm.models.resnet", "BasicBlock"))
    bottleneck = (resnet.Bottleneck, *imported("timm.models.resnet", "Bottleneck"))
    for name, module in model.named_modules():
        if isinstance(module, ResidualBlock):
            parts = (module.first_convolution, module.last_convolution, module.last_normalization, module.shortcut_name)
        elif isinstance(module, basic):
            parts = ("conv1", "conv2", "bn2", "downsample")
        elif isinstance(module, bottleneck):
            parts = ("conv1", "conv3", "bn3", "downsample")
        else:
            continue
        yield _Block(name, module, *parts)


def _require_scalable(block: _Block) -> None:
    if not isinstance(block.module, ResidualBlock | resnet.BasicBlock | resnet.Bottleneck):
        raise ValueError(
            f"{block.name} is a {type(block.module).__module__}.{type(block.module).__name__}, of which skip=alpha-beta knows "
            f"no beta (it does for {SCALED_BLOCKS}): use skip=skip-init"
        )
    other = [
        name for name, module in block.module.named_modules() if is_activation(module) and type(module) is not nn.ReLU
    ]
    if other:
        raise ValueError(
            f"{block.within(other[0])} is no ReLU: the beta of skip=alpha-beta is that of blocks with ReLU after the sum; use "
            "skip=skip-init"
        )


def _convolutions(block: _Block, part: str) -> list[str]:
    """The convolutions in a part of a block, which may be a layer before a convolution and the convolution."""
    module = getattr(block.module, part, None)
    within = [] if module is None else module.named_modules(prefix=block.within(part))
    return [name for name, layer in within if is_convolution(layer)]
