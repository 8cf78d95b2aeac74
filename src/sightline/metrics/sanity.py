"""Does the map depend on what the model learned and on the class? Does it share out the whole score?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sightline import maps as pixels
from sightline.checks import check_whole
from sightline.inference import (
    ForwardCall,
    Output,
    check_classes,
    copy_of,
    either,
    forward,
    forward_call,
    one_target_each,
    untouched,
)
from sightline.metrics.agreement import rank_correlation
from sightline.metrics.hiding import Fill, substitute
from sightline.metrics.inpainting import inpaint
from sightline.metrics.per_image import PerImageMean

Order = Literal["cascading", "independent"]
Explain = Callable[[nn.Module, Tensor, Tensor], Any]
"""(model, images, targets) -> maps (b, 1, h, w) or (b, 1, d, h, w), or a dict of such maps by method."""
Values = Float[Tensor, " b"] | dict[str, Float[Tensor, " b"]]
"""One value per image, or a dict of them by method where `explain` gives one."""


def parameter_randomization(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
    explain: Explain,
    *,
    order: Order = "cascading",
    stages: int = 8,
    seed: int = 0,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
) -> Values:
    """Rank correlation of |map| with |map of the model with shuffled weights|, -1 to 1; near 0 is good.

    Near 1 the map does not show what was learned. `order="cascading"`: all weights are shuffled, one more explanation;
    "independent": mean over `stages` groups of modules, shuffled one at a time, where it is defined. The class stays
    the one asked for. A map that is flat or has a value that is not finite (one pixel is flat), before or after, gives
    NaN; ties share their mean rank. `forward_args` and `forward_kwargs` are what the model takes beside the images, as
    for `explain`, to which this function leaves them.

    Raises:
        ValueError: an unknown `order`, less than one stage, a model without parameters.

    Source: Adebayo et al. 2018 (1810.03292), section 3.
    Differs: see `randomization_curve`.

    >>> from sightline.testing import LinearModel
    >>> model, image = LinearModel(torch.rand(2, 1, 2, 2)), torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> parameter_randomization(model, image, torch.tensor([0]), lambda model, images, targets: images)
    tensor([1.])
    """
    check_whole(stages=stages)
    stages = 1 if order == "cascading" else stages
    _, curves = randomization_curve(
        model,
        images,
        targets,
        explain,
        order=order,
        stages=stages,
        seed=seed,
        forward_args=forward_args,
        forward_kwargs=forward_kwargs,
    )
    return tree_map(lambda curve: curve.nanmean(1), curves)


def randomization_curve(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
    explain: Explain,
    *,
    order: Order = "cascading",
    stages: int = 8,
    seed: int = 0,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[str], Float[Tensor, "b n"] | dict[str, Float[Tensor, "b n"]]]:
    """Names of n <= `stages` groups of modules, and the rank correlation of |map| after each of them was shuffled.

    From the logits to the input, in the reverse order in which one forward reaches the modules. "cascading" keeps what
    was shuffled before, "independent" puts it back. Works on copies of the model; a hook on it is copied with it.

    Raises:
        ValueError: an unknown `order`, less than one stage, a model without parameters.

    Source: Adebayo et al. 2018 (1810.03292), sections 3.1 and 3.2.
    Differs: they draw the weights anew, here the entries of each parameter are shuffled: without its trained scale a
    batch-normalized network in eval mode explodes or vanishes, and no module needs an initialization that we know.
    Buffers stay, and so does a parameter whose entries are all equal.
    """
    if order not in get_args(Order):
        raise ValueError(f"expected order to be one of {', '.join(get_args(Order))}; got {order!r}")
    check_whole(stages=stages, seed=seed)
    if stages < 1:
        raise ValueError(f"expected at least 1 stage, got {stages}")
    one_target_each(targets, len(images))
    call = forward_call(images, None, forward_args, forward_kwargs).at(torch.zeros(1, dtype=torch.long))
    with untouched(model) as net, torch.inference_mode(False):
        groups = _top_down(net, images[:1], stages, call)
        generator = torch.Generator().manual_seed(seed)
        shuffled = {name: _shuffled(parameter.detach(), generator) for name, parameter in net.named_parameters()}
        maps = explain(net, images, targets)
        randomized, found = copy_of(net), list[Any]()
        for names in groups.values():
            if order == "independent":
                randomized = copy_of(net)
            with torch.no_grad():
                for name in names:
                    randomized.get_parameter(name).copy_(shuffled[name])
            found.append(tree_map(_similarity, maps, explain(randomized, images, targets)))
    return list(groups), tree_map(lambda *values: torch.stack(values, 1), *found)


def random_logit(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
    explain: Explain,
    *,
    seed: int = 0,
    output: Output = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
) -> Values:
    """Rank correlation of |map| with |map of another class|, -1 to 1; near 1 the map is the same whatever the class.

    Near 0 is good. The other class is random, but the same for all images of one target. Where two logits always are
    opposite, as in a model of two classes, the map of one class rightly is that of the other up to its sign and scores
    1. A map that is flat or has a value that is not finite (one pixel is flat) gives NaN; ties share their mean rank.
    `output`, `forward_args` and `forward_kwargs` are as for `explain`.

    Raises:
        ValueError: a target that is no class of the model.

    Source: Sixt et al. 2020 (1912.09818), random logit.
    Differs: rank correlation instead of structural similarity, as in `parameter_randomization`.

    >>> from sightline.testing import LinearModel
    >>> model, image = LinearModel(torch.tensor([[[[1.0, 2, 3]]], [[[1.0, 3, 2]]]])), torch.ones(1, 1, 1, 3)
    >>> random_logit(model, image, torch.tensor([0]), lambda model, images, targets: model.weight[targets])
    tensor([0.5000])
    """
    check_whole(seed=seed)
    call = forward_call(images, output, forward_args, forward_kwargs).at(torch.zeros(1, dtype=torch.long))
    classes = either(forward(model, images[:1], call=call)).shape[1]
    check_classes(one_target_each(targets, len(images)), classes)
    shifts = torch.randint(1, classes, (classes,), generator=torch.Generator().manual_seed(seed)).to(targets.device)
    others = (targets + shifts[targets]) % classes
    with untouched(model) as net:
        return tree_map(_similarity, explain(net, images, targets), explain(net, images, others))


def completeness(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
    maps: Float[Tensor, "b 1 *cells"],
    *,
    fill: Fill = "zero",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    output: Output = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
) -> Float[Tensor, " b"]:
    """Gap between the sum s of the map and the difference d of the target's logit to an image of `fill`, 0 to 1.

    |s - d| / (|s| + |d|): 0 is complete, 1/3 off by a factor of two, 1 of the wrong sign or a map that sums to nothing.
    The map is summed as it is, not resized. Of a single logit z target 1 has z, target 0 has -z. NaN where both are
    0 and for a value that is not finite. Only methods that promise it (integrated gradients, LRP, input x gradient of a
    network without biases) need to score well. `output`, `forward_args` and `forward_kwargs` are as for `explain`.

    Raises:
        ValueError: a target that is no class of the model, an unknown fill, or "black" without `mean` and `std`.

    Source: Sundararajan et al. 2017 (1703.01365), proposition 1.
    Differs: the paper has the identity s = d, we the size of its failure, divided so that a small d does not dominate a
    mean over images.

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[2.0, 4.0]]]])
    >>> completeness(LinearModel(torch.ones(2, 1, 1, 2)), image, torch.tensor([0]), 2 * image)
    tensor([0.3333])
    """
    if isinstance(fill, str) and fill == "inpaint":
        empty = inpaint(images, torch.ones_like(images[:, :1], dtype=torch.bool))
    else:
        empty = substitute(images, fill, mean, std)
    call, _ = forward_call(images, output, forward_args, forward_kwargs).settled(model, images)
    raw = torch.cat([forward(model, each, call=call) for each in (images, empty)]).double()
    logits = either(raw) * (2 if raw.shape[1] == 1 else 1)
    asked = check_classes(one_target_each(targets, len(images)), logits.shape[1]).to(raw.device)
    full, none = logits.gather(1, asked.repeat(2)[:, None])[:, 0].chunk(2)
    total = maps.double().flatten(1).sum(1).to(raw.device)
    gap = (total - (full - none)).abs() / (total.abs() + (full - none).abs())
    return gap.to(maps)


class ParameterRandomization(PerImageMean):
    """Mean `parameter_randomization`: a test, which ranks nothing."""

    function = staticmethod(parameter_randomization)
    sentence = "Do not use here, their maps stay much the same after one shuffle of the model's weights: {methods}"
    higher_is_better = None


class RandomLogit(PerImageMean):
    """Mean `random_logit`: a test, which ranks nothing."""

    function = staticmethod(random_logit)
    sentence = "Do not ask why one class and not another, the maps of two classes are much the same: {methods}"
    higher_is_better = None


class Completeness(PerImageMean):
    """Mean `completeness`: a description, since few methods promise it."""

    function = staticmethod(completeness)
    higher_is_better = None


def _similarity(maps: Float[Tensor, "b 1 *cells"], others: Float[Tensor, "b 1 *other_cells"]) -> Float[Tensor, " b"]:
    """Spearman's rank correlation of the absolute values."""
    others = pixels.resize(others.to(maps.device), tuple(maps.shape[2:]))
    return rank_correlation(maps.detach().abs(), others.detach().abs())


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(values.numel(), generator=generator).to(values.device)
    return values.flatten()[order].reshape(values.shape)


def _top_down(
    model: nn.Module, image: Float[Tensor, "1 c *grid"], stages: int, call: ForwardCall
) -> dict[str, list[str]]:
    """Names of parameters in at most `stages` groups, from the logits to the input, by first and last module."""
    owned: dict[str, list[str]] = {}
    for parameter, _ in model.named_parameters():
        owned.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    if not owned:
        raise ValueError(f"expected a model with parameters, got none in {type(model).__name__}; drop this metric")
    reached: dict[str, int] = {}
    probe = copy_of(model)

    def mark(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            reached.setdefault(name, len(reached))

        return hook

    for name, module in probe.named_modules():
        module.register_forward_pre_hook(mark(name))
    with untouched(probe) as net, torch.no_grad():
        call.raw(net, image)

    def place(name: str) -> int:  # weights may be read without a call, as those of the projection in nn's attention
        while name not in reached:
            name = name.rpartition(".")[0]
        return reached[name]

    modules = sorted(owned, key=place)[::-1]
    count = min(stages, len(modules))
    groups = [modules[len(modules) * i // count : len(modules) * (i + 1) // count] for i in range(count)]
    titles = [[name or type(model).__name__ for name in dict.fromkeys((group[0], group[-1]))] for group in groups]
    return {" to ".join(t): [p for name in group for p in owned[name]] for t, group in zip(titles, groups, strict=True)}
