"""The settings that only segmentation has."""

from dataclasses import dataclass

from batchless.data.label_maps import IGNORED
from batchless.data.map_loading import MapAugment
from batchless.models.segmenters import SegmenterSettings


@dataclass(frozen=True, kw_only=True)
class SegmentSettings:
    """Sizes, augmentation, what the values in the label maps mean, and DeepLabV3's form.

    Attributes:
        shorter_side: the length, in pixels, to which images are resized, in evaluation too; None: as they are stored.
        scales: smallest and largest factor of that size for a training image, uniform in its logarithm.
        crop: height and width of the random part that a training image gives; None: the whole image.
        class_names: of the labels from 0 on; none: those that the data set's layout or its classes.txt gives, else the values
            in the training maps.
        ignore: values in the label maps that are neither learned nor evaluated.
        output_stride: of DeepLabV3, 8 or 16; None: the library's.
        multi_grid: of torchvision's DeepLabV3 on ResNets: three factors of the dilation in the last stage; none: torchvision's.
    """

    shorter_side: int | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] | None = None
    class_names: tuple[str, ...] = ()
    ignore: tuple[int, ...] = (IGNORED,)
    output_stride: int | None = None
    multi_grid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not all(0 <= value <= IGNORED for value in self.ignore):
            raise ValueError(f"segment.ignore has values of label maps, 0 to {IGNORED}; got {list(self.ignore)}")
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"segment.class_names names a class twice: {list(self.class_names)}")
        try:
            self.augment(flip=False)
            self.network()
        except ValueError as error:
            raise ValueError(f"segment.{error}") from error

    def augment(self, *, flip: bool) -> MapAugment:
        """What happens to an image and its map."""
        return MapAugment(shorter_side=self.shorter_side, scales=self.scales, crop=self.crop, flip=flip)

    def network(self) -> SegmenterSettings:
        """What is chosen of the network."""
        return SegmenterSettings(output_stride=self.output_stride, multi_grid=self.multi_grid)
