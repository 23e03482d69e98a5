"""What can be learned: each task brings a loss, a metric and its batches to the one loop."""

from batchless.tasks.classify import Classify as Classify
from batchless.tasks.classify import ImageData as ImageData
from batchless.tasks.config import DataSettings as DataSettings
from batchless.tasks.config import TrainConfig as TrainConfig
from batchless.tasks.experiment import FinishedRun as FinishedRun
from batchless.tasks.experiment import resume_training as resume_training
from batchless.tasks.experiment import run_training as run_training
from batchless.tasks.trained import Trained as Trained
from batchless.tasks.trained import load_trained as load_trained
