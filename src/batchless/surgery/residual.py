"""Residual blocks, told by their type: which normalization ends the branch that is added to the shortcut."""

from torch import nn
from torchvision.models import resnet

from batchless.nn.residual_block import ResidualBlock
from batchless.surgery.recognize import imported

KNOWN_BLOCKS = "torchvision's and timm's BasicBlock and Bottleneck, and CifarBlock"


def residual_ends(model: nn.Module) -> frozenset[str]:
    """The qualified names of the normalizations that end a residual branch, in blocks of `KNOWN_BLOCKS`.

    ValueError if there is none.

    >>> sorted(residual_ends(resnet.BasicBlock(4, 4)))
    ['bn2']
    """
    basic = (resnet.BasicBlock, *imported("timm.models.resnet", "BasicBlock"))
    bottleneck = (resnet.Bottleneck, *imported("timm.models.resnet", "Bottleneck"))
    found = set()
    for name, module in model.named_modules():
        last = None
        if isinstance(module, ResidualBlock):
            last = module.last_normalization
        elif isinstance(module, basic):
            last = "bn2"
        elif isinstance(module, bottleneck):
            last = "bn3"
        if last is not None:
            found.add(f"{name}.{last}".lstrip("."))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no residual block of a known type ({KNOWN_BLOCKS}) for skip=skip-init: use none "
            "without it, where a last gain of 0 becomes SkipInit"
        )
    return frozenset(found)
