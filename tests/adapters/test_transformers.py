"""Hugging Face's Trainer with `accumulated_training_step` takes the very steps of a plain loop."""

import copy

import pytest
import torch
from plain_loop import NORMALIZERS, TOLERANCES, assert_has_trained, assert_same_state

import batchless as bl
from batchless.adapters.transformers import accumulated_training_step

transformers = pytest.importorskip("transformers", reason="needs the extra [transformers]")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

IMAGES = 11
"""With 2 images per forward and 3 forwards per step: steps of 2+2+2 and of 2+2+1."""


class ExactTrainer(transformers.Trainer):
    """As a user writes it; also records what it was given."""

    def __init__(self, *args, clip=None, samples=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.own_clip, self.seen, self.losses = clip, [], []
        self.options = {} if samples is None else {"samples": samples}

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append(dict(inputs))
        loss = accumulated_training_step(self, model, inputs, clip=self.own_clip, **self.options)
        self.losses.append(float(loss))
        return loss


def resnet(normalizer, dtype=torch.float64):
    """A tiny ResNet of transformers', made from its configuration."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    return bl.convert(model, normalizer, example=torch.randn(2, 3, 32, 32))[0].to(dtype).train()


def dataset(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]


def arguments(folder, **settings):
    return transformers.TrainingArguments(
        **{
            **{"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True},
            **{"save_strategy": "no", "logging_strategy": "no", "num_train_epochs": 2, "max_grad_norm": 0},
            **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
            **{"learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "optim_args": "momentum=0.9"},
            **settings,
        }
    )


def replay(model, seen, *, clip=None, optimizer=None, samples=None, half=False):
    """The recorded micro-batches by a plain loop; the mean loss of each step."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for micro_batches in bl.batched(seen, 3):
        total, count = 0.0, 0
        with bl.accumulate(model, optimizer, clip=clip) as step:
            for inputs in micro_batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    loss = model(**inputs).loss
                n = samples(inputs) if samples else len(inputs["labels"])
                step.backward(loss, samples=n, images=len(inputs["labels"]))
                total, count = total + float(loss.detach()) * n, count + n
        losses.append(total / count)
    return losses


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_equals_the_plain_loop(normalizer, dtype, tmp_path):
    start = resnet(normalizer, dtype)
    model, plain = copy.deepcopy(start), copy.deepcopy(start)
    trainer = ExactTrainer(model, arguments(tmp_path), train_dataset=dataset(dtype), clip=bl.ClipNorm(0.5))
    trainer.train()
    assert [len(inputs["labels"]) for inputs in trainer.seen] == [2, 2, 2, 2, 2, 1] * 2
    losses = replay(plain, trainer.seen, clip=bl.ClipNorm(0.5))
    assert_same_state(model.state_dict(), plain.state_dict(), TOLERANCES[dtype])
    assert_has_trained(model, start.state_dict())
    assert trainer.state.global_step == 4
    assert [loss for loss in trainer.losses if loss] == pytest.approx(losses, rel=1e-6)


def test_trainers_own_clipping_and_optimizer(tmp_path):
    start = resnet("gn+ws")
    model, plain = copy.deepcopy(start), copy.deepcopy(start)
    settings = arguments(tmp_path, max_grad_norm=0.01, optim="adamw_torch_fused", learning_rate=1e-3, weight_decay=0.0)
    trainer = ExactTrainer(model, settings, train_dataset=dataset())
    trainer.train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    replay(plain, trainer.seen, clip=bl.ClipNorm(0.01), optimizer=optimizer)
    assert_same_state(model.state_dict(), plain.state_dict(), 1e-12)
    assert_has_trained(model, start.state_dict())


def test_half_precision_is_the_trainers(tmp_path):
    start = resnet("bcn-micro+ws", torch.float32)
    model, plain = copy.deepcopy(start), copy.deepcopy(start)
    trainer = ExactTrainer(model, arguments(tmp_path, bf16=True), train_dataset=dataset(torch.float32))
    trainer.train()
    replay(plain, trainer.seen, half=True)
    assert_same_state(model.state_dict(), plain.state_dict(), 1e-6)
    assert_has_trained(model, start.state_dict())


def test_samples_that_are_not_images(tmp_path):
    """With the mean over what `samples` counts, the step weighs by it."""

    def first_class_counts_twice(inputs):
        return len(inputs["labels"]) + (inputs["labels"] == 0).sum()

    model = resnet("gn+ws")
    plain = copy.deepcopy(model)
    trainer = ExactTrainer(model, arguments(tmp_path), train_dataset=dataset(), samples=first_class_counts_twice)
    trainer.train()
    replay(plain, trainer.seen, samples=first_class_counts_twice)
    assert_same_state(model.state_dict(), plain.state_dict(), 1e-12)


def test_micro_batches_of_a_step_that_was_broken_off_are_forgotten(tmp_path):
    class BreakOff(transformers.TrainerCallback):
        substeps = 0

        def on_substep_end(self, args, state, control, **more):
            self.substeps += 1
            control.should_epoch_stop = self.substeps == 3

    model = resnet("gn+ws")
    plain = copy.deepcopy(model)
    trainer = ExactTrainer(model, arguments(tmp_path), train_dataset=dataset(), callbacks=[BreakOff()])
    trainer.train()
    assert len(trainer.seen) == 4 + 6  # the fourth is the broken-off one
    replay(plain, trainer.seen[:3] + trainer.seen[4:])
    assert_same_state(model.state_dict(), plain.state_dict(), 1e-12)


def test_a_failed_step_leaves_nothing_waiting(tmp_path):
    class Failing(ExactTrainer):
        def compute_loss(self, model, inputs, **more):
            raise OSError("no loss")

    model = resnet("gn+ws")
    before = copy.deepcopy(model.state_dict())
    trainer = Failing(model, arguments(tmp_path), train_dataset=dataset())
    with pytest.raises(OSError, match="no loss"):
        trainer.train()
    assert not [name for name in vars(trainer) if "batchless" in name]
    assert_same_state(model.state_dict(), before, 0)


def test_refuses_two_ways_of_clipping(tmp_path):
    trainer = ExactTrainer(
        resnet("gn"), arguments(tmp_path, max_grad_norm=1.0), train_dataset=dataset(), clip=bl.AGC(0.1)
    )
    with pytest.raises(ValueError, match="set max_grad_norm=0"):
        trainer.train()


def test_refuses_a_loss_scaler(tmp_path):
    trainer = ExactTrainer(resnet("gn"), arguments(tmp_path), train_dataset=dataset())
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="use bf16=True"):
        trainer.train()


def test_refuses_several_devices(tmp_path):
    trainer = ExactTrainer(resnet("gn"), arguments(tmp_path), train_dataset=dataset())
    trainer.args._n_gpu = 2  # what it is on a machine with two GPUs and one process
    with pytest.raises(ValueError, match="n_gpu=2"):
        accumulated_training_step(trainer, trainer.model, trainer.train_dataset[0])
