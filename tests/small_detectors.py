"""The smallest detector that has all of a detector's parts."""

from batchless.models.detectors import DetectorSettings

TINY = DetectorSettings(
    shorter_side=64,
    longest_side=64,
    stages=2,
    channels=16,
    box_features=16,
    rois_per_image=8,
    proposals_per_image=20,
)
