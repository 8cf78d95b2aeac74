"""The spatial transformer against the equations, exact moves, and a toy on which it has to find the object."""

import copy

import numpy as np
import pytest
import torch
from tests.reference.transformer import inside, sample
from torch import nn
from torch.nn import functional as F

import sightline as sl
from sightline.attention.transformer import SpatialTransformer, Window
from sightline.explainers import attention_maps
from sightline.facts import Notice
from sightline.models.create import tell_of_window


def inputs(batch=2, channels=3, size=(5, 7), dtype=torch.float32):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def at(theta, channels=3, **options):
    """A transformer that samples this window of every image."""
    transformer = SpatialTransformer(channels, **options).double().eval()
    with torch.no_grad():
        transformer.affine.bias.copy_(torch.tensor(theta, dtype=torch.float64).flatten())
    return transformer


def wandering(channels=3, dtype=torch.float64, **options):
    """A transformer whose window depends on the image."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer = SpatialTransformer(channels, **options).to(dtype).eval()
        nn.init.normal_(transformer.affine.weight, std=0.3)
    return transformer


@pytest.mark.parametrize("scale_only", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 9), (224, 33), (16, 64)])
def test_a_fresh_one_samples_the_input_where_it_is(size, scale_only):
    x = inputs(size=size)
    transformer = SpatialTransformer(3, scale_only=scale_only)
    torch.testing.assert_close(transformer(x), x, rtol=0, atol=1e-5 * x.abs().max().item())
    assert torch.equal(transformer.gate(x, transformer.theta(x)), torch.ones(2, 1, *size))
    if size == (16, 64):  # sides that are powers of two have positions without rounding
        assert torch.equal(transformer(x), x)


@pytest.mark.parametrize(
    ("theta", "moved"),
    [
        ([[1, 0, 2 / 7], [0, 1, 0]], lambda x: F.pad(x[..., 1:], (0, 1))),
        ([[1, 0, 0], [0, 1, -2 / 5]], lambda x: F.pad(x[..., :-1, :], (0, 0, 1, 0))),
        ([[-1, 0, 0], [0, 1, 0]], lambda x: x.flip(3)),
        ([[1, 0, 0], [0, -1, 0]], lambda x: x.flip(2)),
        ([[-1, 0, 0], [0, -1, 0]], lambda x: x.rot90(2, (2, 3))),
    ],
)
def test_shifts_and_flips_are_exact(theta, moved):
    x = inputs(dtype=torch.float64)
    torch.testing.assert_close(at(theta)(x), moved(x), rtol=0, atol=1e-12)


def test_zoom_and_quarter_turn_are_exact():
    x = inputs(size=(8, 8), dtype=torch.float64)
    torch.testing.assert_close(at([[0.5, 0, 0], [0, 0.5, 0]], size=(4, 4))(x), x[..., 2:6, 2:6], rtol=0, atol=1e-12)
    corner = at([0.5, 0.5, -0.5], size=(4, 4), scale_only=True)
    torch.testing.assert_close(corner(x), x[..., :4, 4:], rtol=0, atol=1e-12)
    torch.testing.assert_close(at([[0, 1, 0], [1, 0, 0]])(x), x.transpose(2, 3), rtol=0, atol=1e-12)
    enlarged = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[..., 1:-1, 1:-1]
    torch.testing.assert_close(at([[1, 0, 0], [0, 1, 0]], size=(16, 16))(x)[..., 1:-1, 1:-1], enlarged)


@pytest.mark.parametrize("size", [None, (3, 4), (9, 1)])
@pytest.mark.parametrize("scale_only", [False, True])
def test_equals_the_equations_pixel_by_pixel(size, scale_only):
    x = inputs(dtype=torch.float64)
    transformer = wandering(size=size, scale_only=scale_only)
    theta = transformer.theta(x)
    assert not torch.allclose(theta[0], theta[1])
    assert torch.equal(theta[:, 0, 0], theta[:, 1, 1]) == scale_only and bool(theta[:, 0, 1].any()) != scale_only
    expected = sample(x.numpy(), theta.detach().numpy(), size or (5, 7))
    torch.testing.assert_close(transformer(x), torch.from_numpy(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_the_window_is_the_parallelogram_between_the_moved_corners(seed):
    theta = 0.7 * torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    maps = Window()(torch.zeros(3, 2, 9, 14, dtype=torch.float64), theta)
    expected = np.stack([inside(one.numpy(), (9, 14)) for one in theta])
    assert maps.dtype == torch.float64 and np.array_equal(maps[:, 0].numpy(), expected)
    assert 0 < expected.mean() < 1


def test_windows_by_hand():
    def window(*theta):
        return Window()(torch.zeros(1, 1, 2, 8), torch.tensor([theta]))[0, 0].tolist()

    assert window([0.5, 0.0, 0.0], [0.0, 1.0, 0.0]) == [[0, 0, 1, 1, 1, 1, 0, 0]] * 2
    assert window([0.5, 0.0, 0.25], [0.0, 1.0, 0.0]) == [[0, 0, 0, 1, 1, 1, 1, 0]] * 2
    assert window([1.0, 0.0, -1.0], [0.0, 1.0, 1.0]) == [[0] * 8, [1, 1, 1, 1, 0, 0, 0, 0]]
    assert window([-0.5, 0.0, 0.0], [0.0, 1.0, 0.0]) == [[0, 0, 1, 1, 1, 1, 0, 0]] * 2
    assert window([0.375, 0.0, 0.0], [0.0, 1.0, 0.0]) == [[0, 0, 0, 1, 1, 0, 0, 0]] * 2  # the edge is outside
    assert window([0.0, 0.0, 0.125], [0.0, 1.0, 0.0]) == [[0] * 8] * 2
    assert window([0.0, 0.0, 0.125], [0.0, 0.0, 0.5]) == [[0] * 8] * 2


def test_attention_maps_read_the_window():
    transformer = at([[0.5, 0, 0], [0, 1, 0]], 4, size=(2, 2)).float()
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), transformer, nn.Flatten())
    (window,) = attention_maps(network, torch.randn(2, 3, 2, 4)).values()
    assert window.tolist() == [[[[0, 1, 1, 0]] * 2]] * 2


@pytest.mark.parametrize("scale_only", [False, True])
def test_gradients(scale_only):
    x = inputs(size=(3, 4), dtype=torch.float64).requires_grad_()
    transformer = wandering(hidden=4, scale_only=scale_only)
    assert torch.autograd.gradcheck(lambda x, *_: transformer(x), (x, *transformer.parameters()))


def test_no_parameter_is_stuck():
    x = inputs(4, size=(9, 6), dtype=torch.float64)
    transformer = SpatialTransformer(3).double()
    before = copy.deepcopy(dict(transformer.named_parameters()))
    optimizer = torch.optim.AdamW(transformer.parameters(), 1e-3, weight_decay=0)
    for _ in range(5):
        optimizer.zero_grad()
        transformer(x).square().sum().backward()
        optimizer.step()
    assert not [key for key, value in transformer.named_parameters() if torch.equal(value, before[key])]


def test_layout_batch_and_half_precision():
    x = inputs(dtype=torch.float64)
    transformer = wandering()
    expected = transformer(x)
    torch.testing.assert_close(transformer(x.contiguous(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(torch.cat([transformer(x[:1]), transformer(x[1:])]), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(transformer.float()(x.float()).double(), expected, rtol=0, atol=0.1)
    fresh = SpatialTransformer(3).bfloat16()
    wide = inputs(size=(3, 257)).bfloat16()  # positions in bfloat16 would be off by whole pixels
    torch.testing.assert_close(fresh(wide), wide)


def test_weights_survive_saving_export_and_copying():
    x = inputs(dtype=torch.float64)
    transformer, other = wandering(), SpatialTransformer(3).double()
    other.load_state_dict(transformer.state_dict())
    assert torch.equal(other(x), transformer(x)) and torch.equal(copy.deepcopy(transformer)(x), transformer(x))


@pytest.mark.compile
def test_compiled_and_exported():
    x = inputs(dtype=torch.float64)
    transformer = wandering(size=(3, 3))
    compiled = torch.compile(transformer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), transformer(x))
    torch.testing.assert_close(torch.export.export(transformer, (x,)).module()(x), transformer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": (0, 3)}, "expected a size of at least 1 x 1, got 0 x 3"), ({"hidden": 0}, "hidden of 1 or more, got 0")],
)
def test_impossible_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        SpatialTransformer(3, **options)


def scattered(n, seed, side=24):
    """A plus or a cross of 8 x 8 pixels anywhere on the canvas among small squares: images, labels, masks."""
    glyphs = torch.zeros(2, 8, 8)
    glyphs[0, :, 3:5] = glyphs[0, 3:5] = 1
    glyphs[1] = torch.maximum(torch.eye(8), torch.eye(8).flip(1)) + torch.eye(8).roll(1, 1).triu()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=generator)
    images, masks = torch.zeros(2, n, 1, side, side)
    for image, mask, label in zip(images, masks, labels.tolist(), strict=True):
        for _ in range(4):
            row, column = torch.randint(side - 1, (2,), generator=generator).tolist()
            image[0, row : row + 2, column : column + 2] = 1
        row, column = torch.randint(side - 7, (2,), generator=generator).tolist()
        image[0, row : row + 8, column : column + 8] = glyphs[label]
        mask[0, row : row + 8, column : column + 8] = 1
    return images, labels, masks


def test_it_learns_to_look_at_the_object():
    images, labels, _ = scattered(2048, seed=0)
    new, new_labels, masks = scattered(500, seed=1)

    def accuracy(first, features):
        net = nn.Sequential(first, nn.Flatten(), nn.Linear(features, 2))
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(500):
            batch = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            return (net(new).argmax(1) == new_labels).float().mean().item()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SpatialTransformer(1, size=(12, 12), hidden=16)
        with_it, without = accuracy(transformer, 144), accuracy(nn.Identity(), 576)
    assert with_it > 0.95 and with_it > without + 0.1
    with torch.no_grad():
        theta = transformer.theta(new)
        window = transformer.gate(new, theta)
    on_object = (window * masks).sum() / window.sum()
    assert masks.mean().item() == pytest.approx(64 / 576) and on_object > 2.5 * masks.mean()
    for shift, profile in ((theta[:, 0, 2], masks.amax((1, 2))), (theta[:, 1, 2], masks.amax((1, 3)))):
        place = (profile * torch.arange(24.0)).sum(1) / 8
        assert torch.corrcoef(torch.stack([shift, place]))[0, 1] > 0.7


def test_a_transformer_in_front_of_a_network(tmp_path, unchecked):
    """The network keeps its names; a run of it loads; the window is its attention; weights without one are taken."""
    options = {"depth": 8, "width": 0.5}
    plain = sl.create_model("cifar_resnet", num_classes=3, **options).eval()
    tell_of_window.cache_clear()
    with pytest.warns(Notice, match="maps of layers show the window that the spatial transformer cuts out"):
        model = sl.create_model("cifar_resnet", num_classes=3, spatial_transformer={"hidden": 4}, **options).eval()
    added = model.state_dict().keys() - plain.state_dict().keys()
    assert added and all(name.startswith("spatial_transformer.") for name in added)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    images = torch.rand(2, 3, 32, 32)
    given = sl.create_model(  # told once per process: a study makes many
        "cifar_resnet", num_classes=3, weights=tmp_path / "plain.pth", spatial_transformer={"hidden": 4}, **options
    ).eval()
    assert torch.allclose(given(images), plain(images), atol=1e-4)
    given.spatial_transformer.affine.bias.data.copy_(torch.tensor([0.5, 0.0, 0.5, 0.0, 0.5, -0.5]))
    assert torch.allclose(given(images), plain(given.spatial_transformer(images)), atol=1e-6)
    assert not torch.allclose(given(images), plain(images), atol=1e-3)
    torch.save(given.state_dict(), tmp_path / "given.pth")
    again = sl.create_model(
        "cifar_resnet", num_classes=3, weights=tmp_path / "given.pth", spatial_transformer={"hidden": 4}, **options
    ).eval()
    assert torch.equal(again(images), given(images))
    window = sl.attention_maps(given, images)["spatial_transformer"]
    assert window[:, :, :16, 16:].all() and window.sum() == 2 * 16 * 16  # the upper right quarter
    copied = copy.deepcopy(given)
    copied.spatial_transformer.affine.bias.data.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]))
    assert torch.allclose(copied(images), plain(images), atol=1e-4)
    with pytest.raises(ValueError, match="spatial_transformer: expected options out of size, hidden, scale_only, got"):
        sl.create_model("cifar_resnet", spatial_transformer={"hid": 4})
    with pytest.raises(TypeError, match="expected spatial_transformer as options such as"):
        sl.create_model("cifar_resnet", spatial_transformer=True)
    with pytest.raises(ValueError, match="expected a network without a spatial transformer"):
        sl.models.transformed.add_transformer(given)
