"""Costs by hand."""

import torch
from torch import nn

from sightline.models.costs import costs


def test_costs_of_a_small_network_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(8, 10))
    images = torch.zeros(4, 3, 6, 5)
    wide = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1))
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
