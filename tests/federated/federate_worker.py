"""A federated run in a process of its own, to be killed: `federate_worker.py FOLDER`, or `... FOLDER NAME DATA WORKERS`."""

import sys
from pathlib import Path

from domain_runs import config, held_in

from batchless.federated import resume_federation, run_federation

ROUNDS = 8


def main(folder: str, name: str | None = None, root: str = "", workers: str = "1") -> None:
    if name is None:
        resume_federation(folder)
    else:
        asked = config(name, Path(root), Path(folder), rounds=ROUNDS, workers=int(workers), evaluate_every=3)
        run_federation(asked, held_in(ROUNDS - 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
