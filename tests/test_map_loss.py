"""The loss on maps: values by hand, gradients against finite differences, one step of a training, what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sightline import data, runs
from sightline.attention import HardAttention, SpatialGate
from sightline.metrics import energy_in_mask
from sightline.recipe import Augment, Data, Optim, Recipe
from sightline.training import checks, fit
from sightline.training.map_loss import MapLoss, share_outside

pytestmark = pytest.mark.usefixtures("few_validation_images")
CLUTTER = Data(source="clutter-shortcut", mask="digit", size=24, train_size=40, test_size=20)


def network(classes: int) -> nn.Module:
    return nn.Sequential(
        *(
            nn.Conv2d(3, 6, 3, 2, 1),
            nn.BatchNorm2d(6),
            nn.Tanh(),
            SpatialGate(6),
            nn.Conv2d(6, 5, 3, 2, 1),
            nn.Softplus(),
        ),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, classes)),
    )


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(3, 1, 12, 12, dtype=torch.bool)
    masks[:, :, 2:7, 3:9] = True
    images = torch.rand(3, 3, 12, 12, generator=generator, dtype=torch.float64)
    return images, torch.tensor([0, 3, 1]), masks


def test_right_reasons_by_hand():
    """Logits W x: the gradient of the sum of log p is W^T (1 - K p)."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4, bias=False))
    model[1].weight.data = weight
    x = torch.tensor([0.1, -0.2, 0.3, 0.4, 0.0, -0.5])  # two pixels of three colors
    gradient = weight.T @ (1 - 4 * (weight @ x).softmax(0))
    masks = torch.tensor([[[[True, False]]]])
    loss, logits = MapLoss("saliency")(model, x.view(1, 3, 1, 2), torch.tensor([0]), masks)
    torch.testing.assert_close(loss, gradient[1::2].square().sum())
    torch.testing.assert_close(logits, (weight @ x)[None])


def test_the_share_outside_is_what_the_energy_in_the_mask_lacks():
    values = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    masks = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(2)) > 0.6
    torch.testing.assert_close(share_outside(values, masks), 1 - energy_in_mask(values, masks))
    empty = -values.abs().requires_grad_()
    share_outside(empty, masks).sum().backward()
    assert not share_outside(empty, masks).any()


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "attention"])
def test_the_share_is_that_of_the_label_s_map(method: str):
    from sightline import explain

    images, labels, masks = batch()
    model = network(4).double()
    loss, logits = MapLoss(method)(model, images, labels, masks)
    explanation = explain(model, images, labels, [method])
    torch.testing.assert_close(loss, (1 - energy_in_mask(explanation[method], masks).nan_to_num(1)).mean())
    torch.testing.assert_close(logits, explanation.logits)


@pytest.mark.parametrize("method", ["saliency", "grad_cam", "hires_cam", "layer_cam", "input_x_gradient", "attention"])
def test_gradients_at_the_weights_are_those_of_finite_differences(method: str):
    torch.manual_seed(0)
    images, labels, masks = batch()
    model, loss = network(4).double(), MapLoss(method)
    model[1].running_mean.uniform_(-0.2, 0.2)
    loss(model, images, labels, masks)[0].backward()
    weights = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert len(weights) >= 4
    ways = [torch.randn_like(weight) for weight in weights]
    slope = sum(float((weight.grad * way).sum()) for weight, way in zip(weights, ways, strict=True))
    ends: list[float] = []
    for step in (1e-6, -2e-6):
        for weight, way in zip(weights, ways, strict=True):
            weight.data += step * way
        ends.append(float(loss(model, images, labels, masks)[0].detach()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4) and abs(slope) > 1e-6


def test_images_without_a_mask_do_not_count():
    images, labels, masks = batch()
    model = network(4).double()
    for method in ("saliency", "grad_cam"):
        alone = MapLoss(method)(model, images[:2], labels[:2], masks[:2])[0]
        masks[2] = False
        torch.testing.assert_close(MapLoss(method)(model, images, labels, masks)[0], alone)
        assert not MapLoss(method)(model, images, labels, torch.zeros_like(masks))[0].any()


@pytest.mark.parametrize("method", ["saliency", "grad_cam"])
def test_a_step_is_that_of_plain_pytorch(method: str, tmp_path: Path):
    """Two steps against a bare loop: the mean of both modes' cross entropy, and the loss on maps."""
    optim = Optim(
        epochs=1, batch_size=20, lr=0.01, optimizer="sgd", schedule="constant", map_loss=method, map_weight=0.5
    )
    asked = Recipe(data=CLUTTER, augment=Augment(crop=2), optim=optim)
    run = fit(network, asked, tmp_path / "run", progress=False)
    assert isinstance(run, runs.Run)
    images = data.load(CLUTTER)["train"]
    torch.manual_seed(0)
    model = network(10).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
    losses: list[float] = []
    for part in data.batches(images, 20, shuffle=(0, 0), augment=(asked.augment, 0, 0), drop_last=True):
        x = data.normalize(part.images, images.preprocess)
        loss = nn.functional.cross_entropy(model(x), part.labels)
        outside, logits = MapLoss(method)(model, x, part.labels, part.masks)
        loss = (loss + nn.functional.cross_entropy(logits, part.labels)) / 2 + 0.5 * outside
        assert outside > 0 and model.training
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert run.history[0]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    trained = runs.load_model(run.folder, model=network).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"map_loss": "gradcam"},
            "optim.map_loss: expected the name of an explainer, got 'gradcam'; did you mean 'grad_cam'",
        ),
        ({"map_loss": "rise"}, "optim.map_loss: rise runs the network on many changed images; take saliency"),
        ({"map_loss": "edge_map"}, "optim.map_loss: edge_map does not look at the network; take saliency"),
        ({"map_loss": "lrp"}, "optim.map_loss: lrp cannot be trained: "),
        ({"map_loss": "cam"}, "optim.map_loss: cam cannot be trained: expected global average pooling"),
        (
            {"map_loss": "grad_cam", "map_layer": "9"},
            "optim.map_loss: grad_cam cannot be trained: expected the name of a l",
        ),
        ({"map_loss": "saliency", "map_layer": "4"}, "optim.map_layer: saliency is read at the pixels; leave it out"),
        ({"map_layer": "4"}, "optim.map_layer: expected a method as optim.map_loss, got none; name one"),
    ],
)
def test_what_cannot_stand_in_a_loss_is_refused_before_training(changes: dict[str, Any], message: str, tmp_path: Path):
    asked = Recipe(data=CLUTTER, optim=replace(Optim(epochs=1), **changes))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):  # in one line
        fit(network, asked, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_images_without_masks_and_other_settings_are_refused():
    images = data.load(CLUTTER)["train"]
    asked = Recipe(data=CLUTTER, optim=Optim(map_loss="grad_cam"))
    checks.check_map_loss(network(10), asked, images)
    with pytest.raises(
        ValueError, match="training images with masks or boxes, got clutter-shortcut without; name their"
    ):
        checks.check_map_loss(network(10), asked, images.unmarked())
    with pytest.raises(ValueError, match=r"augment.mixup: cannot be combined with optim.map_loss"):
        checks.check_map_loss(network(10), replace(asked, augment=Augment(mixup=0.2)), images)
    with pytest.raises(ValueError, match="cannot be combined with HardAttention, which has a loss of its own"):
        checks.check_map_loss(nn.Sequential(HardAttention(3), nn.Linear(3, 10)), asked, images)
