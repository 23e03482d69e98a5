"""What each process of test_loop_processes.py runs."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_training import TinyData, settings, tiny_model

from batchless.runs import RunFolder
from batchless.tasks import Classify
from batchless.train import Processes, train

NORMALIZERS = ("gn+ws", "bcn-micro+ws", "bn")


def run(rank: int, count: int, folder: str) -> None:
    """Train with each normalizer; what came out goes to `<folder>/<rank>-<normalizer>.pt`."""
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    processes = Processes(rank, count)
    for normalizer in NORMALIZERS:
        model = tiny_model(normalizer, seed=rank)  # another start on each: the first one's is to be taken
        task = Classify()
        out = None if rank else RunFolder.create(Path(folder) / normalizer, config={}, seed=0)
        summary = train(
            model, task, TinyData(), settings(images_per_forward=1, evaluations=3), out, processes=processes
        )
        figures = {name: value for name, value in summary.items() if name.startswith("test_")}
        torch.save({"model": model.state_dict(), "figures": figures}, f"{folder}/{rank}-{normalizer}.pt")
    dist.destroy_process_group()
