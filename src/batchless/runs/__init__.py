"""The run folder: written by a run, atomically; read by anything that compares runs."""

from batchless.runs.checkpoint import load_checkpoint as load_checkpoint
from batchless.runs.checkpoint import load_model_state as load_model_state
from batchless.runs.folder import RunFolder as RunFolder
from batchless.runs.reading import Run as Run
from batchless.runs.reading import find_runs as find_runs
from batchless.runs.reading import number as number
from batchless.runs.reading import read_run as read_run
