import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sightline import maps

# the published table of inferno: #000004, #bc3754, #fcffa4
LOWEST, MIDDLE, HIGHEST = [0, 0, 4], [188, 55, 84], [252, 255, 164]


def test_colours_at_0_half_and_1():
    rgb = maps.colour(torch.tensor([[0.0, 0.5, 1.0]]))
    assert rgb.dtype == torch.uint8
    assert rgb[:, 0].T.tolist() == [LOWEST, MIDDLE, HIGHEST]


def test_colour_is_matplotlibs_inferno_and_gets_ever_lighter():
    from matplotlib import colormaps

    values = torch.linspace(0, 1, 1001)
    rgb = maps.colour(values[None])[:, 0].T.numpy()
    np.testing.assert_allclose(rgb / 255, colormaps["inferno"](values.numpy())[:, :3], atol=0.5001 / 255)
    lightness = (rgb / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -0.003).all() and lightness[-1] > 0.9


def test_nan_is_grey_and_nothing_else_is():
    assert maps.colour(torch.tensor([[torch.nan]])).flatten().tolist() == [128, 128, 128]
    assert not (maps.colour(torch.linspace(0, 1, 1001)[None])[:, 0] == 128).all(0).any()


@pytest.mark.parametrize("bad", [-0.01, 1.01, torch.inf])
def test_colour_refuses_what_is_not_normalised(bad: float):
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\].*maps.normalise"):
        maps.colour(torch.tensor([[0.5, bad]]))


def test_resize_by_hand():
    enlarged = maps.resize(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), (4, 4))
    rows = torch.tensor([0.0, 0.5, 1.5, 2.0])
    columns = torch.tensor([0.0, 0.25, 0.75, 1.0])
    torch.testing.assert_close(enlarged[0, 0], rows[:, None] + columns)


def test_resize_averages_where_it_shrinks():
    stripes = torch.tensor([0.0, 1.0]).repeat(1, 1, 64, 32)
    torch.testing.assert_close(maps.resize(stripes, (8, 8)), torch.full((1, 1, 8, 8), 0.5), atol=0.02, rtol=0)


def test_resize_keeps_sign_size_and_gradient():
    raw = torch.tensor([[[[-5.0, 3.0]], [[0.0, 9.0]]]], requires_grad=True)
    same = maps.resize(raw, (1, 2))
    assert torch.equal(same, raw)
    same.sum().backward()
    assert raw.grad is not None and torch.equal(raw.grad, torch.ones_like(raw))


def test_resize_to_nothing():
    with pytest.raises(ValueError, match="at least 1 x 1 pixels, got 0 x 5"):
        maps.resize(torch.zeros(1, 1, 2, 2), (0, 5))


def test_normalise_by_hand():
    raw = torch.tensor([[[[-2.0, 0.0, 2.0]], [[5.0, 5.0, 5.0]]], [[[0.0, 1e30, 2e30]], [[-3e38, 0.0, 3e38]]]])
    expected = torch.tensor([[[[0.0, 0.5, 1.0]], [[0.0, 0.0, 0.0]]], [[[0.0, 0.5, 1.0]], [[0.0, 0.5, 1.0]]]])
    assert torch.equal(maps.normalise(raw), expected)


def test_normalise_of_non_finite_values():
    assert str(maps.normalise(torch.tensor([[1.0, torch.inf, 3.0, torch.nan]])).tolist()) == "[[0.0, nan, 1.0, nan]]"
    assert maps.normalise(torch.full((2, 2), torch.nan)).isnan().all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=20))
def test_normalise_keeps_the_order(values: list[float]):
    raw = torch.tensor([values])
    out = maps.normalise(raw)
    assert out.min() >= 0 and out.max() <= 1
    order = raw[0].argsort(stable=True)
    assert (out[0, order].diff() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_normalise_keeps_the_type(dtype: torch.dtype):
    assert maps.normalise(torch.arange(4, dtype=dtype).view(2, 2)).dtype == dtype


def test_overlay_at_0_half_and_1():
    images = torch.tensor([100, 150, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 1, 2)
    raw = torch.tensor([[[[-7.0, 3.0]]]])
    assert torch.equal(maps.overlay(images, raw, 0.0)[:, 0], images)
    assert maps.overlay(images, raw, 1.0)[0, 0, :, 0].T.tolist() == [LOWEST, HIGHEST]
    assert maps.overlay(images, raw, 0.5)[0, 0, :, 0].T.tolist() == [[50, 75, 102], [176, 202, 182]]


def test_overlay_neither_wraps_nor_mixes_images_and_targets():
    images = torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), 255)]).to(torch.uint8)
    raw = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    before = raw.clone()
    out = maps.overlay(images, raw, 0.5)
    assert out.shape == (2, 3, 3, 2, 2)
    assert (out[0] <= 128).all() and (out[1] >= 127).all()
    assert torch.equal(out[1, 2], maps.overlay(images[1:], raw[1:, 2:], 0.5)[0, 0])
    assert torch.equal(raw, before)


@pytest.mark.parametrize("opacity", [-0.1, 1.5, float("nan")])
def test_overlay_refuses_an_opacity_outside_0_to_1(opacity: float):
    with pytest.raises(ValueError, match="opacity from 0 to 1, got"):
        maps.overlay(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 1, 2, 2), opacity)


def test_colour_bar_runs_from_left_to_right():
    bar = maps.colour_bar(4, 257)
    assert bar.shape == (3, 4, 257)
    assert bar[:, 0, 0].tolist() == LOWEST and bar[:, 3, 128].tolist() == MIDDLE and bar[:, 0, -1].tolist() == HIGHEST


def test_png_reads_back_pixel_by_pixel():
    image = torch.arange(2 * 3 * 3, dtype=torch.uint8).view(3, 2, 3) * 13
    with Image.open(io.BytesIO(maps.png(image))) as file:
        assert file.mode == "RGB" and np.array_equal(np.asarray(file), image.movedim(0, -1))
