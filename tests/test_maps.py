import io
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from tests.reference import maps as reference

import sightline as sl
from sightline import maps

# the published table of inferno: #000004, #bc3754, #fcffa4
LOWEST, MIDDLE, HIGHEST = [0, 0, 4], [188, 55, 84], [252, 255, 164]
# the ends of ColorBrewer's RdBu: #053061, #67001f
BLUE, RED = [5, 48, 97], [103, 0, 31]


def test_colors_at_0_half_and_1():
    rgb = maps.color(torch.tensor([[0.0, 0.5, 1.0]]))
    assert rgb.dtype == torch.uint8
    assert rgb[:, 0].T.tolist() == [LOWEST, MIDDLE, HIGHEST]


def test_color_is_matplotlibs_inferno_and_gets_ever_lighter():
    from matplotlib import colormaps

    values = torch.linspace(0, 1, 1001)
    rgb = maps.color(values[None])[:, 0].T.numpy()
    np.testing.assert_allclose(rgb / 255, colormaps["inferno"](values.numpy())[:, :3], atol=0.5001 / 255)
    lightness = (rgb / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -0.003).all() and lightness[-1] > 0.9


def test_nan_is_gray_and_nothing_else_is():
    assert maps.color(torch.tensor([[torch.nan]])).flatten().tolist() == [128, 128, 128]
    assert not (maps.color(torch.linspace(0, 1, 1001)[None])[:, 0] == 128).all(0).any()


@pytest.mark.parametrize("bad", [-0.01, 1.01, torch.inf])
def test_color_refuses_what_is_not_normalized(bad: float):
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\].*maps.normalize"):
        maps.color(torch.tensor([[0.5, bad]]))


def test_resize_by_hand():
    enlarged = maps.resize(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), (4, 4))
    rows = torch.tensor([0.0, 0.5, 1.5, 2.0])
    columns = torch.tensor([0.0, 0.25, 0.75, 1.0])
    torch.testing.assert_close(enlarged[0, 0], rows[:, None] + columns)


def test_resize_averages_where_it_shrinks():
    stripes = torch.tensor([0.0, 0, 0, 1, 1, 0, 0, 0]).repeat(1, 1, 64, 8)  # taken at the centers it would be 1
    for shrunk in (maps.resize(stripes, (8, 8))[..., 1:-1], maps.resize(stripes.mT, (8, 8))[..., 1:-1, :]):
        torch.testing.assert_close(shrunk, torch.full_like(shrunk, 0.25))


def test_resize_keeps_sign_size_and_gradient():
    raw = torch.tensor([[[[-5.0, 3.0]], [[0.0, 9.0]]]], requires_grad=True)
    same = maps.resize(raw, (1, 2))
    assert torch.equal(same, raw)
    same.sum().backward()
    assert raw.grad is not None and torch.equal(raw.grad, torch.ones_like(raw))


def test_resize_to_nothing():
    with pytest.raises(ValueError, match="at least 1 x 1 pixels, got 0 x 5"):
        maps.resize(torch.zeros(1, 1, 2, 2), (0, 5))
    with pytest.raises(ValueError, match=r"at least 1 x 1 x 1 pixels, got 3 x 0 x 5; give \(depth, height, width\)"):
        maps.resize(torch.zeros(1, 1, 2, 2, 2), (3, 0, 5))


@pytest.mark.parametrize(("shape", "size"), [((1, 1, 2, 2), (2, 2, 2)), ((1, 1, 2, 2, 2), (4, 4)), ((1, 1, 2), (4,))])
def test_resize_needs_one_side_per_axis(unchecked: None, shape: tuple[int, ...], size: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"one side for each axis of the map.*, got \(.*\) for maps of shape"):
        maps.resize(torch.zeros(shape), size)


def test_resize_in_an_unknown_mode(unchecked: None):
    with pytest.raises(ValueError, match="expected mode to be one of bilinear, nearest; got 'bicubic'"):
        maps.resize(torch.zeros(1, 1, 2, 2), (4, 4), mode="bicubic")  # type: ignore[arg-type]


def along_each_axis(values: torch.Tensor, size: tuple[int, ...], at) -> torch.Tensor:
    """Values (b, t, *grid) at another size, one axis after the other by a function of lists."""
    resized = values.numpy()
    for axis, side in enumerate(size, start=2):
        resized = np.apply_along_axis(lambda line, n=side: np.array(at(line.tolist(), n)), axis, resized)
    return torch.from_numpy(resized)


@pytest.mark.parametrize("size", [(5, 9), (3, 4), (7, 4), (4, 5, 9), (2, 3, 4), (2, 8, 4), (5, 3, 4)])
def test_resize_enlarges_like_the_reference(size: tuple[int, ...]):
    raw = torch.randn(2, 3, *(2, 3, 4)[-len(size) :], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        maps.resize(raw, size), along_each_axis(raw, size, reference.linear_at), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("size", [(5, 9), (3, 4), (1, 3), (4, 5, 9), (1, 2, 3), (5, 1, 8)])
def test_nearest_like_the_reference(size: tuple[int, ...]):
    raw = torch.randn(2, 3, *(2, 3, 4)[-len(size) :], generator=torch.Generator().manual_seed(0))
    assert torch.equal(maps.resize(raw, size, mode="nearest"), along_each_axis(raw, size, reference.nearest_at))


def test_trilinear_is_torchs():
    raw = torch.randn(2, 3, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(raw, size=(9, 5, 7), mode="trilinear", align_corners=False)
    torch.testing.assert_close(maps.resize(raw, (9, 5, 7)), expected)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_resize_in_3d_averages_where_it_shrinks(axis: int):
    stripes = torch.tensor([0.0, 0, 0, 1, 1, 0, 0, 0]).repeat(1, 1, 4, 4, 8).transpose(axis, 4)
    shrunk = maps.resize(stripes, tuple(8 if i == axis else 4 for i in (2, 3, 4))).narrow(axis, 1, 6)
    torch.testing.assert_close(shrunk, torch.full_like(shrunk, 0.25))


def test_normalize_by_hand():
    raw = torch.tensor([[[[-2.0, 0.0, 2.0]], [[5.0, 5.0, 5.0]]], [[[0.0, 1e30, 2e30]], [[-3e38, 0.0, 3e38]]]])
    expected = torch.tensor([[[[0.0, 0.5, 1.0]], [[0.0, 0.0, 0.0]]], [[[0.0, 0.5, 1.0]], [[0.0, 0.5, 1.0]]]])
    assert torch.equal(maps.normalize(raw), expected)


def test_normalize_of_non_finite_values():
    assert str(maps.normalize(torch.tensor([[1.0, torch.inf, 3.0, torch.nan]])).tolist()) == "[[0.0, nan, 1.0, nan]]"
    assert maps.normalize(torch.full((2, 2), torch.nan)).isnan().all()


def test_normalize_signed_by_hand():
    raw = torch.tensor([[[-4.0, 0.0, 2.0]], [[1.0, 0.0, 4.0]], [[0.0, 0.0, 0.0]], [[-3e38, 1.5e38, 3e38]]])
    expected = torch.tensor([[[-1.0, 0.0, 0.5]], [[0.25, 0.0, 1.0]], [[0.0, 0.0, 0.0]], [[-1.0, 0.5, 1.0]]])
    assert torch.equal(maps.normalize(raw, signed=True), expected)
    broken = maps.normalize(torch.tensor([[1.0, -torch.inf, -2.0, torch.nan]]), signed=True)
    assert str(broken.tolist()) == "[[0.5, nan, -1.0, nan]]"


def test_signed_colors():
    from matplotlib import colormaps

    values = torch.linspace(-1, 1, 1001)
    rgb = maps.color(values[None], signed=True)[:, 0].T
    np.testing.assert_allclose(rgb / 255, colormaps["RdBu_r"]((values.numpy() + 1) / 2)[:, :3], atol=0.5001 / 255)
    assert rgb[0].tolist() == BLUE and rgb[-1].tolist() == RED
    assert rgb[500].min() >= 245  # 0 is white
    assert not (rgb == 128).all(1).any()
    assert maps.color(torch.tensor([[torch.nan]]), signed=True).flatten().tolist() == [128, 128, 128]


@pytest.mark.parametrize("bad", [-1.01, 1.01])
def test_signed_color_refuses_what_is_not_normalized(bad: float):
    with pytest.raises(ValueError, match=r"expected values in \[-1, 1\].*normalize\(\.\.\., signed=True\) first"):
        maps.color(torch.tensor([[0.5, bad]]), signed=True)


def test_signed_overlay_shows_0_as_white_whatever_the_range():
    black = torch.zeros(2, 3, 1, 3, dtype=torch.uint8)
    raw = torch.tensor([[[[-7.0, 0.0, 3.5]]], [[[-1.0, 0.0, 7.0]]]])
    out = maps.overlay(black, raw, 1.0, signed=True)[:, 0]
    assert out[0, :, 0, 0].tolist() == BLUE and out[1, :, 0, 2].tolist() == RED
    assert (out[:, :, 0, 1] >= 245).all()
    assert torch.equal(maps.overlay(black, raw, 0.5, signed=True)[0, 0, :, 0, 0], torch.tensor([2, 24, 48]).byte())


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=20))
def test_normalize_keeps_the_order(values: list[float]):
    raw = torch.tensor([values])
    out = maps.normalize(raw)
    assert out.min() >= 0 and out.max() <= 1
    order = raw[0].argsort(stable=True)
    assert (out[0, order].diff() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_normalize_keeps_the_type(dtype: torch.dtype):
    assert maps.normalize(torch.arange(4, dtype=dtype).view(2, 2)).dtype == dtype


def test_overlay_at_0_half_and_1():
    images = torch.tensor([100, 150, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 1, 2)
    raw = torch.tensor([[[[-7.0, 3.0]]]])
    gray = 0.299 * 100 + 0.587 * 150 + 0.114 * 200
    assert (maps.overlay(images, raw, 0.0) == round(gray)).all()
    assert maps.overlay(images, raw, 1.0)[0, 0, :, 0].T.tolist() == [LOWEST, HIGHEST]
    expected = [[round((gray + channel) / 2) for channel in color] for color in (LOWEST, HIGHEST)]
    assert maps.overlay(images, raw, 0.5)[0, 0, :, 0].T.tolist() == expected


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


@pytest.mark.parametrize("signed", [False, True])
def test_a_few_extreme_pixels_do_not_take_all_the_colors(signed: bool):
    black = torch.zeros(1, 3, 10, 30, dtype=torch.uint8)
    raw = torch.linspace(-0.5 if signed else 0, 1, 300).view(1, 1, 10, 30)
    extreme = raw.clone()
    extreme[0, 0, -1, -3:] = torch.tensor([2.0, 3.0, 8.0])  # 1 % of the pixels
    drawn = maps.overlay(black, extreme, 1.0, signed)[0, 0]
    assert drawn[:, -1, -4:].T.tolist() == [RED if signed else HIGHEST] * 4
    expected = maps.color((raw / raw[0, 0, -1, -4]).clamp(max=1), signed)[0, 0]  # the next is the end of the scale
    assert torch.equal(drawn, expected)
    few = extreme[..., -9:, -10:]  # of 90 none is left out
    assert maps.overlay(black[..., :9, :10], few, 1.0)[0, 0, :, 0, 0].tolist() == LOWEST
    assert (
        maps.overlay(black[..., :9, :10], few, 1.0)[0, 0, :, -1, -2].tolist()
        == maps.color(maps.normalize(few)[0, 0, -1:, -2:-1]).flatten().tolist()
    )


def test_what_is_almost_zero_is_not_brightened_more_than_tenfold():
    black = torch.zeros(1, 3, 20, 20, dtype=torch.uint8)
    raw = 1e-9 * torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    raw[0, 0, 3, 4] = 1
    drawn = maps.overlay(black, raw, 1.0)[0, 0]
    assert drawn[:, 3, 4].tolist() == HIGHEST and (drawn.flatten(1).T == torch.tensor(LOWEST)).all(1).sum() == 399
    raw[0, 0, 5, 5] = 0.05
    half = maps.overlay(black, raw, 1.0)[0, 0, :, 5, 5]
    assert (half.int() - torch.tensor(MIDDLE)).abs().max() <= 2


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("signed", [False, True])
def test_a_value_that_is_not_finite_is_gray_and_leaves_the_rest_alone(value: float, signed: bool):
    black = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    raw = torch.linspace(0.5, 1, 400).view(1, 1, 20, 20).clone()
    whole = maps.overlay(black, raw, 1.0, signed)[0, 0]
    raw[0, 0, 0, 0] = value
    drawn = maps.overlay(black, raw, 1.0, signed)[0, 0]
    assert (drawn[:, :2, :2] == 128).all() and not (drawn[:, 3:] == 128).all(0).any()
    assert (drawn[:, 3:].int() - whole[:, 3:].int()).abs().max() <= 8  # 1 % of 399 is 3, of 400 it is 4
    assert (maps.overlay(black, torch.full_like(raw, value), 1.0, signed) == 128).all()


RGB = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
MAPS = torch.zeros(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: maps.overlay(RGB / 255, MAPS), TypeError, "images as bytes, torch.uint8 from 0 to 255, got torch.fl"),
        (lambda: maps.side_by_side(RGB / 255, {}), TypeError, r"\(255 \* images\).round\(\).byte\(\)"),
        (lambda: maps.overlay(RGB.numpy(), MAPS), TypeError, "got ndarray; torch.from_numpy makes one of an array"),
        (lambda: maps.overlay(RGB, MAPS.numpy()), TypeError, r"expected maps as a tensor \(b, t, h, w\), got ndarray"),
        (lambda: maps.overlay(RGB.movedim(1, -1), MAPS), ValueError, r"move the channels: .movedim\(-1, -3\)"),
        (lambda: maps.overlay(RGB[:, :1], MAPS), ValueError, r"got \(2, 1, 8, 8\); give red, green and blue"),
        (lambda: maps.overlay(RGB[0], MAPS), ValueError, r"images of shape \(b, 3, h, w\), got \(3, 8, 8\)"),
        (lambda: maps.overlay(RGB, MAPS[:, 0]), ValueError, r"maps of shape \(b, t, h, w\), got \(2, 4, 4\)"),
        (lambda: maps.overlay(RGB, MAPS[:1]), ValueError, "as many maps as images, got 1 and 2"),
        (lambda: maps.png(RGB), ValueError, r"one image of shape \(3, h, w\), got \(2, 3, 8, 8\)"),
        (lambda: maps.png(RGB[0] / 255), TypeError, "one image as bytes, torch.uint8"),
        (lambda: maps.boxes(MAPS.numpy()), TypeError, "expected maps as a tensor"),
        (lambda: maps.boxes(MAPS[0]), ValueError, r"maps of shape \(b, t, h, w\), got \(1, 4, 4\)"),
        (lambda: maps.resize(MAPS.numpy(), (8, 8)), TypeError, "expected maps as a tensor"),
        (lambda: maps.resize(MAPS, 224), ValueError, r"got 224 for maps of shape .*; give \(height, width\)"),
        (lambda: maps.side_by_side(RGB, {"x": MAPS}, signed=["y"]), ValueError, "signed columns out of x; got 'y'"),
        (lambda: maps.side_by_side(RGB, {"x": MAPS.numpy()}), TypeError, "expected column 'x' as a tensor"),
    ],
)
def test_what_is_no_picture_or_map_is_one_line(unchecked: None, call, error: type[Exception], message: str):
    with pytest.raises(error, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_color_bar_runs_from_left_to_right():
    bar = maps.color_bar(4, 257)
    assert bar.shape == (3, 4, 257)
    assert bar[:, 0, 0].tolist() == LOWEST and bar[:, 3, 128].tolist() == MIDDLE and bar[:, 0, -1].tolist() == HIGHEST


def test_signed_color_bar_runs_from_blue_through_white_to_red():
    bar = maps.color_bar(2, 257, signed=True)
    assert bar[:, 0, 0].tolist() == BLUE and bar[:, 1, -1].tolist() == RED and bar[:, 0, 128].min() >= 245


def spiral(side: int) -> torch.Tensor:
    """One path of ones, one cell wide, from the corner to the middle; zeros between its turns."""
    grid = torch.zeros(side, side)
    y, x, steps = 0, 0, [(0, 1), (1, 0), (0, -1), (-1, 0)]
    lengths = [side - 1] * 3 + [n for n in range(side - 3, 1, -2) for _ in range(2)]
    grid[0, 0] = 1
    for turn, length in enumerate(lengths):
        dy, dx = steps[turn % 4]
        for _ in range(length):
            y, x = y + dy, x + dx
            grid[y, x] = 1
    return grid


def snake(side: int) -> torch.Tensor:
    """Rows joined alternately at their right and left ends."""
    grid = torch.zeros(side, side)
    grid[::2] = 1
    grid[1::4, -1] = 1
    grid[3::4, 0] = 1
    return grid


@pytest.mark.parametrize("shape", [spiral(33), spiral(33).flip(0), spiral(33).T, snake(34), snake(34).T])
def test_box_of_a_long_component(shape: torch.Tensor):
    from scipy.ndimage import label

    assert label(shape.numpy(), np.ones((3, 3)))[1] == 1, "one component"
    ys, xs = shape.nonzero().T
    expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert maps.boxes(shape[None, None])[0, 0].tolist() == [int(side) for side in expected]
    cut = shape.clone()
    cut[:4] = 0  # several components now
    labels, n = label(cut.numpy(), np.ones((3, 3)))
    largest = 1 + int(np.argmax([(labels == i + 1).sum() for i in range(n)]))
    ys, xs = np.nonzero(labels == largest)
    assert maps.boxes(cut[None, None])[0, 0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.41, 0.5])
def test_boxes_of_many_components_like_the_reference(share: float):
    inside = torch.rand(3, 1, 40, 57, generator=torch.Generator().manual_seed(0)) < share
    expected = [[reference.box(one.tolist(), 0.5) for one in image] for image in inside.float()]
    assert maps.boxes(inside.float(), 0.5).tolist() == expected


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_boxes_like_the_reference(threshold: float):
    generator = torch.Generator().manual_seed(0)
    # few levels, so that sizes and peaks are often equal; sparse maps, so that there are components
    raw = torch.randint(-3, 5, (6, 5, 7, 9), generator=generator).float()
    raw *= torch.rand(raw.shape, generator=generator) < 0.5
    raw[0, 0, 3, 4], raw[1, 1], raw[2, 2] = torch.nan, -1.0, 2.0
    expected = [[reference.box(one.tolist(), threshold) for one in image] for image in raw]
    assert maps.boxes(raw, threshold).tolist() == expected


def test_boxes_by_hand():
    raw = torch.tensor([[10.0, 0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 2.0, 1.9], [0.0, -9.0, 1.0, 0.0, 0.0]])[None, None]
    assert maps.boxes(raw).tolist() == [[[3, 0, 5, 2]]], "2.0 is in (>=), 1.9 is out, the largest is not the highest"
    assert maps.boxes(raw, 0.1).tolist() == [[[2, 0, 5, 3]]], "corners touch"
    assert maps.boxes(raw, 0.15).tolist() == [[[3, 0, 5, 2]]]
    assert maps.boxes(raw, 1.0).tolist() == [[[0, 0, 1, 1]]]
    assert maps.boxes(raw, 0.0).tolist() == [[[0, 0, 5, 3]]]
    negative = torch.tensor([[[[-1.0, 2.0, -1.0]]]])
    assert maps.boxes(negative, 0.0).tolist() == [[[0, 0, 3, 1]]], "a negative value counts as 0"


def test_equally_large_components():
    lower, higher = torch.tensor([[[[2.0, 0.0, 3.0]]]]), torch.tensor([[[[3.0, 0.0, 3.0]]]])
    assert maps.boxes(lower, 0.5).tolist() == [[[2, 0, 3, 1]]], "the higher peak"
    assert maps.boxes(higher, 0.5).tolist() == [[[0, 0, 1, 1]]], "then the first in reading order"


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_a_map_that_shows_nothing_has_an_empty_box_and_leaves_its_neighbors_alone(value: float):
    raw = torch.zeros(1, 2, 3, 3)
    raw[0, 0] = value
    raw[0, 1, 1, 2] = 1.0
    assert maps.boxes(raw).tolist() == [[[0, 0, 0, 0], [2, 1, 3, 2]]]
    one_bad_cell = torch.ones(1, 1, 2, 2)
    one_bad_cell[0, 0, 0, 0] = value
    assert (maps.boxes(one_bad_cell)[0, 0].tolist() == [0, 0, 2, 2]) == (value in (0.0, -1.0))


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e38])
def test_boxes_do_not_depend_on_the_scale(scale: float):
    raw = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]]) * scale
    assert maps.boxes(raw).tolist() == [[[0, 0, 2, 1]]]


def test_box_of_a_flat_positive_map_is_the_whole_map():
    assert maps.boxes(torch.full((1, 1, 3, 4), 0.1)).tolist() == [[[0, 0, 4, 3]]]


def test_boxes_take_maps_that_carry_a_graph_and_half_precision():
    raw = torch.tensor([[[[0.0, 1.0]]]])
    assert maps.boxes(raw.requires_grad_()).tolist() == [[[1, 0, 2, 1]]]
    assert maps.boxes(raw.bfloat16()).tolist() == [[[1, 0, 2, 1]]]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), 20.0])
def test_boxes_refuse_a_threshold_outside_0_to_1(threshold: float):
    with pytest.raises(ValueError, match="expected a threshold from 0 to 1, got"):
        maps.boxes(torch.ones(1, 1, 2, 2), threshold)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("with_norm", [False, True])
def test_parts_like_the_reference(k: int, with_norm: bool):
    generator = torch.Generator().manual_seed(0)
    raw = torch.rand(2, k, 4, 5, dtype=torch.float64, generator=generator)
    raw *= torch.tensor([0.01, 30.0]).view(2, 1, 1, 1)
    norm = torch.rand(2, 1, 4, 5, dtype=torch.float64, generator=generator) * 7 if with_norm else None
    picture = maps.parts(raw, norm)
    assert picture.dtype == torch.uint8
    for i in range(2):
        expected = reference.parts(raw[i].tolist(), None if norm is None else norm[i, 0].tolist())
        assert picture[i].movedim(0, -1).tolist() == expected


def test_parts_of_the_official_br_npa():
    golden = np.load(Path(__file__).parent / "golden" / "brnpa.npz")
    raw = torch.from_numpy(golden["maps"])
    norm = torch.linalg.vector_norm(torch.from_numpy(golden["features"]), dim=1, keepdim=True)
    picture = maps.parts(raw, norm)
    peak = norm.flatten(1).argmax(1)
    # the first representative is the position of the largest norm, where map 1 is at its maximum too: full red
    assert picture.flatten(2)[range(3), 0, peak].tolist() == [255, 255, 255]
    for i in range(3):
        expected = reference.parts(raw[i].double().tolist(), norm[i, 0].double().tolist())
        assert torch.equal(picture[i].movedim(0, -1), torch.tensor(expected, dtype=torch.uint8))


def test_parts_of_maps_of_zeros_and_of_values_that_are_not_finite():
    raw = torch.tensor([[[[0.0, 0.0, 0.0]], [[torch.nan, 1.0, torch.inf]]]])
    assert maps.parts(raw)[0, :, 0].T.tolist() == [[128, 128, 128], [0, 255, 0], [128, 128, 128]]


def test_parts_refuses_negative_values():
    good = torch.ones(1, 2, 1, 2)
    with pytest.raises(ValueError, match="of at least 0, got a negative value; show signed maps with overlay"):
        maps.parts(-good)
    with pytest.raises(ValueError, match="of at least 0, got a negative value"):
        maps.parts(good, -good[:, :1])


def test_parts_refuses_a_norm_of_another_layer(unchecked: None):
    with pytest.raises(ValueError, match=r"norm of shape \(2, 1, 4, 4\), got \(2, 1, 8, 8\); read it at the layer"):
        maps.parts(torch.ones(2, 3, 4, 4), torch.ones(2, 1, 8, 8))


def cells_of(figure: torch.Tensor, height: int, width: int, rows: int, columns: int) -> torch.Tensor:
    """Cells (rows, columns, 3, height, width) of a figure with gaps of 4 pixels, which must be white."""
    grid = figure[:, figure.shape[1] - rows * (height + 4) + 4 :]
    assert grid.shape[2] == columns * (width + 4) - 4
    gaps = torch.ones(grid.shape[1:], dtype=torch.bool)
    cells = []
    for y in range(0, rows * (height + 4), height + 4):
        for x in range(0, columns * (width + 4), width + 4):
            cells.append(grid[:, y : y + height, x : x + width])
            gaps[y : y + height, x : x + width] = False
    assert (grid[:, gaps] == 255).all()
    return torch.stack(cells).unflatten(0, (rows, columns))


def test_side_by_side_cell_by_cell():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (2, 3, 120, 100), dtype=torch.uint8, generator=generator)
    raw = torch.rand(2, 1, 7, 5, generator=generator)
    same_size = torch.randint(0, 255, (2, 3, 120, 100), dtype=torch.uint8, generator=generator)
    small = maps.parts(torch.rand(2, 3, 30, 25, generator=generator))
    figure = maps.side_by_side(images, {"map": raw, "picture": same_size, "small": small}, opacity=0.3)
    cells = cells_of(figure, 120, 100, 2, 4)
    assert torch.equal(cells[:, 0], images)
    assert torch.equal(cells[:, 1], maps.overlay(images, raw, 0.3)[:, 0])
    assert torch.equal(cells[:, 2], same_size)
    assert torch.equal(cells[:, 3], maps.resize(small.float(), (120, 100)).round().byte())


@pytest.mark.parametrize(("side", "factor"), [(1, 16), (27, 3), (58, 2), (90, 2), (91, 1)])
def test_side_by_side_enlarges_small_images_by_a_whole_factor(side: int, factor: int):
    images = torch.arange(side * (side + 5)).view(1, 1, side, side + 5).expand(1, 3, -1, -1).to(torch.uint8)
    cells = cells_of(maps.side_by_side(images, {"same": images}), factor * side, factor * (side + 5), 1, 2)
    for row in range(factor):
        for column in range(factor):
            assert torch.equal(cells[0, 0, :, row::factor, column::factor], images[0])
    assert torch.equal(cells[0, 1], cells[0, 0])


def test_side_by_side_colors_maps_with_negative_values_as_signed():
    images = torch.randint(0, 255, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    positive = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    columns = {"grad_cam": positive, "hires_cam": positive - torch.tensor([0.5, 0.0]).view(2, 1, 1, 1)}

    def drawn(**options):
        return cells_of(maps.side_by_side(images, columns, **options), 96, 96, 2, 3)

    as_signed = [maps.overlay(images, values, signed=True)[:, 0] for values in columns.values()]
    plain = [maps.overlay(images, values)[:, 0] for values in columns.values()]
    for found, one, two in (
        (drawn(), plain[0], as_signed[1]),
        (drawn(signed=["grad_cam"]), as_signed[0], plain[1]),
        (drawn(signed=[]), plain[0], plain[1]),
    ):
        assert torch.equal(found[:, 1], one) and torch.equal(found[:, 2], two)


def test_scales_show_the_colors_below_each_map_with_their_ends():
    images = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
    raw = torch.tensor([[[[-4.0, 1.0]]], [[[0.5, 2.0]]]])
    columns = {"signed": raw, "plain": raw.abs(), "picture": images}
    figure = maps.side_by_side(images, columns, scales=True)
    height = 96 + 4 + 4 + 15
    cells = cells_of(figure, height, 96, 2, 4)
    assert torch.equal(cells[:, :, :, :96], cells_of(maps.side_by_side(images, columns), 96, 96, 2, 4)), (
        "the maps themselves are the same"
    )
    below = cells[:, :, :, 96:]
    assert (below[:, (0, 3)] == 255).all()
    for row in range(2):
        assert torch.equal(below[row, 1, :, 4:8, 4:92], maps.color_bar(4, 88, signed=True))
        assert torch.equal(below[row, 2, :, 4:8, 4:92], maps.color_bar(4, 88))
    font = font_of(10)
    for row, column, ends in ((0, 1, ("−4", "4")), (1, 1, ("−2", "2")), (0, 2, ("1", "4")), (1, 2, ("0.5", "2"))):
        expected = Image.new("L", (96, 15), 255)
        draw = ImageDraw.Draw(expected)
        draw.text((4, 15), ends[0], 0, font, anchor="ld")
        draw.text((92, 15), ends[1], 0, font, anchor="rd")
        assert (below[row, column, 0, 8:].int() - torch.from_numpy(np.array(expected)).int()).abs().max() <= 1


def font_of(letters: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", letters)


@pytest.mark.parametrize(
    ("values", "signed", "ends"),
    [
        ([0.5, 2.0], False, ("lowest: 0.5", "highest: 2")),
        ([-4.0, 1.0], True, ("against: −4", "for: 4")),
        ([*range(100), 200.0], False, ("lowest: 0", "≥ 99")),
        ([*range(-99, 0), 200.0], True, ("against: ≤ −99", "for: ≥ 99")),
        ([0.5, 0.5], False, ("flat: 0.5",)),
        ([0.5, 0.501], False, ("nearly flat: 0.5 to 0.501",)),
        ([math.nan, math.inf], False, ("no finite value",)),
    ],
)
def test_the_ends_of_a_scale_are_explained(values: list[float], signed: bool, ends: tuple[str, ...]):
    column = torch.tensor(values)[None, None, None]
    signs = ["a"] if signed else []
    figure = maps.side_by_side(torch.zeros(1, 3, 256, 256, dtype=torch.uint8), {"a": column}, scales=True, signed=signs)
    expected = Image.new("L", (256, 18), 255)
    draw = ImageDraw.Draw(expected)
    for place, text in zip([(128, "md")] if len(ends) == 1 else [(4, "ld"), (252, "rd")], ends, strict=True):
        draw.text((place[0], 18), text, 0, font_of(12), anchor=place[1])
    assert (figure[0, -18:, 260:].int() - torch.from_numpy(np.array(expected)).int()).abs().max() <= 1


def test_columns_go_on_below_beside_the_images_again():
    images = torch.randint(0, 255, (2, 3, 96, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    columns = {name: torch.rand(2, 1, 5, 5) - int(name == "c") for name in "abcde"}
    figure = maps.side_by_side(images, columns, per_row=2, title="cell", signed=["b"])
    panels = [
        maps.side_by_side(images, {name: columns[name] for name in names}, title="cell", signed=set("b") & set(names))
        for names in ("ab", "cd", "e")
    ]
    assert figure.shape[2] == 3 * 104 - 4
    top = 0
    for panel in panels:
        assert torch.equal(figure[:, top : top + panel.shape[1], : panel.shape[2]], panel)
        top += panel.shape[1] + 12
    assert figure.shape[1] == top
    assert torch.equal(maps.side_by_side(images, columns, per_row=5), maps.side_by_side(images, columns))


def header(titles: list[str], side: int = 96) -> torch.Tensor:
    """The dark pixels above the first row (title, y, x), for each title over its column and half of both gaps."""
    blank = torch.zeros(1, 1, 2, 2)
    figure = maps.side_by_side(torch.zeros(1, 3, side, side, dtype=torch.uint8), dict.fromkeys(titles, blank))
    above = figure[0, : figure.shape[1] - side]
    return torch.nn.functional.pad(above, (2, 2), value=255).unfold(1, side + 4, side + 4).movedim(1, 0) < 200


LONG = ["guided_grad_cam_plus_plus", "W" * 60, "lrp_epsilon_alpha2_beta1, a sentence as long as this", "Grad-CAM++"]


@pytest.mark.parametrize("side", [96, 224])
def test_titles_stand_in_their_columns(side: int):
    written = header(LONG, side)
    assert len(written) == 1 + len(LONG) and written.any(2).any(1).all()
    assert not written[:, :, :4].any() and not written[:, :, -4:].any(), "at least 8 pixels between two titles"
    assert not written[:, :1].any() and not written[:, -2:].any(), "not cut off above, nor touching the pictures"
    middles = [column.any(0).nonzero().float().mean() for column in written]
    assert all(abs(middle - (side + 4) / 2) < 8 for middle in middles)


def test_a_title_is_written_in_full():
    font = font_of(12)
    for title in ("Grad-CAM", "BR-NPA"):
        expected = Image.new("L", (100, 30), 255)
        ImageDraw.Draw(expected).text((50, 20), title, 0, font, anchor="md")
        ink = torch.from_numpy(np.array(expected) < 200)
        assert header([title])[1].sum() == ink.sum()


def test_methods_have_their_names_and_an_underscore_is_written_as_a_space():
    names = ["grad_cam", "edge_map", "lrp@layer3"]
    assert torch.equal(header(names), header(["Grad-CAM", "edge map", "LRP at layer 3"]))


def test_side_by_side_without_columns_or_title():
    images = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
    assert torch.equal(cells_of(maps.side_by_side(images, {}), 96, 96, 2, 1)[:, 0], images)
    assert not header([""])[1].any()


def test_side_by_side_leaves_its_arguments_alone_and_takes_a_graph():
    images = torch.full((1, 3, 96, 96), 7, dtype=torch.uint8)
    raw = torch.rand(1, 1, 3, 3, requires_grad=True)
    before = raw.detach().clone()
    figure = maps.side_by_side(images, {"map": raw})
    assert not figure.requires_grad and torch.equal(raw, before) and (images == 7).all()


@pytest.mark.parametrize(
    "column",
    [
        torch.zeros(2, 2, 7, 7),
        torch.zeros(1, 1, 7, 7),
        torch.zeros(2, 3, 7, 7),
        torch.zeros(2, 1, 7, 7, dtype=torch.uint8),
        torch.zeros(2, 3, 7, 7, dtype=torch.long),
        torch.zeros(1, 3, 7, 7, dtype=torch.uint8),
        torch.zeros(2, 7, 7),
    ],
)
def test_side_by_side_refuses_what_is_neither_map_nor_picture(unchecked: None, column: torch.Tensor):
    with pytest.raises(ValueError, match=r"expected column 'x' to be a float map \(2, 1, h, w\) or a uint8 picture"):
        maps.side_by_side(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {"x": column})


def test_png_reads_back_pixel_by_pixel():
    image = torch.arange(2 * 3 * 3, dtype=torch.uint8).view(3, 2, 3) * 13
    with Image.open(io.BytesIO(maps.png(image))) as file:
        assert file.mode == "RGB" and np.array_equal(np.asarray(file), image.movedim(0, -1))


def test_a_flat_map_stays_flat_and_none_leaves_its_range():
    for value in (0.1, -0.7, 1e-9, 3.3):
        flat = torch.full((1, 1, 7, 7), value)
        for size in ((40, 33), (224, 224), (3, 5)):
            assert (maps.resize(flat, size) == value).all()
    raw = torch.rand(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    wide = maps.resize(raw, (50, 64))
    assert (wide.amax((2, 3)) <= raw.amax((2, 3))).all() and (wide.amin((2, 3)) >= raw.amin((2, 3))).all()


def test_variation_is_that_of_the_finite_values():
    rows = [[0.5, 0.51, 0.5], [torch.nan, 2.0, 1.0], [torch.inf, 3.0, 3.0], [torch.nan] * 3, [-4.0, -2.0, -3.0]]
    found = maps.variation(torch.tensor(rows).reshape(1, 5, 1, 3))
    assert found[0].tolist() == pytest.approx([0.01 / 0.51, 0.5, 0.0, 0.0, 0.5], rel=1e-5)
    assert maps.variation(torch.tensor([[[[[-3e38, 3e38]]]]])).tolist() == [[2.0]]  # of a volume


def test_a_nearly_flat_map_has_a_gray_bar_with_ends_that_differ():
    images = torch.zeros(1, 3, 100, 100, dtype=torch.uint8)
    raw = torch.tensor([[[[0.50939, 0.50948]]]])
    for name, factor, is_gray in (("flat", 1.0, True), ("clear", 100.0, False)):
        column = {name: raw + (factor - 1) * (raw - raw.min())}
        figure = maps.side_by_side(images, column, scales=True)[:, -(4 + 4 + 15) :, 104:]
        bar = figure[:, 4:8]
        assert bool((bar[..., 4:-4] == 128).all()) == is_gray
    ends = [
        maps.side_by_side(images, {"a": values}, scales=True)[:, -15:, 104:]
        for values in (raw, torch.tensor([[[[0.51, 0.51]]]]))
    ]
    assert not torch.equal(*ends)  # 0.50939 to 0.50948, not 0.51 to 0.51


def test_captions_stand_at_the_foot_of_their_columns():
    images, raw = torch.zeros(2, 3, 100, 100, dtype=torch.uint8), torch.rand(2, 1, 4, 4)
    columns = {"a": raw, "b": raw}
    plain = maps.side_by_side(images, columns)
    figure = maps.side_by_side(images, columns, captions={"b": "4 x 4 positions, and what gives more of them"})
    height = plain.shape[1]
    assert torch.equal(figure[:, :height], plain) and figure.shape[1] > height + 20
    assert (figure[:, height:, :208] == 255).all() and (figure[:, height:, 208:] < 128).any()
    wide = maps.side_by_side(images, columns, captions={"b": "4 x 4 positions"}, per_row=1)
    assert wide.shape[2] == 204
    with pytest.raises(ValueError, match="expected captions of columns out of a, b; got 'c'"):
        maps.side_by_side(images, columns, captions={"c": "?"})


def test_a_sliver_of_an_image_leaves_room_for_the_texts():
    for size in ((1, 512), (512, 1)):
        images = torch.zeros(1, 3, *size, dtype=torch.uint8)
        figure = maps.side_by_side(images, {"map": torch.rand(1, 1, 7, 7)}, scales=True)
        assert figure.shape[2] == 2 * (512 if size[1] > 1 else round(0.7 * 512)) + 4
        assert figure.shape[1] - size[0] < 100
    assert maps.side_by_side(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), {}).shape[2] == 96


def test_a_tall_image_stands_in_the_middle_of_its_column():
    images = torch.randint(0, 255, (2, 3, 200, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cells = cells_of(maps.side_by_side(images, {"same": images}), 200, 140, 2, 2)
    assert torch.equal(cells[:, 0, :, :, 45:95], images) and torch.equal(cells[:, 1], cells[:, 0])
    assert (cells[..., :45] == 255).all() and (cells[..., 95:] == 255).all()


def test_a_heading_stands_over_all_columns_and_is_wrapped():
    images = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    plain = maps.side_by_side(images, {"a": images})
    heights = [0]
    for text in ("short", "short\nand more", "so much that it takes several lines\nand more"):
        figure = maps.side_by_side(images, {"a": images}, heading=text)
        heights.append(figure.shape[1] - plain.shape[1])
        assert torch.equal(figure[:, heights[-1] :], plain)
        above = figure[0, : heights[-1]] < 200
        assert above.any() and not (above[:, :4].any() or above[:, -4:].any() or above[-4:].any() or above[0].any())
    assert heights == sorted(set(heights))


def test_letters_of_other_scripts_need_a_font_that_has_them(monkeypatch: pytest.MonkeyPatch):
    assert maps.is_writable("très élégante, кошка, γάτα") and not maps.is_writable("\ue123")
    monkeypatch.setattr(maps, "_letters_in", lambda file: set(range(0xFFFF)) if file.stem == "other" else {65})
    monkeypatch.setattr(maps, "_other_fonts", lambda: [Path("one.ttf"), Path("other.ttf")])
    assert maps._font_file("虎猫") == Path("other.ttf")


def test_long_words_are_cut_behind_dots_and_else_anywhere():
    font = font_of(10)
    for text, lines in (
        ("backbone.stages.3.blocks.17.norm2", ["backbone.", "stages.3.blocks.", "17.norm2"]),
        ("a few words and_one_long_name@of.a.layer", ["a few words", "and_one_long_", "name@of.a.layer"]),
        ("x" * 40, ["x" * 14, "x" * 14, "x" * 12]),
        ("one\ntwo", ["one", "two"]),
    ):
        assert maps._wrapped(text, font, 88) == lines and all(font.getlength(line) <= 88 for line in lines)


def test_slices_of_a_volume_and_its_map_lie_on_each_other():
    volume = torch.arange(6, dtype=torch.uint8)[None, None, :, None, None].expand(1, 3, 6, 2, 2) * 40
    importance = torch.arange(6.0)[None, None, :, None, None].expand(1, 1, 6, 2, 2)
    for depths, shown in ((3, [1, 3, 5]), ([4, 0], [4, 0]), (6, [0, 1, 2, 3, 4, 5])):
        pictures, values = maps.slices(volume, depths), maps.slices(importance, depths)
        assert pictures.dtype == torch.uint8 and pictures.shape == (1, 3, 2, 2 * len(shown))
        assert pictures[0, 0, 0, ::2].tolist() == [40 * depth for depth in shown]
        assert values[0, 0, 1, 1::2].tolist() == shown
    colors = maps.overlay(maps.slices(volume, 6), maps.slices(importance, 6), opacity=1.0)[0, 0, :, 0, ::2]
    assert torch.equal(colors, maps.color(torch.linspace(0, 1, 6)[None])[:, 0])  # one scale for all slices


def test_slices_may_be_counted_by_numpy(unchecked: None):
    volume = torch.rand(1, 1, 6, 2, 2)
    for depths in (np.int64(2), np.array([1, 4])):
        assert torch.equal(maps.slices(volume, depths), maps.slices(volume, [1, 4]))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("depths", [0, 7, -1, [], [6], [-1]])
def test_slices_that_a_volume_does_not_have(depths):
    with pytest.raises(ValueError, match=r"expected (1 to 6 slices|slices out of 0\.\.5), got .*; the volume has 6"):
        maps.slices(torch.zeros(1, 1, 6, 2, 2), depths)


def test_slices_of_what_is_flat(unchecked: None):
    with pytest.raises(ValueError, match=r"expected volumes of shape \(b, c, d, h, w\), got \(1, 3, 4, 4\)"):
        maps.slices(torch.zeros(1, 3, 4, 4))


def test_volumes_are_cut_before_they_are_drawn(unchecked: None):
    picture, volume = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 4, 4\); cut volumes by maps\.slices$"):
        maps.side_by_side(picture, {"map": volume})
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 4, 4\); cut volumes by maps\.slices$"):
        maps.boxes(volume)


def test_channel_weights_are_the_means_of_the_classes():
    model = sl.create_model("test_resnet", num_classes=3, attention="cbam").eval()
    images, labels = torch.rand(5, 3, 32, 32), torch.tensor([2, 0, 2, 2, 0])
    weights = sl.attention_maps(model, images)
    figure = maps.channel_weights(weights, labels, ["cat", "dog", "eel"])
    channel = {name: one for name, one in weights.items() if one.shape[1] > 1}  # the spatial gates have one
    panels = [panel for panel in figure.axes if panel.lines]
    assert 0 < len(channel) < len(weights) and [panel.get_title() for panel in panels] == [*channel]
    for panel, one in zip(panels, channel.values(), strict=True):
        lines = {line.get_label(): torch.from_numpy(line.get_ydata()) for line in panel.lines}
        assert [*lines] == ["cat", "eel", "all"]  # no image of a dog
        for name, rows in {"cat": [1, 4], "eel": [0, 2, 3], "all": [0, 1, 2, 3, 4]}.items():
            torch.testing.assert_close(lines[name], one[rows, :, 0, 0].mean(0))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["cat", "eel", "all"]


def test_channel_weights_bad_input(unchecked):
    weights = {"se": torch.rand(2, 4, 1, 1)}
    for bad, message in (
        (({}, torch.tensor([0, 1])), "got no attention; choose a network"),
        (({"map": torch.rand(2, 1, 3, 3)}, torch.tensor([0, 1])), r"got map \(2, 1, 3, 3\); choose"),
        ((weights, torch.tensor([0])), r"each of the 2 images of 'se', got labels of shape \(1,\)"),
        ((weights, torch.tensor([0, 2]), ["cat", "dog"]), r"labels of 2 classes .*, got \[0, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            maps.channel_weights(*bad)
