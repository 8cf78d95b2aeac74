"""Which layer is read, and where its positions lie: grids of any shape, tokens in any order, compiled parts."""

import pytest
import torch
from tests.same import close
from torch import nn
from torch.nn import functional as F

from sightline.attention import MILPooling
from sightline.attention.alignment import Attend, DotProduct
from sightline.explainers import attention_maps, explain
from sightline.explainers.capture.features import Watch


def seeded(build, *args, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args, **options).eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- where the positions are, by numbering them ----------------------------------------------------------------------


def numbered(batch, *size):
    """Images (b, 2, *size) whose values say where they are: the number of the cell, the same in both channels."""
    count = torch.Size(size).numel()
    return torch.arange(count).float().view(1, 1, *size).expand(batch, 2, *size).clone()


def windows(x, side=2):
    """(b, h, w, c) as (b * windows, side * side, c), as Swin cuts it."""
    b, h, w, c = x.shape
    x = x.view(b, h // side, side, w // side, side, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, c)


def unrolled(x, side=2):
    """(b, c, h, w) as tokens in the order of Hiera: inside the windows first, then the windows."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // side, side, w // side, side)
    return x.permute(0, 3, 5, 2, 4, 1).reshape(b, h * w, c)


MOVES = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "rows and columns exchanged": lambda x: x.mT,
    "mirrored": lambda x: x.flip(3),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "tokens, channels first": lambda x: x.reshape(len(x), x.shape[1], -1),
    "class token before": lambda x: torch.cat([x.flatten(2).mT, x.flatten(2).mT.mean(1, keepdim=True)], 1).roll(0),
    "class token behind": lambda x: torch.cat([x.flatten(2).mT, torch.zeros(len(x), 1, x.shape[1])], 1),
    "padded tokens, cut again": lambda x: F.pad(x.flatten(2).mT, (0, 0, 3, 0))[:, 2:],
    "windows": lambda x: windows(x.permute(0, 2, 3, 1)),
    "windows in the order of Hiera": unrolled,
    "twice": lambda x: unrolled(x, 4).unflatten(1, (2, 2, 4, -1)).transpose(1, 2).flatten(1, 3),
    "an Einstein sum": lambda x: torch.einsum("bchw,dc->bhwd", x, torch.eye(2)),
    "a product": lambda x: x.flatten(2).mT @ torch.eye(2),
    "halves, joined": lambda x: torch.cat(x.chunk(2, 1), 1),
    "rectified in place": lambda x: x.clone().relu_().contiguous(),
    "unbound": lambda x: torch.stack([x, x], 2).unbind(2)[1],
    "gated": lambda x: x * (x.mean((2, 3), keepdim=True) * 0 + 1),
    "cut into pieces": lambda x: F.unfold(x, 2, stride=2).unflatten(1, (2, 2, 2)).permute(0, 1, 4, 2, 3).flatten(2),
    "cut into tiles": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3, 5)[..., :1],
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("move", MOVES)
def test_positions_are_followed_through_whatever_moves_them(move, batch):
    x = numbered(batch, 4, 8)
    with Watch(x, cut=True) as watch:
        moved = MOVES[move](x)
    if move == "class token before":  # a roll cannot be followed
        assert watch.positions.knows(moved) and watch.positions.of(moved) is None
        return
    layout = watch.positions.layout(moved)
    wanted = numbered(1, 4, 8)[0, 0] if move != "cut into tiles" else numbered(1, 4, 8)[0, 0, ::2, ::2]
    maps = layout.maps(moved)
    assert layout.grid == tuple(wanted.shape) and maps.shape[0] == batch
    assert (maps == wanted).all()
    leading = layout.maps(moved[:, None].expand(-1, 5, *moved.shape[1:]), lead=2)
    assert leading.shape[:2] == (batch, 5) and (leading == wanted).all()


@pytest.mark.parametrize("batch", [1, 3])
def test_frames_in_the_batch_are_positions(batch):
    x = numbered(batch, 3, 4, 8)
    with Watch(x, cut=True) as watch:
        frames = x.transpose(1, 2).flatten(0, 1)
        pooled = F.max_pool2d(frames, 1)
    layout = watch.positions.layout(pooled)
    assert layout.grid == (3, 4, 8) and (layout.maps(pooled) == numbered(1, 3, 4, 8)[0, 0]).all()


@pytest.mark.parametrize(
    "lose",
    [
        lambda x: x.mean((2, 3)),
        lambda x: x.unflatten(1, (1, 2)).flatten(3).mT.expand(-1, 3, -1, -1),  # (b, heads, tokens, width)
        lambda x: (x.flatten(2).mT @ x.flatten(2)).softmax(2)[:, None],
        lambda x: x[:, :, :2],
        lambda x: F.avg_pool2d(x, (4, 8)),
    ],
)
def test_what_has_no_positions_or_only_some_is_no_map(lose):
    x = numbered(2, 4, 8)
    with Watch(x, cut=True) as watch:
        lost = lose(x)
    assert watch.positions.of(lost) is not None and watch.positions.layout(lost) is None


# --- grids of another shape than the image's -------------------------------------------------------------------------


def conv(i, o, kernel=3, stride=1, padding=1):
    return nn.Sequential(nn.Conv2d(i, o, kernel, stride, padding), nn.ReLU())


class Pooled(nn.Module):
    """Features, then the mean over all positions, then one linear layer."""

    def __init__(self, features, channels=8, resize=None):
        super().__init__()
        self.features, self.fc, self.resize = features, nn.Linear(channels, 3), resize

    def forward(self, x):
        x = x if self.resize is None else F.interpolate(x, self.resize)
        return self.fc(self.features(x).flatten(2).mean(2))


SHAPES = {
    "rows pooled more than columns": (nn.Sequential(conv(1, 8), nn.MaxPool2d((4, 1)), conv(8, 8)), (1, 32, 32), None),
    "columns pooled more than rows": (nn.Sequential(conv(1, 8), nn.MaxPool2d((1, 4)), conv(8, 8)), (1, 32, 32), None),
    "a signal": (nn.Sequential(conv(2, 8, (1, 5), 1, 0), conv(8, 8, (1, 5), (1, 2), 0)), (2, 1, 200), None),
    "a kernel of the full height": (nn.Sequential(conv(1, 8), conv(8, 8, (16, 3), 1, 0)), (1, 16, 32), None),
    "a resize in the model": (nn.Sequential(conv(3, 8), conv(8, 8)), (3, 64, 16), (16, 16)),
    "volumes that keep their time": (
        nn.Sequential(nn.Conv3d(2, 8, 3, (1, 2, 2), 1), nn.ReLU(), nn.Conv3d(8, 8, 3, (1, 2, 2), 1), nn.ReLU()),
        (2, 8, 16, 16),
        None,
    ),
    "as many channels as columns": (nn.Sequential(conv(1, 8), nn.MaxPool2d((4, 2)), conv(8, 16)), (1, 32, 32), None),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_grids_of_any_shape_are_read_automatically_and_by_name(kind):
    features, size, resize = SHAPES[kind]
    channels = [m for m in features.modules() if hasattr(m, "out_channels")][-1].out_channels
    model = seeded(Pooled, features, channels, resize)
    x = images(2, *size)
    automatic, named = explain(model, x, 1, ["hires_cam"]), explain(model, x, 1, ["hires_cam"], layer="features")
    kept = features(x if resize is None else F.interpolate(x, resize)).detach()
    weights = (model.fc.weight[1] / kept[0, 0].numel()).detach()
    by_hand = torch.einsum("k,bk...->b...", weights, kept)[:, None]
    assert close(by_hand, automatic["hires_cam"]) and close(by_hand, named["hires_cam"])
    assert automatic.layer == named.layer == f"features ({' x '.join(map(str, kept.shape[1:]))})"
    assert automatic.notices == named.notices == ()


def test_stripes_of_a_person_are_a_column():
    class Stripes(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.fc = nn.Sequential(conv(3, 8, 3, 2), conv(8, 8, 3, 2)), nn.Linear(48, 3)

        def forward(self, x):
            return self.fc(F.adaptive_avg_pool2d(self.features(x), (6, 1)).flatten(1))

    model, x = seeded(Stripes), images(1, 3, 96, 32)
    found = explain(model, x, 0, ["hires_cam"])
    stripes = F.adaptive_avg_pool2d(model.features(x), (6, 1)).detach()
    assert found.layer == "input of flatten (8 x 6 x 1)"
    assert close((model.fc.weight[0].view(1, 8, 6, 1) * stripes).sum(1, keepdim=True).detach(), found["hires_cam"])
    assert explain(model, x, 0, ["hires_cam"], layer="features")["hires_cam"].shape == (1, 1, 24, 8)


# --- tokens ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention between all tokens by matrix products: its tensors (b, heads, tokens, width) look like maps."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.queries, self.mlp = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Identity(),
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.queries(q)
        x = x + ((q @ k.mT).softmax(3) @ v).transpose(1, 2).flatten(2)
        return x + self.mlp(x)


class Windowed(nn.Module):
    """Tokens in the order of Hiera, pooled window by window between two stages."""

    def __init__(self, width=16, reads_first=False):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.one, self.two, self.norm = Block(width), Block(width), nn.LayerNorm(width)
        self.fc, self.reads_first = nn.Linear(width, 3), reads_first
        self.first = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x):
        x = self.one(unrolled(self.stem(x)))
        x = x.view(len(x), 4, -1, x.shape[2]).amax(1)  # the positions inside each window
        if self.reads_first:
            return self.fc(self.two(torch.cat([self.first.expand(len(x), -1, -1), x], 1))[:, 0])
        return self.fc(self.norm(self.two(x)).mean(1))


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_in_another_order_come_back_as_a_grid(batch):
    model, x = seeded(Windowed), images(batch, 3, 32, 48)
    found = explain(model, x, 1, ["hires_cam", "hires_cam@one"])
    assert found.layers == {"hires_cam": "norm (16 x 4 x 6)", "hires_cam@one": "one (16 x 8 x 12)"}
    kept = []
    handles = [m.register_forward_hook(lambda m, i, o: kept.append(o)) for m in (model.one, model.norm)]
    score = model(x)[:, 1].sum()
    [handle.remove() for handle in handles]
    early, late = ((a * g).sum(2).detach() for a, g in zip(kept, torch.autograd.grad(score, kept), strict=True))
    assert close(late.view(batch, 1, 4, 6), found["hires_cam"])
    early = early.view(batch, 2, 2, 4, 6).permute(0, 3, 1, 4, 2).reshape(batch, 1, 8, 12)
    assert close(early, found["hires_cam@one"])
    seen = explain(seeded(Windowed, reads_first=True), x, 1)
    assert seen.layer == "two.norm (16 x 4 x 6)"


def test_tensors_inside_attention_are_no_maps():
    """32 tokens of 4 heads at 32 x 32 pixels: (b, 4, 32, 32) has the shape of an image."""
    model = seeded(Windowed, width=128)
    with pytest.raises(ValueError, match=r"^expected a layer that yields .* got shape \(1, 4, 24, 32\) from 'two.que"):
        explain(model, images(1, 3, 32, 48), 1, layer="two.queries")


@pytest.mark.parametrize("name", ["mvitv2_tiny", "coat_lite_tiny", "hiera_tiny_224"])
def test_transformers_of_timm_that_pool_or_reorder_their_tokens(name):
    timm = pytest.importorskip("timm")
    options = {"hiera_tiny_224": {"embed_dim": 8}}.get(name, {})
    model = seeded(timm.create_model, name, num_classes=5, **options)
    layers = {
        "mvitv2_tiny": "norm (768 x 7 x 7)",
        "coat_lite_tiny": "serial_blocks4.1.norm1 (320 x 7 x 7)",
        "hiera_tiny_224": "blocks.11 (64 x 7 x 7)",
    }
    assert explain(model, images(1, 3, 224, 224), 0, ["activation_map"]).layer == layers[name]


def test_a_window_that_lies_on_its_side_is_not_drawn_as_the_whole_image():
    """A crop in the model: what is behind it covers a part of the image, so the image before it is read, and said."""

    class Cropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.fc = conv(3, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.features(x[:, :, 4:12, 4:12]).mean((2, 3)))

    found = explain(seeded(Cropping), images(1, 3, 16, 16), 0, ["hires_cam"])
    assert found.layer == "input of __getitem__ (3 x 16 x 16)"
    assert not found["hires_cam"][..., :4, :].any() and found["hires_cam"][..., 4:12, 4:12].any()
    assert found.notices == (
        "'input of __getitem__' was read, which holds the pixels: no layer with weights lies before it; name a later "
        "one by layer= if the model has one with positions",
    )
    with pytest.raises(ValueError, match=r"^expected a layer that yields .* got shape \(1, 8, 8, 8\) from 'features'"):
        explain(seeded(Cropping), images(1, 3, 16, 16), 0, ["hires_cam"], layer="features")


# --- several maps, several images ------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.color, self.depth, self.fc = conv(3, 8, 3, 2), conv(1, 8, 3, 2), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(torch.cat([self.color(x[:, :3]).mean((2, 3)), self.depth(x[:, 3:]).mean((2, 3))], 1))


def test_parallel_feature_maps_without_a_name_are_counted():
    class Rectified(Branches):
        def forward(self, x):
            maps = self.color(x[:, :3]).relu(), self.depth(x[:, 3:]).relu()
            return self.fc(torch.cat([each.mean((2, 3)) for each in maps], 1))

    found = explain(seeded(Rectified), images(2, 4, 16, 16), 0, ["hires_cam", "saliency"])
    assert found.notices == (
        "'input of mean' was read, the last of 2 of that name that feed the logits beside each other; read the others "
        "by naming the layers before them in layer=",
    )


def test_parallel_feature_maps_are_named():
    model, x = seeded(Branches), images(2, 4, 16, 16)
    found = explain(model, x, 0, ["hires_cam"])
    assert found.layer == "depth (8 x 8 x 8)"
    assert explain(model, x, 0, ["hires_cam", "saliency"]).notices == found.notices
    assert found.notices == (
        "'depth' was read, but the logits depend on 'color' beside it; layer=['color', 'depth'] reads all of them",
    )
    both = explain(model, x, 0, ["hires_cam"], layer=["color", "depth"])
    total = sum(value.sum((2, 3)) for value in both.maps.values())
    assert close(total[:, 0] + model.fc.bias[0].detach(), both.logits[:, 0]) and both.notices == ()


class Pair(nn.Module):
    """Two images in the channels, one encoder that sees both in one batch."""

    def __init__(self):
        super().__init__()
        self.features, self.fc = conv(3, 8, 3, 2), nn.Linear(16, 2)

    def forward(self, x):
        seen = self.features(torch.cat(x.chunk(2, 1)))
        return self.fc(torch.cat(seen.mean((2, 3)).chunk(2), 1))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_images_of_a_pair_in_one_batch_are_chosen_by_call(batch):
    model, x = seeded(Pair), images(batch, 6, 16, 16)
    with pytest.raises(
        ValueError, match=r"^expected a layer that sees each image once, got 'features', .* call=0 to 1"
    ):
        explain(model, x, 0)
    with pytest.raises(ValueError, match=r"which the forward calls 2 times .* choose one by call=$"):
        explain(model, x, 0, layer="features")
    for call in (0, 1):
        found = explain(model, x, torch.tensor([[0, 1]] * batch), ["hires_cam"], layer="features", call=call)
        kept = model.features(x.chunk(2, 1)[call]).detach()
        weights = model.fc.weight[:, 8 * call : 8 * call + 8].detach() / 64
        assert close(torch.einsum("tk,bkhw->bthw", weights, kept), found["hires_cam"])


def test_a_frame_at_a_time_is_a_map_of_the_video():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.fc = conv(3, 8, 3, 2), nn.Linear(8, 3)

        def forward(self, x):
            frames = self.features(x.transpose(1, 2).flatten(0, 1)).mean((2, 3))
            return self.fc(frames).unflatten(0, (len(x), -1)).mean(1)

    model, x = seeded(Frames), images(2, 3, 4, 16, 16)
    automatic, named = explain(model, x, 1, ["hires_cam"]), explain(model, x, 1, ["hires_cam"], layer="features")
    kept = torch.stack([model.features(x[:, :, t]) for t in range(4)], 2).detach()
    by_hand = torch.einsum("k,bkthw->bthw", model.fc.weight[1].detach() / 256, kept)[:, None]
    assert close(by_hand, automatic["hires_cam"]) and close(by_hand, named["hires_cam"])


# --- no gradients, no Python -----------------------------------------------------------------------------------------


class Probe(nn.Module):
    """A frozen backbone under no_grad."""

    def __init__(self):
        super().__init__()
        self.features, self.fc = conv(3, 8, 3, 2), nn.Linear(8, 4)

    def forward(self, x):
        with torch.no_grad():
            seen = self.features(x)
        return self.fc(seen.mean((2, 3)))


def test_a_layer_inside_no_grad_is_read_by_name_too():
    model, x = seeded(Probe), images(2, 3, 16, 16)
    automatic, named = explain(model, x, 0, ["hires_cam"]), explain(model, x, 0, ["hires_cam"], layer="features")
    assert torch.equal(automatic["hires_cam"], named["hires_cam"])
    assert close(named["hires_cam"].sum((1, 2, 3)) + model.fc.bias[0].detach(), named.logits[:, 0])
    inner = explain(model, x, 0, ["hires_cam"], layer="features.0")["hires_cam"]
    assert close(inner, named["hires_cam"])  # behind a ReLU activation times gradient is the same
    with pytest.raises(ValueError, match=r"'the images'; .* does not switch gradients off$"):
        explain(model, x, 0, ["saliency"])


def plain():
    parts = [*conv(3, 8, 3, 2), *conv(8, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*parts)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_in_one_line_where_layers_are_read():
    model, x = seeded(plain), images(1, 3, 32, 32)
    for compiled in (torch.jit.script(model), torch.jit.trace(model, x)):
        for asked in ({}, {"layer": "3"}, {"methods": ["attention"]}):
            with pytest.raises(
                ValueError, match=r"^expected a model of Python modules, .* of TorchScript; explain the"
            ):
                explain(compiled, x, 0, **asked)
        for method in ("saliency", "occlusion"):
            assert close(explain(model, x, 0, [method])[method], explain(compiled, x, 0, [method])[method])


@pytest.mark.filterwarnings("ignore")
def test_a_part_that_torchscript_has_compiled_leaves_the_others_readable():
    model, x = seeded(plain), images(1, 3, 32, 32)
    part = nn.Sequential(torch.jit.script(model[:2]), *model[2:])
    for layer, other in ((None, None), ("2", "3"), ("0", "1")):
        found, wanted = explain(part, x, 0, ["hires_cam"], layer), explain(model, x, 0, ["hires_cam"], other)
        assert close(wanted["hires_cam"], found["hires_cam"])
    with pytest.raises(ValueError, match=r"^expected a layer of Python, got '0.1' inside '0', .* name '0' itself$"):
        explain(part, x, 0, layer="0.1")
    assert not nn.modules.module._global_forward_hooks


@pytest.mark.filterwarnings("ignore")
def test_quantized_models_have_no_gradients_and_say_so():
    from torch.ao import quantization

    model, x = seeded(plain), images(1, 3, 32, 32)
    dynamic = quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for method in ("grad_cam", "saliency"):
        with pytest.raises(ValueError, match=r"^expected a model with gradients, got quantized layers \('6': Linear\)"):
            explain(dynamic, x, 0, [method])
    assert explain(dynamic, x, 0, ["occlusion"])["occlusion"].any()
    for layer in (None, "3"):
        wanted, found = (explain(m, x, 0, ["activation_map"], layer)["activation_map"] for m in (model, dynamic))
        assert torch.equal(wanted, found)


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_name_of_the_automatic_layer_can_be_given_back():
    class Unnamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.features(x).relu().mean((2, 3)))

    model, x = seeded(Unnamed), images(2, 3, 16, 16)
    found = explain(model, x, 0, ["hires_cam"])
    assert found.layer == "input of mean (8 x 14 x 14)"
    for layer in ("input of mean", found.layer):
        again = explain(model, x, 0, ["hires_cam"], layer=layer)
        assert again.layer == found.layer and torch.equal(again["hires_cam"], found["hires_cam"])
    assert explain(model, x, 0, layer="features (8 x 14 x 14)").layer == "features (8 x 14 x 14)"
    with pytest.raises(ValueError, match=r"^expected the name of a layer, got 'input of sum'; .* is 'input of mean'$"):
        explain(model, x, 0, layer="input of sum")


def test_a_guess_is_said():
    """A shuffle of the positions cannot be followed: what comes out has the shape of a map."""

    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.last, self.fc = conv(3, 8), nn.Identity(), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.last(self.features(x).roll(1, 3)).mean((2, 3)))

    found = explain(seeded(Rolled), images(1, 3, 8, 8), 0)
    assert found.layer == "last (8 x 8 x 8)"
    assert found.notices == (
        "where the positions lie in 'last' (8 x 8 x 8) was guessed from its shape: channels first; what made it could "
        "not be followed",
    )
    assert explain(seeded(Rolled), images(1, 3, 8, 8), 0, layer="last").notices == found.notices


# --- learned attention -----------------------------------------------------------------------------------------------


def test_attention_maps_need_no_logits():
    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.pool = nn.Conv2d(3, 8, 3), MILPooling(8)

        def forward(self, x):
            return {"embedding": self.pool(self.features(x))[:, None, :, None]}

    model, x = seeded(Embedding), images(2, 3, 8, 6)
    assert torch.equal(attention_maps(model, x)["pool"], model.pool.gate(model.features(x)).detach())


def test_a_bag_of_tiles_keeps_their_grid():
    class Bag(nn.Module):
        """The image in 4 x 3 tiles, each a vector."""

        def __init__(self):
            super().__init__()
            self.encoder, self.pool, self.fc = nn.Linear(3 * 16, 8), MILPooling(8), nn.Linear(8, 2)

        def forward(self, x):
            tiles = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
            return self.fc(self.pool.forward_bag(self.encoder(tiles)))

    model, x = seeded(Bag), images(2, 3, 16, 12)
    kept = []
    model.pool.gate.register_forward_hook(lambda m, i, o: kept.append(o.detach()))
    found = attention_maps(model, x)["pool"]
    assert kept[0].shape == (2, 1, 12, 1) and torch.equal(found, kept[0].view(2, 1, 4, 3))
    assert explain(model, x, 0, ["attention"]).layer == "pool (1 x 4 x 3)"


@pytest.mark.parametrize("queries", [1, 5, None])
def test_attention_with_queries_is_what_each_position_receives(queries):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.attend, self.fc = nn.Conv2d(3, 8, 2, 2), Attend(DotProduct()), nn.Linear(8, 2)
            self.queries = nn.Parameter(torch.randn(1, queries or 1, 8))

        def forward(self, x):
            keys = self.features(x).flatten(2).mT
            asked = keys if queries is None else self.queries.expand(len(x), -1, -1)
            return self.fc(self.attend(asked, keys, keys).mean(1))

    model, x = seeded(Asking), images(2, 3, 8, 12)
    kept = []
    model.attend.gate.register_forward_hook(lambda m, i, o: kept.append(o.detach()))
    found = attention_maps(model, x)["attend"]
    weights = kept[0].mean(1, keepdim=True) if queries is None else kept[0]
    assert torch.equal(found, weights.unflatten(2, (4, 6)))


@pytest.mark.parametrize("method", ["attention", "attention_rollout", "grad_cam"])
def test_transformers_of_videos(method):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.VideoMAEConfig(
        num_frames=4, tubelet_size=2, num_labels=3, image_size=32, patch_size=8, **sizes
    )
    model = seeded(transformers.VideoMAEForVideoClassification, config)

    class FramesSecond(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x.transpose(1, 2))

    video = images(1, 3, 4, 32, 32)
    assert explain(FramesSecond().eval(), video, 0, [method])[method].shape == (1, 1, 2, 4, 4)
    if method != "attention_rollout":
        with pytest.raises(ValueError, match=r"^expected a model that takes \(b, c, d, h, w\), got one whose second"):
            explain(model, video.transpose(1, 2), 0, [method])
