"""Lightning's Trainer with `accumulated_step` takes the very steps of a plain loop."""

import copy
import logging
import os

import pytest
import torch
import torch.nn.functional as F
from plain_loop import (
    NORMALIZERS,
    TOLERANCES,
    assert_has_trained,
    assert_same_state,
    micro_batches,
    network,
    train_plainly,
)

import batchless as bl
from batchless.adapters.lightning import accumulated_step

lightning = pytest.importorskip("lightning", reason="needs the extra [lightning]")


pytestmark = [
    # lightning 2.6 uses what torch 2.14 deprecates.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    # The tests are on the CPU also where there is a GPU.
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]

SIZES = (3, 3, 3, 1, 2, 3, 1)


class Module(lightning.LightningModule):
    """The network of the plain loop."""

    def __init__(self, model, *, clip=None, scheduled=False, automatic=False, optimizers=1):
        super().__init__()
        self.automatic_optimization = automatic
        self.model, self.clip, self.scheduled, self.optimizers_count = model, clip, scheduled, optimizers
        self.norms = []

    def training_step(self, batch, batch_idx):
        with accumulated_step(self, clip=self.clip) as step:
            for images, labels in batch:
                loss = F.cross_entropy(self.model(images), labels)
                step.backward(loss, samples=len(images))
        self.log("loss", loss, batch_size=len(images))
        if self.scheduled:
            self.lr_schedulers().step()

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())

    def configure_optimizers(self):
        optimizer, scheduler = sgd(self.model)
        if self.optimizers_count > 1:
            return [torch.optim.SGD([p], lr=0.1) for p in self.model.parameters()][: self.optimizers_count]
        return {"optimizer": optimizer, "lr_scheduler": scheduler} if self.scheduled else optimizer


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def trainer(**settings):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    return lightning.Trainer(**{"max_epochs": 2, "accelerator": "cpu", "devices": 1, **quiet, **settings})


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_equals_the_plain_loop(normalizer, dtype):
    start = network(normalizer, dtype)
    module, plain = Module(copy.deepcopy(start), clip=bl.ClipNorm(0.5)), copy.deepcopy(start)
    loader = bl.batched(micro_batches(SIZES, dtype), 3)
    fit = trainer()
    fit.fit(module, loader)
    train_plainly(plain, sgd(plain)[0], [*loader, *loader], clip=bl.ClipNorm(0.5))
    assert_same_state(module.model.state_dict(), plain.state_dict(), TOLERANCES[dtype])
    assert_has_trained(module.model, start.state_dict())
    assert fit.global_step == 6


def test_hooks_and_schedules_see_each_step():
    start = network("gn+ws")
    module, plain = Module(copy.deepcopy(start), clip=bl.ClipNorm(1e-3), scheduled=True), copy.deepcopy(start)
    loader = bl.batched(micro_batches(SIZES), 3)
    trainer(max_epochs=1).fit(module, loader)
    optimizer, scheduler = sgd(plain)
    for micro_batches_of_step in loader:
        train_plainly(plain, optimizer, [micro_batches_of_step], clip=bl.ClipNorm(1e-3))
        scheduler.step()
    assert_same_state(module.model.state_dict(), plain.state_dict(), 1e-12)
    assert module.norms == pytest.approx([1e-3] * 3, rel=1e-2)  # once a step, of clipped gradients


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision_is_lightnings(precision):
    start = network("bcn-micro+ws", torch.float32)
    module, plain = Module(copy.deepcopy(start)), copy.deepcopy(start)
    loader = bl.batched(micro_batches(SIZES, torch.float32), 3)
    trainer(precision=precision, max_epochs=1).fit(module, loader)

    def half(model, images, labels):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(images), labels)

    def double(model, images, labels):
        return F.cross_entropy(model(images.double()), labels)

    plain = plain if precision == "bf16-mixed" else plain.double()
    train_plainly(plain, sgd(plain)[0], loader, loss=half if precision == "bf16-mixed" else double)
    assert_same_state(module.model.state_dict(), plain.state_dict(), 1e-6 if precision == "bf16-mixed" else 1e-12)


def test_refuses_automatic_optimization():
    with pytest.raises(ValueError, match="has automatic optimization"):
        trainer().fit(Module(network("gn"), automatic=True), bl.batched(micro_batches(SIZES), 3))


def test_refuses_several_optimizers():
    with pytest.raises(ValueError, match="gives 2 optimizers"):
        trainer().fit(Module(network("gn"), optimizers=2), bl.batched(micro_batches(SIZES), 3))


def test_refuses_a_loss_scaler():
    scaling = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="use precision='bf16-mixed'"):
        trainer(plugins=[scaling]).fit(Module(network("gn")), bl.batched(micro_batches(SIZES), 3))


def test_refuses_a_wrapped_model(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # Lightning writes its rendezvous there
    strategy = lightning.pytorch.strategies.DDPStrategy(process_group_backend="gloo")
    try:
        with pytest.raises(ValueError, match="DDPStrategy with 1 processes wraps the model"):
            trainer(strategy=strategy).fit(Module(network("gn", torch.float32)), bl.batched(micro_batches(SIZES), 3))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("setting", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}], ids=str)
def test_lightning_refuses_to_do_the_same_work(setting):
    expected = lightning.pytorch.utilities.exceptions.MisconfigurationException
    with pytest.raises(expected, match="not supported for manual optimization"):
        trainer(**setting).fit(Module(network("gn")), bl.batched(micro_batches(SIZES), 3))
