"""A federated run over Flower in a process of its own, to be killed: `flower_worker.py FOLDER NAME DATA`."""

import sys
from pathlib import Path

from domain_runs import held_in
from test_flower_loopback import PATIENT, ROUNDS, small

from batchless.federated.loopback import federate_on_loopback

if __name__ == "__main__":
    folder, name, root = sys.argv[1:]
    asked = small(name, Path(root), Path(folder), engine="flower", flower=PATIENT)
    federate_on_loopback(asked, held_in(ROUNDS))
