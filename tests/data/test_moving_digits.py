import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchless.data.handwriting import SIZE, digit_instances
from batchless.data.moving_digits import LENGTH, MOTIONS, motion, moving_digits

SHARES = st.floats(0, 1, exclude_max=True)
OPPOSITE = {"left": "right", "up": "down", "clockwise": "counterclockwise"}


def everything(length):
    return range(length)


def on_circle(values, circumference):
    return torch.polar(torch.ones_like(values), values * (2 * math.pi / circumference))


@given(st.sampled_from(sorted(OPPOSITE)), SHARES, SHARES, SHARES, SHARES)
def test_backwards_it_is_a_clip_of_the_opposite_class(name, x, y, angle, speed):
    """So the frames as a set do not tell one from the other."""
    times = torch.arange(LENGTH, dtype=torch.float32)
    label, opposite = MOTIONS.index(name), MOTIONS.index(OPPOSITE[name])
    forward = motion(label, {"x": x, "y": y, "angle": angle, "speed": speed}, times)
    units = {"x": SIZE, "y": SIZE, "angle": 2 * math.pi}
    last = {key: float(track[-1]) / units[key] for key, track in zip(units, forward, strict=True)}
    backward = motion(opposite, {**last, "speed": speed}, times)
    for there, back, circumference in zip(forward, backward, units.values(), strict=True):
        torch.testing.assert_close(
            on_circle(there.flip(0), circumference), on_circle(back.expand(LENGTH), circumference), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("label", range(len(MOTIONS)))
def test_in_every_class_the_digit_of_a_frame_lies_anywhere_at_any_angle(label):
    """Uniform and independent, so that a single frame says nothing: the first Fourier modes vanish, as for no other law."""
    rng, times = np.random.default_rng(0), torch.tensor([0.0, 7.0, 15.0])
    found = []
    for _ in range(1000):
        x, y, angle = motion(label, dict(zip(("x", "y", "angle", "speed"), rng.random(4), strict=True)), times)
        found.append(torch.stack([x / SIZE, y / SIZE, (angle / (2 * math.pi)).expand(3)]) * 2 * math.pi)
    phases = torch.stack(found)
    for modes in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, -1, 0), (1, 0, 1), (2, 0, 0), (0, 2, 0), (0, 0, 2)):
        phase = (phases * torch.tensor(modes, dtype=torch.float32)[:, None]).sum(1)
        mean = torch.polar(torch.ones_like(phase), phase).mean(0).abs()
        assert mean.max() < 4 / math.sqrt(len(phases))


def test_a_clip_is_a_function_of_split_and_index():
    clips, fewer = moving_digits("test"), moving_digits("test", copies=1)
    assert (len(moving_digits("train")), len(clips), len(fewer)) == (2874, 720, 360)
    for index in (0, 100, 359):
        whole = clips.clip(index, everything).images
        assert whole.shape == (LENGTH, 3, SIZE, SIZE)
        assert torch.equal(whole, fewer.clip(index, everything).images)
        assert torch.equal(whole[[3, 9]], clips.clip(index, lambda length: (3, 9)).images)
    assert not torch.equal(clips.clip(0, everything).images, moving_digits("train").clip(0, everything).images)
    with pytest.raises(ValueError, match="copies=0"):
        moving_digits("test", copies=0)


def test_the_splits_share_neither_digits_nor_photos():
    train, test = moving_digits("train"), moving_digits("test")
    assert torch.equal(train.digits, digit_instances("train")[0])
    assert torch.equal(test.digits, digit_instances("test")[0])
    assert not {digit.numpy().tobytes() for digit in train.digits} & {digit.numpy().tobytes() for digit in test.digits}
    assert not torch.equal(train.photos[0], test.photos[0])


def test_the_classes_are_equally_frequent():
    clips = moving_digits("test")
    assert torch.tensor([clips.label(index) for index in range(len(clips))]).bincount().tolist() == [120] * 6


@pytest.mark.parametrize(("name", "axis", "sign"), [("left", 2, -1), ("right", 2, 1), ("up", 1, -1), ("down", 1, 1)])
def test_pixels_move_the_way_the_class_says(name, axis, sign):
    """The best shift from one frame to the next over the torus, where the ground is nearly even."""
    clips = moving_digits("test")
    moved = []
    for index in range(MOTIONS.index(name), 120, len(MOTIONS)):
        a, b = clips.clip(index, lambda length: (0, 4)).images.float().mean(1)
        errors = {shift: float((a.roll(shift, axis - 1) - b).square().mean()) for shift in range(-8, 9)}
        moved.append(min(errors, key=lambda shift: errors[shift]) * sign)
    assert sum(shift > 0 for shift in moved) > 0.7 * len(moved)
