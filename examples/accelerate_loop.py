"""A training loop with Accelerate: devices, processes and mixed precision are its, the optimizer step is batchless's.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py      # the same steps, shared by two processes

Only the dataloader is prepared. The model stays bare, because `accumulate` reduces the gradients itself and more exactly than
DistributedDataParallel does; the optimizer stays bare, because `accumulate` unscales, clips and steps itself.
"""

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import batchless as bl
from batchless.data.handwriting import Split, handwriting
from batchless.models import build_model


def digits(split: Split, count: int) -> TensorDataset:
    """The first `count` embedded images, scaled to about [-1, 1], and their labels."""
    data = handwriting(split)
    return TensorDataset(data.images[:count] / 127.5 - 1, torch.tensor(data.labels[:count]))


def main(arguments: Sequence[str] | None = None) -> float:
    """Train on the embedded handwriting; the share of test images that the network gets right."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--normalizer", default="gn+ws")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--images_per_forward", type=int, default=1)
    parser.add_argument("--images_per_step", type=int, default=16, help="of all processes together")
    parser.add_argument("--images", type=int, default=3000, help="training images in an epoch")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--save", help="file for the trained weights")
    options = parser.parse_args(arguments)

    # even_batches=True would show some images twice, so that all processes have as many; the seedable sampler gives
    # the same order to any number of processes.
    sharing = DataLoaderConfiguration(even_batches=False, use_seedable_sampler=True)
    accelerator = Accelerator(mixed_precision=options.mixed_precision, dataloader_config=sharing)
    set_seed(0)  # equal weights and an equal order of the images on all processes
    train, test = digits("train", options.images), digits("test", 500)
    model, _ = bl.convert(build_model("cifar_resnet8", num_classes=10), options.normalizer, example=train[:1][0])
    model = model.to(accelerator.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(train, options.images_per_forward, shuffle=True)
    forwards = options.images_per_step // (options.images_per_forward * accelerator.num_processes)
    # Counted before the loader is shared: every process takes part in every step, also where its images have run out.
    steps = -(-len(loader) // (forwards * accelerator.num_processes))
    loader, test_loader = accelerator.prepare(loader, DataLoader(test, batch_size=100))

    for epoch in range(options.epochs):
        model.train()
        groups = iter(bl.batched(loader, forwards))
        for _ in range(steps):
            with bl.accumulate(model, optimizer, clip=bl.AGC(0.1), scaler=accelerator.scaler) as step:
                for images, labels in next(groups, []):
                    with accelerator.autocast():
                        loss = cross_entropy(model(images), labels)
                    step.backward(loss, samples=len(images))
        accuracy = evaluate(accelerator, model, test_loader)
        accelerator.print(f"epoch {epoch + 1}: {accuracy:.1%} of the test images right")
    if options.save:
        accelerator.save(model.state_dict(), options.save)
    return accuracy


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> float:
    """The share of the images of all processes that `model` gets right."""
    model.eval()
    right_and_all = torch.zeros(2, device=accelerator.device)
    for images, labels in loader:
        right = (model(images).argmax(dim=1) == labels).sum()
        right_and_all += torch.stack([right, right.new_tensor(len(images))])
    right, count = accelerator.reduce(right_and_all).tolist()
    return right / count


if __name__ == "__main__":
    main()
