"""The small vision transformer, against timm's, and the attention that is read from timm's own."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import sightline as sl
from sightline.data.clutter import compose
from sightline.explainers import attention_maps
from sightline.models import vit
from sightline.models.vit import TinyViT


def seeded(build, **options):
    torch.manual_seed(0)
    return build(**options)


def images(*size, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def timm_vit(name="vit_tiny_patch16_224", **options):
    """A timm transformer whose attention is far from even: its weights are drawn larger than at the start."""
    model = seeded(timm.create_model, model_name=name, **{"num_classes": 5, "img_size": 32, "depth": 2, **options})
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "qkv" in key or key in ("cls_token", "pos_embed"):
                value.normal_(0, 0.3)
    return model.eval()


def weights_by_hand(model, x):
    """Attention (b, heads, n, n) of each block of a timm ViT, from the inputs of the blocks and the weights of qkv."""
    found = {}

    def hook(name, block):
        def keep(module, inputs):
            tokens, heads = inputs[0], block.num_heads
            parts = zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True)
            q, k, _ = (tokens @ part.T + b for part, b in parts)
            d = q.shape[2] // heads
            of = []
            for head in range(heads):
                at = slice(head * d, (head + 1) * d)
                exponentials = torch.einsum("bid,bjd->bij", q[..., at], k[..., at]).div(d**0.5).exp()
                of.append(exponentials / exponentials.sum(2, keepdim=True))
            found[name] = torch.stack(of, 1)

        return keep

    handles = [m.register_forward_pre_hook(hook(n, m)) for n, m in model.named_modules() if n.endswith("attn")]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def test_logits_are_those_of_plain_timm_with_the_same_weights():
    model = seeded(TinyViT, depth=3).double().eval()
    official = timm.models.VisionTransformer(
        img_size=40, patch_size=5, num_classes=10, embed_dim=64, depth=3, num_heads=4, no_embed_class=True
    )
    official = official.double().eval()
    official.load_state_dict(model.state_dict())
    x = images(40, 40, dtype=torch.float64)
    torch.testing.assert_close(model(x), official(x), rtol=0, atol=1e-10)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in official.parameters())


def test_weights_by_the_names_of_version_0_1_load(tmp_path):
    model = seeded(TinyViT, depth=2)
    old = {}
    for name, values in model.state_dict().items():
        for before, now in vit._OLD_NAMES.items():
            name = name.replace(now, before)
        old[name] = values.mT.unflatten(2, (8, 8)).contiguous() if name == "positions" else values
    assert {"patches.weight", "class_token", "positions", "blocks.1.attention.qkv.weight"} <= old.keys()
    assert {"blocks.0.attention.project.bias", "blocks.1.perceptron.2.weight", "head.bias"} <= old.keys()
    assert not {"patch_embed.proj.weight", "blocks.0.attn.proj.bias"} & old.keys()
    save_file(old, tmp_path / "old.safetensors")
    loaded = sl.create_model("tiny_vit", depth=2, weights=tmp_path / "old.safetensors")
    for name, values in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], values), name


def test_the_gate_is_what_the_class_token_reads():
    model = seeded(TinyViT).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(10)
    x = images(40, 40)
    maps = attention_maps(model, x)
    assert list(maps) == [f"blocks.{i}.attn" for i in range(4)]
    seen = []
    attention = model.blocks[3].attn
    handle = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
        handle.remove()
        official = nn.MultiheadAttention(64, 4, batch_first=True)
        official.in_proj_weight.copy_(attention.qkv.weight)
        official.in_proj_bias.copy_(attention.qkv.bias)
        weights = official(seen[0], seen[0], seen[0], average_attn_weights=False)[1]
    wanted = weights[:, :, 0, 1:].unflatten(2, (8, 8))
    assert wanted.std() > 1e-3
    torch.testing.assert_close(maps["blocks.3.attn"], wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(maps["blocks.3.attn"].sum((2, 3)), 1 - weights[:, :, 0, 0])
    torch.testing.assert_close(sl.explain(model, x, methods=["attention"])["attention"], wanted.mean(1, keepdim=True))


def test_other_sizes_pass_and_single_images_change_nothing():
    model = seeded(TinyViT, num_classes=3, width=8, heads=2, depth=2).eval()
    for size in ((40, 40), (56, 40), (33, 7), (1, 1), (100, 30)):
        x = images(*size, batch=3)
        logits = model(x)
        assert logits.shape == (3, 3) and logits.isfinite().all()
        torch.testing.assert_close(torch.cat([model(x[i : i + 1]) for i in range(3)]), logits, rtol=0, atol=1e-6)
        grid = -(-size[0] // 5), -(-size[1] // 5)
        assert attention_maps(model, x)["blocks.1.attn"].shape == (3, 2, *grid)
    model.bfloat16()
    assert model(images(56, 40).bfloat16()).dtype == torch.bfloat16


def test_it_knows_where_a_patch_is_and_has_one_map_position_per_patch():
    model = seeded(TinyViT).eval()
    with torch.no_grad():
        model.pos_embed.mul_(50)
        x = torch.zeros(1, 3, 40, 40)
        x[..., 10:15, 25:30] = 3.0
        shifted = x.roll((5, 5), (2, 3))
        assert not torch.allclose(model(x), model(shifted), atol=1e-4)
        model.pos_embed.zero_()
        torch.testing.assert_close(model(x), model(shifted))
        before, after = (attention_maps(model, y)["blocks.0.attn"] for y in (x, shifted))
    torch.testing.assert_close(after, before.roll((1, 1), (2, 3)))
    rest = before.clone()
    rest[:, :, 2, 5] = before[:, :, 0, 0]
    assert torch.allclose(rest, before[:, :, :1, :1].expand_as(rest)) and not torch.allclose(rest, before)


def test_it_overfits_64_images_of_clutter():
    indices = np.arange(64)
    pixels, _, _ = compose(0, "train", indices)
    x, y = torch.from_numpy(pixels).float().div(255).sub(0.3).div(0.2), torch.from_numpy(indices % 10)
    model = seeded(TinyViT, depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accuracy = 0.0
    for _ in range(90):
        logits = model(x)
        if (accuracy := (logits.argmax(1) == y).double().mean().item()) == 1:
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, y).backward()
        optimizer.step()
    assert accuracy == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10}, "expected heads that divide width 10, got 4; choose"),
        ({"heads": 0}, "expected heads that divide width 64, got 0; choose"),
        ({"patch": 7}, "expected a patch that divides size 40, got 7; choose"),
        ({"patch": 0}, "expected a patch that divides size 40, got 0; choose"),
        ({"size": 0}, "expected a patch that divides size 0, got 5; choose"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        TinyViT(**options)


@pytest.mark.compile
def test_compile_and_export():
    model, x = seeded(TinyViT, depth=2).eval(), images(40, 40)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    torch.testing.assert_close(exported.module()(images(40, 40, batch=3)), model(images(40, 40, batch=3)))


@pytest.mark.parametrize(
    ("name", "options", "size", "grid"),
    [
        ("vit_tiny_patch16_224", {}, (32, 32), (2, 2)),
        ("vit_tiny_patch16_224", {"patch_size": 8, "dynamic_img_size": True}, (48, 24), (6, 3)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}, (45, 18), (3, 2)),
        ("vit_tiny_patch16_224", {"reg_tokens": 3}, (32, 32), (2, 2)),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, (32, 32), (2, 2)),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, (32, 32), (2, 2)),
        ("deit_tiny_distilled_patch16_224", {}, (32, 32), (2, 2)),
    ],
)
def test_timm_attention_is_that_of_the_weights_by_hand(name, options, size, grid):
    model, x = timm_vit(name, **options), images(*size)
    maps = attention_maps(model, x)
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn"]
    for key, weights in weights_by_hand(model, x).items():
        prefix = weights.shape[2] - grid[0] * grid[1]
        assert prefix == model.num_prefix_tokens
        rows = weights[:, :, prefix:].mean(2) if options.get("global_pool") == "avg" else weights[:, :, 0]
        wanted = rows[:, :, prefix:].unflatten(2, grid)
        assert wanted.std() > 1e-3
        torch.testing.assert_close(maps[key], wanted, rtol=0, atol=1e-5)
    got = sl.explain(model, x, targets=1, methods=["attention"])
    torch.testing.assert_close(got["attention"], maps["blocks.1.attn"].mean(1, keepdim=True))
    first = sl.explain(model, x, methods=["attention"], layer="blocks.0.attn")["attention"]
    torch.testing.assert_close(first, maps["blocks.0.attn"].mean(1, keepdim=True))


def test_a_wrapped_transformer_that_resizes_is_read_too():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = timm_vit()

        def forward(self, x):
            return self.vit(nn.functional.interpolate(x, (32, 32)))

    model = Wrapper()
    maps = attention_maps(model, images(64, 96))
    assert {name: tuple(m.shape) for name, m in maps.items()} == dict.fromkeys(
        ["vit.blocks.0.attn", "vit.blocks.1.attn"], (2, 3, 2, 2)
    )


@pytest.mark.parametrize("fails", [False, True])
def test_reading_attention_switches_nothing(fails):
    model = timm_vit().train()
    model.blocks[1].attn.fused_attn = False
    seen = []
    handle = model.head.register_forward_pre_hook(lambda *_: seen.append([b.attn.fused_attn for b in model.blocks]))
    if fails:
        broken = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attention_maps(model, images(32, 32))
        broken.remove()
    else:
        attention_maps(model, images(32, 32))
        assert seen == [[True, False]]
    handle.remove()
    assert [b.attn.fused_attn for b in model.blocks] == [True, False]
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_windows_and_plain_networks_have_no_patch_maps():
    swin = seeded(timm.create_model, model_name="swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1)).eval()
    assert attention_maps(swin, images(56, 56, batch=4)) == {}
    fused = timm_vit()
    assert sl.explain(fused, images(32, 32), methods=["activation_map"], layer="patch_embed.proj").layers
    with pytest.raises(ValueError, match="blocks of this model: none"):
        sl.explain(swin, images(56, 56), methods=["attention"])
