"""torch.compile traces our models whole, and a compiled model is explained like the plain one.

Run in a process without the shape checker, whose wrappers torch.compile cannot trace: `make test` does.
"""

import pytest
import torch

import sightline as sl

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("name", sorted(sl.models.MODELS))
def test_models_compile_without_a_break(name: str) -> None:
    torch.compiler.reset()
    model = sl.create_model(name, width=1 / 16).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-6)


def test_a_compiled_model_is_explained_like_the_plain_one() -> None:
    torch.compiler.reset()
    model = sl.create_model("vgg_att2", width=1 / 16).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    methods = ["attention", "grad_cam", "activation_map"]
    plain = sl.explain(model, images, methods=methods)
    compiled = sl.explain(torch.compile(model, backend="aot_eager"), images, methods=methods)
    assert compiled.layers == plain.layers
    for method in methods:
        torch.testing.assert_close(
            compiled[method], plain[method], rtol=0, atol=1e-5 * float(plain[method].abs().max())
        )
