"""Detection and instance segmentation: boxes, and masks where the detector has them."""

from batchless.tasks.detect.average_precision import AveragePrecision as AveragePrecision
from batchless.tasks.detect.task import Detect as Detect
from batchless.tasks.detect.task import DetectionData as DetectionData
