"""What each process of torchrun does in `test_same_bits`: every algorithm, one after the other.

torchrun ... torchrun_worker.py DATA OUT NAME...
"""

import sys
from pathlib import Path

import torch.distributed as dist
from domain_runs import config

from batchless.federated import run_federation


def main(root: str, out: str, *names: str) -> None:
    dist.init_process_group("gloo")
    for name in names:
        finished = run_federation(config(name, Path(root), Path(out) / name))
        assert finished.summary["rounds"] == 2
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
