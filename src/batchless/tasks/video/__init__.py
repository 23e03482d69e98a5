"""Video classification: clips, their loss, their metric, pictures."""

from batchless.tasks.video.classify_clips import ClassifyClips as ClassifyClips
from batchless.tasks.video.classify_clips import ClipData as ClipData
from batchless.tasks.video.setup import open_clip_data as open_clip_data
