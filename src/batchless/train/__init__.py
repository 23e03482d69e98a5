"""Training: the exact micro-batch step, gradient clipping, and the one loop."""

from batchless.train.accumulate import Step as Step
from batchless.train.accumulate import accumulate as accumulate
from batchless.train.accumulate import batched as batched
from batchless.train.clipping import AGC as AGC
from batchless.train.clipping import Clip as Clip
from batchless.train.clipping import ClipNorm as ClipNorm
from batchless.train.loop import evaluate as evaluate
from batchless.train.loop import train as train
from batchless.train.settings import LoopSettings as LoopSettings
from batchless.train.settings import OptimizerSettings as OptimizerSettings
from batchless.train.task import Data as Data
from batchless.train.task import Metric as Metric
from batchless.train.task import Task as Task
