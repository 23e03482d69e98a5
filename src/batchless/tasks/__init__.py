"""What can be learned: each task brings a loss, a metric and its batches to the one loop."""

from batchless.tasks.classify import Classify as Classify
from batchless.tasks.experiment import DataSettings as DataSettings
from batchless.tasks.experiment import TrainConfig as TrainConfig
from batchless.tasks.experiment import Trained as Trained
from batchless.tasks.experiment import run_training as run_training
