"""Costs by hand."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from sightline.models.costs import _median_interval, costs


def test_costs_of_a_small_network_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(8, 10))
    images = torch.zeros(4, 3, 6, 5)
    wide = nn.Sequential(nn.Conv2d(3, 512, 3, padding=1), nn.Conv2d(512, 512, 3, padding=1))
    model.train()
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    found = costs({"small": model, "wide": wide}, images, rounds=3)
    small = found["small"]
    assert small.parameters == 3 * 8 * 9 + 8 * 10 + 10
    assert small.macs == 6 * 5 * 3 * 8 * 9 + 8 * 10
    # for the backward pass: the images, the result of the ReLU, the flattened means
    assert small.saved == 4 * (4 * 3 * 30 + 4 * 8 * 30 + 4 * 8)
    assert found["wide"].seconds > small.seconds > 0
    assert model.training and all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())
    assert small.ratio == (1.0, -math.inf, math.inf)  # three rounds limit nothing


def test_a_time_has_its_interval():
    # of 9 values the median lies between the second and the eighth with 1 - 2 (1 + 9) / 512 = 0.961
    assert _median_interval([9.0, 1.0, 5.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0]) == (5.0, 2.0, 8.0)
    assert _median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, -math.inf, math.inf)
    held = 0
    for seed in range(400):
        values = torch.randn(21, generator=torch.Generator().manual_seed(seed)).tolist()
        middle, low, high = _median_interval(values)
        assert low <= middle <= high
        held += low <= NormalDist().mean <= high
    assert held / 400 == pytest.approx(0.973, abs=0.025)  # exactly 1 - 2 P(Binomial(21, 1/2) <= 5)
