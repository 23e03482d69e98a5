"""The beta of residual branches, predicted from block to block."""

import math

import pytest

import reference
from batchless.nn.branch_scale import branch_betas

NETWORK = [False] * 5 + [True] + [False] * 3


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0])
def test_it_is_what_many_drawn_units_have(alpha):
    found = branch_betas(NETWORK, alpha=alpha)
    assert found == pytest.approx(reference.branch_betas(NETWORK, alpha), rel=5e-3)


def test_a_stage_begins_anew_after_a_transition_block():
    found = branch_betas([True, False, False, False, True, False, False], alpha=0.5)
    assert found[0] == pytest.approx(1, abs=1e-4)
    assert found[1] == found[5] == pytest.approx(math.sqrt(1 + 0.5**2), rel=1e-4)
    assert found[2] == found[6]
    assert found[1] < found[2] < found[3]


def test_small_branches_change_little():
    assert branch_betas([False] * 4, alpha=2e-3) == pytest.approx([1.0] * 4, abs=2e-3)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha must be positive and finite, got"):
        branch_betas([False], alpha=alpha)
