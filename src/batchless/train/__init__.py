"""Training: the exact micro-batch step, gradient clipping, and the one loop."""

from batchless.train.accumulate import Accumulation as Accumulation
from batchless.train.accumulate import Step as Step
from batchless.train.accumulate import accumulate as accumulate
from batchless.train.accumulate import batched as batched
from batchless.train.clipping import AGC as AGC
from batchless.train.clipping import Clip as Clip
from batchless.train.clipping import ClipNorm as ClipNorm
from batchless.train.evaluate import evaluate as evaluate
from batchless.train.interrupt import TrainingStoppedError as TrainingStoppedError
from batchless.train.interrupt import stop_on_signals as stop_on_signals
from batchless.train.loop import train as train
from batchless.train.processes import Processes as Processes
from batchless.train.processes import processes_of_torchrun as processes_of_torchrun
from batchless.train.settings import LoopSettings as LoopSettings
from batchless.train.settings import OptimizerSettings as OptimizerSettings
from batchless.train.task import Data as Data
from batchless.train.task import Metric as Metric
from batchless.train.task import Task as Task
