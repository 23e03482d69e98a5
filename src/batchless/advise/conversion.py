"""The report of a conversion, for a model by name."""

from dataclasses import dataclass

from batchless.models.build import build_any
from batchless.models.example import built_for, example_inputs
from batchless.nn.normalizer import parse_normalizer
from batchless.surgery import ConversionReport, convert


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What `batchless convert` tries.

    Attributes:
        model: a name, such as timm:resnet50, torchvision:maskrcnn_resnet50_fpn or smp:PSPNet-resnet18.
        normalizer: such as gn+ws.
        image_size: side of the square images, in pixels, that tell which layer feeds which.
    """

    model: str
    normalizer: str
    image_size: int = 224

    def __post_init__(self) -> None:
        parse_normalizer(self.normalizer)
        if self.image_size < 1:
            raise ValueError(f"image_size is in pixels and must be 1 or more, got {self.image_size}")


def run_convert(config: ConvertConfig) -> ConversionReport:
    """Convert a model by name, with random weights, and report layer by layer.

    Raises:
        ValueError: unknown model or normalizer, or a model that does not run on images of this size.
    """
    model = build_any(config.model)
    try:
        _, report = convert(model, config.normalizer, example=example_inputs(model, 1, config.image_size))
    except ValueError as error:
        raise ValueError(f"{config.model} at image_size={config.image_size}{built_for(model)}: {error}") from error
    return report
