"""torch.compile and torch.export give the same logits. Runs without the shape checker, which they cannot trace."""

import pytest
import torch

from sightline.models import create_model

pytestmark = pytest.mark.compile
CASES = [
    ("vgg15", {}),
    ("vgg_gap", {}),
    ("vgg_pan", {}),
    ("vgg_att3", {}),
    ("vgg_att3", {"compat": "dp", "norm": "sigmoid", "project": "l", "head": "indep", "read": "after"}),
    ("vgg_att2", {"compat": "none", "average_branch_grads": True}),
]


def build(name, options):
    torch.manual_seed(0)
    return create_model(name, width=1 / 16, stem_pool=2, **options).eval(), torch.randn(2, 3, 40, 40)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_compile(name, options):
    model, images = build(name, options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wanted, got = model(images), compiled(images)
    torch.testing.assert_close(got, wanted)
    gradients = [
        torch.autograd.grad(logits.square().sum(), model.features.conv1[0].weight)[0] for logits in (wanted, got)
    ]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_export(name, options):
    model, images = build(name, options)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
    five = torch.randn(5, 3, 40, 40)
    torch.testing.assert_close(exported(five), model(five))
