"""A compiled model is explained like the plain one; without the shape checker, which torch.compile cannot trace."""

import pytest
import torch

import sightline as sl


@pytest.mark.compile
def test_a_compiled_model_is_explained_like_the_plain_one() -> None:
    model = sl.create_model("vgg_att2", width=1 / 16).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    methods = ["attention", "grad_cam", "activation_map"]
    plain = sl.explain(model, images, methods=methods)
    compiled = sl.explain(torch.compile(model, backend="aot_eager"), images, methods=methods)
    assert compiled.layers == plain.layers
    for method in methods:
        error = (compiled[method] - plain[method]).abs().max()
        assert error <= 1e-5 * plain[method].abs().max()
