"""Semantic segmentation: a class for every pixel."""

from batchless.tasks.segment.confusion import Confusion as Confusion
from batchless.tasks.segment.settings import SegmentSettings as SegmentSettings
from batchless.tasks.segment.task import Segment as Segment
from batchless.tasks.segment.task import SegmentationData as SegmentationData
