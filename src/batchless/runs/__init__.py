"""The run folder: written by a run, atomically; read by anything that compares runs."""

from .checkpoint import load_checkpoint as load_checkpoint
from .checkpoint import load_model_state as load_model_state
from .folder import RunFolder as RunFolder
from .reading import Run as Run
from .reading import find_runs as find_runs
from .reading import number as number
from .reading import read_run as read_run
