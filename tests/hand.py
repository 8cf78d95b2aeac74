"""A network whose maps can be worked out by hand, for which captum's tests have values; maps and masks of a quarter."""

from collections import OrderedDict

import torch
from torch import nn

WEIGHTS = {
    "conv1.weight": torch.ones(2, 1, 3, 3),
    "conv1.bias": torch.tensor([-50.0, -75.0]),
    "fc1.weight": torch.tensor([1.0, 1, 1, 1, 1, -1, -1, -1]).expand(4, -1),
    "fc1.bias": torch.zeros(4),
}


def one_conv(relu=nn.ReLU):
    """Two channels of 3 x 3 sums, less 50 and 75; four equal logits: five features count +1, three -1."""
    layers = dict(input=nn.Identity(), conv1=nn.Conv2d(1, 2, 3), relu1=relu(), flat=nn.Flatten())
    net = nn.Sequential(OrderedDict(**layers, fc1=nn.Linear(8, 4), relu2=relu()))
    net.load_state_dict(WEIGHTS)
    return net


def quarter():
    """Masks of a quarter of 4 x 4, and maps all in, none in, half in it."""
    masks = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    masks[..., :2, :2] = True
    maps = torch.zeros(3, 1, 4, 4)
    maps[0, 0, :2, :2] = 1
    maps[1, 0, 2:, 2:] = 1
    maps[2, 0, :2, :] = 1
    return maps, masks
