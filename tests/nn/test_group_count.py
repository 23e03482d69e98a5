"""How many groups a layer of any width gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchless.nn import BatchChannelNorm, group_count
from batchless.nn.group_count import values_per_group

WIDTHS = st.integers(1, 3000)


def slow_group_count(channels: int, largest: int, least: int) -> int:
    """By trying every number: a divisor, not above `largest`, at least `least` channels each; else one group."""
    counts = [g for g in range(1, channels + 1) if channels % g == 0 and g <= largest and channels // g >= least]
    return max(counts, default=1)


@given(WIDTHS, st.integers(1, 64), st.integers(1, 8))
def test_equals_trying_every_number(channels, largest, least):
    ours = group_count(channels, largest=largest, min_channels_per_group=least)
    assert ours == slow_group_count(channels, largest, least)


@pytest.mark.parametrize("channels", [64, 128, 256, 512, 1024, 2048])
def test_wide_layers_have_the_papers_32(channels):
    assert group_count(channels) == 32


@pytest.mark.parametrize(
    ("channels", "groups"), [(16, 8), (24, 12), (32, 16), (48, 24), (96, 32), (3, 1), (2, 1), (1, 1)]
)
def test_narrow_layers(channels, groups):
    assert group_count(channels) == groups


@pytest.mark.parametrize("channels", [2, 3, 31, 37, 101, 2003])
def test_a_prime_has_one_group(channels):
    assert group_count(channels) == 1


@given(WIDTHS)
def test_it_is_what_a_layer_uses(channels):
    assert BatchChannelNorm(channels).num_groups == group_count(channels)


@pytest.mark.parametrize("arguments", [(0, 32, 2), (8, 0, 2), (8, 32, 0), (-4, 32, 2)])
def test_numbers_below_one_are_refused(arguments):
    channels, largest, least = arguments
    with pytest.raises(ValueError, match=r"1 or more, got"):
        group_count(channels, largest=largest, min_channels_per_group=least)


def test_values_per_group():
    assert values_per_group(64, 32, 7 * 7) == 2 * 49
