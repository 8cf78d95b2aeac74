"""Attention of anybody's transformer and the rollouts, against a transformer written out with loops."""

import pytest
import timm
import torch
from tests.reference import rollout as reference
from torch import nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sightline.explainers import explain
from sightline.explainers.rollout import attention_rollout, gradient_rollout
from sightline.explainers.scorer import Scorer
from sightline.explainers.tokens import AttentionWeights, patch_maps
from sightline.inference import logits_of
from sightline.models.vit import TinyViT

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32} | {
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}


def drawn(build, seed=0, dtype=torch.float64):
    """A model whose attention is far from even: every parameter but those of the norms is drawn large."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().to(dtype).eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "norm" not in name and "ln" not in name:
                    value.normal_(0, 0.5)
    return model


def images(batch=2, size=(16, 16), dtype=torch.float64):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def begun(model, x, targets=None, **options):
    score = Scorer(model, targets, **options)
    with torch.no_grad():
        score.begin(x)
    return score


def maps_of(explainer, model, x, targets=None, differentiable=False, **options):
    score = begun(model, x, targets, differentiable=differentiable)
    return explainer.formula(images=x, targets=score.targets, score=score, **options)


def pair(module):
    return module.weight, module.bias


def thirds(weight, bias):
    return list(zip(weight.chunk(3), bias.chunk(3), strict=True))


def build_timm(name="vit_tiny_patch16_224", fused=True, **options):
    options = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2} | options
    model = timm.create_model(name, num_classes=5, **options)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def build_torchvision():
    return VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )


def build_hugging_face(attention):
    return ViTForImageClassification(ViTConfig(**TINY, attn_implementation=attention))


def build_tiny():
    return TinyViT(5, width=16, depth=2, heads=2, patch=8, size=16)


def parameters_of(model):
    """What the written-out transformer needs, under whatever names the library keeps it."""
    if isinstance(model, ViTForImageClassification):
        embeddings = model.vit.embeddings
        layers = [
            {
                "norm1": pair(block.layernorm_before),
                "qkv": [pair(getattr(block.attention, f"{part}_proj")) for part in "qkv"],
                "project": pair(block.attention.o_proj),
                "norm2": pair(block.layernorm_after),
                "up": pair(block.mlp.fc1),
                "down": pair(block.mlp.fc2),
            }
            for block in model.vit.layers
        ]
        return {
            "patches": pair(embeddings.patch_embeddings.projection),
            "prefix": embeddings.cls_token[0],
            "positions": embeddings.position_embeddings[0],
            "layers": layers,
            "norm": pair(model.vit.layernorm),
            "eps": model.config.layer_norm_eps,
            "readers": [([0], model.classifier)],
        }
    if isinstance(model, VisionTransformer):
        layers = [
            {
                "norm1": pair(block.ln_1),
                "qkv": thirds(block.self_attention.in_proj_weight, block.self_attention.in_proj_bias),
                "project": pair(block.self_attention.out_proj),
                "norm2": pair(block.ln_2),
                "up": pair(block.mlp[0]),
                "down": pair(block.mlp[3]),
            }
            for block in model.encoder.layers
        ]
        return {
            "patches": pair(model.conv_proj),
            "prefix": model.class_token[0],
            "positions": model.encoder.pos_embedding[0],
            "layers": layers,
            "norm": pair(model.encoder.ln),
            "eps": 1e-6,
            "readers": [([0], model.heads)],
        }
    patches = pair(model.patch_embed.proj)
    names = [name for name in ("cls_token", "dist_token", "reg_token") if getattr(model, name, None) is not None]
    prefix = torch.cat([getattr(model, name)[0] for name in names]) if names else torch.zeros(0, 16)
    positions = model.pos_embed[0]
    missing = len(prefix) + 4 - len(positions)  # registers have none
    if missing:
        own = 0 if model.no_embed_class else 1
        gap = torch.zeros(missing, 16, dtype=positions.dtype)
        positions = torch.cat([positions[:own], gap, positions[own:]])
    patch_places = range(len(prefix), len(prefix) + 4)
    readers = [([0], model.head)] if model.global_pool == "token" else [(list(patch_places), model.head)]
    if hasattr(model, "head_dist"):
        readers.append(([1], model.head_dist))
    layers = [
        {
            "norm1": pair(block.norm1),
            "qkv": thirds(*pair(block.attn.qkv)),
            "project": pair(block.attn.proj),
            "norm2": pair(block.norm2),
            "up": pair(block.mlp.fc1),
            "down": pair(block.mlp.fc2),
        }
        for block in model.blocks
    ]
    norm = {"norm": pair(model.norm), "eps": 1e-6}
    return {"patches": patches, "prefix": prefix, "positions": positions, "layers": layers, "readers": readers} | norm


CASES = {
    "timm fused": (build_timm, "blocks.{}.attn"),
    "timm plain": (lambda: build_timm(fused=False), "blocks.{}.attn"),
    "timm mean": (lambda: build_timm(global_pool="avg", final_norm=True, fc_norm=False), "blocks.{}.attn"),
    "timm mean without class token": (
        lambda: build_timm(global_pool="avg", class_token=False, final_norm=True, fc_norm=False),
        "blocks.{}.attn",
    ),
    "timm registers": (lambda: build_timm(reg_tokens=5), "blocks.{}.attn"),
    "timm deit distilled": (lambda: build_timm("deit_tiny_distilled_patch16_224"), "blocks.{}.attn"),
    "torchvision": (build_torchvision, "encoder.layers.encoder_layer_{}.self_attention"),
    "hugging face sdpa": (lambda: build_hugging_face("sdpa"), "vit.layers.{}.attention"),
    "hugging face eager": (lambda: build_hugging_face("eager"), "vit.layers.{}.attention"),
    "sightline": (build_tiny, "blocks.{}.attn"),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_gradients_and_rollouts_are_those_of_the_written_out_transformer(case):
    build, names = CASES[case]
    model, x, targets = drawn(build), images(), torch.tensor([[3, 0], [1, 4]])
    with AttentionWeights(model) as seen:
        logits = logits_of(model(x))
    assert [name for name, _ in seen.weights] == [names.format(0), names.format(1)]
    p = parameters_of(model) | {"heads": 2}
    from_first, precision = "mean" not in case, 1e-5 if "eager" in case else 1e-10  # its softmax is in float32
    assert (seen.grid, seen.prefix, seen.from_first, seen.obstacle) == ((2, 2), len(p["prefix"]), from_first, "")
    torch.testing.assert_close(logits, logits_of(model(x)), rtol=0, atol=precision)
    rolled = {heads: maps_of(attention_rollout, model, x, targets, heads=heads) for heads in ("mean", "max", "min")}
    raised = maps_of(gradient_rollout, model, x, targets)
    for index, image in enumerate(x):
        wanted, attention = reference.transformer(image, p)
        torch.testing.assert_close(logits[index], wanted, rtol=0, atol=precision)
        stacked = [torch.stack(maps).detach() for maps in attention]
        for (_, got), maps in zip(seen.weights, stacked, strict=True):
            assert maps.std() > 0.05
            torch.testing.assert_close(got[index].double(), maps, rtol=0, atol=precision)
        for heads, got in rolled.items():
            expected = reference.attention_rollout(stacked, len(p["prefix"]), (2, 2), from_first, heads)
            assert expected.std() > 1e-4
            for column in got[index]:
                torch.testing.assert_close(column, expected, rtol=0, atol=precision * expected.abs().max().item())
        for column, target in enumerate(targets[index]):
            leaves = [head for maps in attention for head in maps]
            slopes = torch.autograd.grad(wanted[target], leaves, retain_graph=True)
            layers = [torch.stack(slopes[:2]), torch.stack(slopes[2:])]
            expected = reference.gradient_rollout(stacked, layers, len(p["prefix"]), (2, 2), from_first)
            assert expected.std() > 1e-4
            torch.testing.assert_close(
                raised[index, column], expected, rtol=0, atol=precision * expected.abs().max().item()
            )


def test_several_targets_batches_and_float32():
    model, x = drawn(build_timm, dtype=torch.float32), images(3, dtype=torch.float32)
    for explainer in (attention_rollout, gradient_rollout):
        together = maps_of(explainer, model, x, torch.tensor([[0, 4, 2]] * 3))
        assert together.dtype == torch.float32 and not together.requires_grad and together.shape == (3, 3, 2, 2)
        bound = 1e-5 * together.max().item()
        for column, target in enumerate((0, 4, 2)):
            alone = torch.cat([maps_of(explainer, model, image[None], target) for image in x])
            torch.testing.assert_close(together[:, [column]], alone, rtol=0, atol=bound)
    assert not torch.allclose(together[:, 0], together[:, 1])
    half = maps_of(gradient_rollout, drawn(build_timm, dtype=torch.bfloat16), x.bfloat16(), 1)
    assert half.dtype == torch.float32 and half.isfinite().all()


class Even(nn.Module):
    """Attends evenly and adds the mean token to each."""

    def forward(self, tokens):
        same = torch.zeros_like(tokens)
        return tokens + F.scaled_dot_product_attention(same, same, tokens)


class Evens(nn.Module):
    """A class token, which is zero, a token per pixel, some layers; two logits: the class token and its negative."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(F.pad(x.flatten(2).mT, (0, 0, 1, 0)))[:, 0] @ x.new_tensor([[1.0, -1.0]])


def test_even_attention_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [-3.0, 5.0]]]])
    one, two, shared = Evens(Even()), Evens(Even(), Even()), Evens(*[Even()] * 2)
    torch.testing.assert_close(maps_of(attention_rollout, one, x), torch.full((1, 1, 2, 2), 0.1))
    torch.testing.assert_close(maps_of(attention_rollout, two, x), torch.full((1, 1, 2, 2), 0.15))  # (1 - 1/4) / 5
    got = maps_of(gradient_rollout, one, x, torch.tensor([[0, 1]]))
    wanted = torch.tensor([[[1.0, 2.0], [0.0, 5.0]], [[0.0, 0.0], [3.0, 0.0]]]) / 5  # the positive part of value / 5
    torch.testing.assert_close(got[0], wanted)
    with pytest.raises(ValueError, match=r"two attentions in 'layers.0'"):
        maps_of(attention_rollout, shared, x)


def test_who_reads_is_seen_behind_the_last_attention():
    class Early(nn.Module):
        def __init__(self, pick):
            super().__init__()
            self.first, self.second, self.pick = Even(), Even(), pick

        def forward(self, x):
            tokens = self.first(F.pad(x.flatten(2).mT, (0, 0, 1, 0)))
            tokens = self.second(tokens + tokens[:, 0, None])
            return self.pick(tokens).repeat(1, 2)

    x = torch.ones(2, 1, 2, 2)
    for pick, from_first in [
        (lambda tokens: tokens.mean(1), False),
        (lambda tokens: tokens[:, 1:].mean(1), False),
        (lambda tokens: tokens[:, 1], False),
        (lambda tokens: tokens[:, 0], True),
        (lambda tokens: tokens[:, :1].flatten(1), True),
        (lambda tokens: tokens.select(1, 0), True),
        (lambda tokens: tokens.transpose(0, 1)[0], True),
    ]:
        with AttentionWeights(model := Early(pick)) as seen:
            model(x)
        assert seen.from_first == from_first and seen.prefix == 1


def options_of_attention():
    n = 5
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return {
        "plain": {},
        "scale": {"scale": 0.3},
        "causal": {"is_causal": True},
        "bias": {"attn_mask": bias},
        "mask": {"attn_mask": (bias > 0) | torch.eye(n, dtype=torch.bool)},
        "groups": {"enable_gqa": True},
        "dropout": {"dropout_p": 1.0},
    }


@pytest.mark.parametrize("name", options_of_attention())
def test_every_option_of_the_fused_attention(name):
    options = options_of_attention()[name]
    key_heads = 2 if name == "groups" else 4

    class Net(nn.Module):
        def forward(self, x):
            tokens = F.pad(x.flatten(2).mT, (0, 0, 1, 0), value=0.5)
            query = tokens.unflatten(2, (4, 2)).transpose(1, 2)
            key = value = query[:, :key_heads]
            mixed = F.scaled_dot_product_attention(query, key, value, **options)
            return mixed.transpose(1, 2).flatten(2)[:, 0]

    x = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with AttentionWeights(net := Net()) as seen:
        got = net(x)
    torch.testing.assert_close(got, net(x), rtol=0, atol=1e-10)
    ((_, weights),) = seen.weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    if name == "causal":
        assert not weights.triu(1).any()


class Encoder(nn.Module):
    """PyTorch's own encoder, whose fast path for eval mode shows no weights."""

    def __init__(self, batch_first=True, need_weights=False):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.batch_first, self.need_weights = batch_first, need_weights
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first), 2, enable_nested_tensor=False
        )
        self.last = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), self.patches(x).flatten(2).mT], 1)
        tokens = self.encoder(tokens if self.batch_first else tokens.transpose(0, 1))
        tokens = tokens + self.last(tokens, tokens, tokens, need_weights=self.need_weights)[0]
        return self.head(tokens[:, 0] if self.batch_first else tokens[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_the_encoder_of_pytorch(batch_first, need_weights):
    model, x = drawn(lambda: Encoder(batch_first, need_weights)), images(3)
    with torch.no_grad():
        plain = model(x)
        with AttentionWeights(model) as seen:
            torch.testing.assert_close(model(x), plain, rtol=0, atol=1e-10)
    assert [name for name, _ in seen.weights] == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "last"]
    assert (seen.grid, seen.prefix, seen.from_first) == ((2, 2), 1, True)
    tokens = []
    handle = model.last.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    (of_last,) = tokens
    with torch.no_grad():
        wanted = model.last(of_last, of_last, of_last, average_attn_weights=False)[1]
    torch.testing.assert_close(seen.weights[-1][1], wanted, rtol=0, atol=1e-10)
    with AttentionWeights(model) as seen:
        logits = model(x)
    assert all(g.any() for g in torch.autograd.grad(logits[:, 0].sum(), [w for _, w in seen.weights]))


def test_images_of_another_shape_and_of_three_dimensions():
    model, x = drawn(lambda: build_timm(dynamic_img_size=True)), images(size=(24, 16))
    assert maps_of(attention_rollout, model, x).shape == (2, 1, 3, 2)

    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv3d(1, 4, 2, 2)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            tokens = self.patches(x).flatten(2).mT
            return self.attention(tokens, tokens, tokens)[0].mean(1)

    volume = torch.randn(2, 1, 4, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rolled = maps_of(attention_rollout, drawn(Volume), volume)
    assert rolled.shape == (2, 1, 2, 3, 1)
    torch.testing.assert_close(rolled.sum((2, 3, 4)), torch.ones(2, 1, dtype=torch.float64))


def test_registers_of_hugging_face_and_rows_that_sum_to_one():
    model = drawn(lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**TINY)))
    with AttentionWeights(model) as seen:
        model(images())
    assert (seen.grid, seen.prefix, seen.from_first, seen.obstacle) == ((2, 2), 5, True, "")
    for _, weights in seen.weights:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))


def test_patch_maps_are_rows_of_the_weights():
    model, x, found = drawn(build_torchvision), images(), {}

    with patch_maps(model, found.setdefault):
        model(x)
    with AttentionWeights(model) as seen:
        model(x)
    assert list(found) == [name for name, _ in seen.weights]
    for name, weights in seen.weights:
        torch.testing.assert_close(found[name], weights[:, :, 0, 1:].unflatten(2, (2, 2)), rtol=0, atol=1e-12)
    with patch_maps(tiny := drawn(build_tiny), found.setdefault):  # its gates yield their maps themselves
        tiny(x)
    with patch_maps(shared := Evens(*[Even()] * 2), found.setdefault):
        shared(x[:, :1])
    assert len(found) == 2


def test_a_gate_that_somebody_listens_to_is_not_seen_twice():
    model, x = drawn(build_tiny), images()
    wanted = maps_of(attention_rollout, model, x)
    handle = model.blocks[0].attn.gate.register_forward_hook(lambda *_: None)
    assert torch.equal(maps_of(attention_rollout, model, x), wanted)
    handle.remove()


def test_windows_are_passed_over_even_where_one_is_the_whole_map():
    with AttentionWeights(model := drawn(build_swin)) as seen:
        model(images(4, (56, 56)))
    assert seen.weights == []


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, x = drawn(build_timm).train(), images()
    model.blocks[0].attn.fused_attn = False
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = model.blocks[1].register_forward_hook(lambda *_: 1 / 0) if fails else None
    score = Scorer(model, 1)
    score.targets = torch.ones(2, 1, dtype=torch.long)
    state = torch.get_rng_state()
    for explainer in (attention_rollout, gradient_rollout):
        with torch.no_grad():
            if fails:
                with pytest.raises(ZeroDivisionError):
                    explainer.formula(images=x, targets=score.targets, score=score)
            else:
                assert explainer.formula(images=x, targets=score.targets, score=score).any()
    if handle:
        handle.remove()
    assert torch.equal(state, torch.get_rng_state()) and not x.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert [block.attn.fused_attn for block in model.blocks] == [False, True]
    assert not torch.overrides._get_current_function_mode_stack()


def test_frozen_models_and_maps_in_a_loss():
    model, x = drawn(build_timm).requires_grad_(False), images(1)
    wanted = maps_of(gradient_rollout, model, x, 2)
    assert wanted.any()
    for explainer in (attention_rollout, gradient_rollout):
        assert torch.autograd.gradcheck(
            lambda x, e=explainer: maps_of(e, model, x, 2, differentiable=True).square().sum(),
            x[..., :8, :8].repeat(1, 1, 2, 2).requires_grad_(),
            fast_mode=True,
        )


class Bottleneck(nn.Module):
    """Attention between the positions of a feature map, then a convolution: no transformer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x):
        tokens = x.flatten(2).mT
        mixed = self.attention(tokens, tokens, tokens)[0]
        return self.conv(mixed.mT.unflatten(2, x.shape[2:])).mean((2, 3))


def build_swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=6, depths=(1, 1), num_heads=(1, 1), num_classes=5
    )


@pytest.mark.parametrize("explainer", [attention_rollout, gradient_rollout])
@pytest.mark.parametrize(
    ("build", "size", "found"),
    [
        (build_swin, (56, 56), "SwinTransformer with 49 queries and 49 keys in 'layers.0.blocks.0.attn'"),
        (lambda: timm.create_model("resnet10t", num_classes=5), (32, 32), "ResNet with none that could be seen"),
        (Bottleneck, (4, 4), "Bottleneck with a convolution behind the attention of 'attention'"),
        (
            lambda: build_timm("vit_base_patch16_siglip_224"),
            (16, 16),
            "VisionTransformer with 1 queries and 4 keys in 'attn_pool'",
        ),
    ],
)
def test_other_networks_are_one_clear_line(explainer, build, size, found):
    message = f"expected a transformer whose attention is between all its tokens and feeds the logits, got {found}; try"
    with pytest.raises(ValueError, match=message):
        maps_of(explainer, drawn(build), images(size=size), 1)


@pytest.mark.usefixtures("unchecked")
def test_unknown_heads_are_one_clear_line():
    with pytest.raises(ValueError, match="expected heads 'mean', 'max' or 'min', got 'sum'; choose one of them"):
        maps_of(attention_rollout, drawn(build_timm), images(), heads="sum")


def test_a_map_that_ignores_the_class_is_said_to():
    found = explain(
        drawn(build_tiny, dtype=torch.float32).eval(),
        images(dtype=torch.float32),
        0,
        [attention_rollout, gradient_rollout],
    )
    assert found.verdicts["attention_rollout"] == [["class-independent"]] * 2
    assert not any("class-independent" in said for said in found.verdicts["gradient_rollout"])
    assert found.unchecked == ("gradient_rollout",)
