"""Training: the exact micro-batch step, gradient clipping, and the one loop."""

from batchless.train.accumulate import Step as Step
from batchless.train.accumulate import accumulate as accumulate
from batchless.train.accumulate import batched as batched
from batchless.train.clipping import AGC as AGC
from batchless.train.clipping import Clip as Clip
from batchless.train.clipping import ClipNorm as ClipNorm
