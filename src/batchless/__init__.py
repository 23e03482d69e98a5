"""Train vision networks where batch statistics fail: one image per device, or one domain per client."""

from batchless.nn.standardized import standardized as standardized
from batchless.surgery import convert as convert
from batchless.surgery import fold as fold
from batchless.surgery import lean as lean
from batchless.surgery import recalibrate as recalibrate
from batchless.train.accumulate import accumulate as accumulate
from batchless.train.accumulate import batched as batched
from batchless.train.clipping import AGC as AGC
from batchless.train.clipping import ClipNorm as ClipNorm
