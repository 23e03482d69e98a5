"""A task's metric over the test images."""

from torch import nn, no_grad

from batchless.nn.standardized import standardized
from batchless.train.autocast import autocast
from batchless.train.interrupt import ShouldStop, TrainingStoppedError, never_stop
from batchless.train.processes import Processes
from batchless.train.settings import Precision
from batchless.train.task import Batch, Data, Metric, Task


@no_grad()
def evaluate(
    model: nn.Module,
    task: Task[Batch],
    data: Data[Batch],
    device: str = "cpu",
    *,
    precision: Precision = "float32",
    processes: Processes | None = None,
    should_stop: ShouldStop = never_stop,
) -> Metric[Batch]:
    """The metric over all test images, with every weight standardized once; the modules' modes are restored.

    Args:
        model: on `device`.
        task: whose metric.
        data: whose test images.
        device: where batches go.
        precision: of the forward passes.
        processes: each takes its part of the images, and all get the metric over all of them.
        should_stop: asked before each batch.

    Raises:
        TrainingStoppedError: `should_stop()` became true.
    """
    processes = Processes() if processes is None else processes
    training = [module for module in model.modules() if module.training]
    model.eval()
    metric = task.metric()
    try:
        with standardized(model), autocast(device, precision):
            for batch in data.test(processes.part(data.test_images_count)):
                if should_stop():
                    raise TrainingStoppedError(0)
                metric.update(model, task.to(batch, device))
    finally:
        for module in training:
            module.training = True
    whole, *later = processes.gather(metric)
    for part in later:
        whole.merge(part)
    return whole
