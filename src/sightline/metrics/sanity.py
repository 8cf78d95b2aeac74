"""Does the map depend on what the model learned, and on the class?"""

from collections.abc import Callable, Mapping
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
from sightline.metrics.per_image import mean_of, metric

__all__ = [
    "ParameterRandomization",
    "RandomLogit",
    "parameter_randomization",
    "random_logit",
    "randomization_curve",
]

Order = Literal["cascading", "independent"]
Explain = Callable[[nn.Module, Tensor, Tensor], Any]
"""(model, images, targets) -> maps (b, 1, h, w) or (b, 1, d, h, w), or a dict of such maps by method."""
Values = Float[Tensor, " b"] | dict[str, Float[Tensor, " b"]]
"""One value per image, or a dict of them by method where `explain` gives one."""


@metric(
    "neither",
    "Do not use {methods} here: such maps stay much the same when the model's weights are shuffled",
    explanations=2,
)
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

    Near 1 the map does not show what the model learned. `order="cascading"` shuffles all weights, which takes one more
    explanation; "independent" is the mean over `stages` groups of modules, shuffled one at a time, where it is defined.
    The class stays the same. A map that is flat (as is a single pixel) or has a value that is not finite, before or
    after, gives NaN; ties share their mean rank. `forward_args` and `forward_kwargs` are the further arguments of the
    model, as for `explain`; this function does not pass them to `explain`.

    Raises:
        ValueError: an unknown `order`, less than one stage, a model without parameters.

    Source: Adebayo et al. 2018 (1810.03292), section 3.
    Differs: see `randomization_curve`.
    Elsewhere: `MPRT` (Quantus).

    >>> from sightline.testing import LinearModel
    >>> model, image = LinearModel(torch.rand(2, 1, 2, 2)), torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> parameter_randomization(model, image, torch.tensor([0]), lambda model, images, targets: images)
    tensor([1.])
    """
    check_whole(stages=stages)
    more: dict[str, Any] = {"forward_args": forward_args, "forward_kwargs": forward_kwargs, "seed": seed}
    stages = 1 if order == "cascading" else stages
    _, curves = randomization_curve(model, images, targets, explain, order=order, stages=stages, **more)
    return tree_map(lambda curve: curve.nanmean(1), curves)


ParameterRandomization = mean_of(parameter_randomization, "ParameterRandomization")


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

    The groups go from the logits to the input, in reverse order of one forward. "cascading" keeps earlier groups
    shuffled, "independent" restores them. Works on copies of the model; hooks are copied with it.

    Raises:
        ValueError: an unknown `order`, less than one stage, a model without parameters.

    Source: Adebayo et al. 2018 (1810.03292), sections 3.1 and 3.2.
    Differs: they draw new weights, here the entries of each parameter are shuffled: without its trained scale a
    batch-normalized network in eval mode explodes or vanishes, and no module needs a known initialization. Buffers stay
    unchanged, and so does a parameter whose entries are all equal.
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
        randomized, similarities = copy_of(net), list[Any]()
        for names in groups.values():
            if order == "independent":
                randomized = copy_of(net)
            with torch.no_grad():
                for name in names:
                    randomized.get_parameter(name).copy_(shuffled[name])
            similarities.append(tree_map(_similarity, maps, explain(randomized, images, targets)))
    return list(groups), tree_map(lambda *values: torch.stack(values, 1), *similarities)


@metric(
    "neither",
    "Do not ask {methods} why one class and not another: the maps of two classes are much the same",
    explanations=2,
)
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
    """Rank correlation of |map| with |map of another class|, -1 to 1; near 1 the map is the same for every class.

    Near 0 is good. The other class is random, but the same for all images of one target. Where two logits are always
    opposite, as in a model of two classes, the map of one class correctly equals that of the other up to its sign and
    scores 1. A map that is flat (as is a single pixel) or has a value that is not finite gives NaN; ties share their
    mean rank. `output`, `forward_args` and `forward_kwargs` are as for `explain`.

    Raises:
        ValueError: a target that is no class of the model.

    Source: Sixt et al. 2020 (1912.09818), random logit.
    Differs: rank correlation instead of structural similarity, as in `parameter_randomization`.
    Elsewhere: `RandomLogit` (Quantus).

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


RandomLogit = mean_of(random_logit, "RandomLogit")


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
    parameters: dict[str, list[str]] = {}
    for parameter, _ in model.named_parameters():
        parameters.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    if not parameters:
        raise ValueError(f"expected a model with parameters, got none in {type(model).__name__}; drop this metric")
    reached: list[str] = []
    probe = copy_of(model)
    for name, module in probe.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: reached.append(name))
    with untouched(probe) as net, torch.no_grad():
        call.raw(net, image)

    def place(name: str) -> int:  # weights may be read without a call, like the projection in nn's attention
        while name not in reached:
            name = name.rpartition(".")[0]
        return reached.index(name)

    modules = sorted(parameters, key=place)[::-1]
    count = min(stages, len(modules))
    groups = [modules[len(modules) * i // count : len(modules) * (i + 1) // count] for i in range(count)]
    titles = [dict.fromkeys(name or type(model).__name__ for name in (group[0], group[-1])) for group in groups]
    return {
        " to ".join(title): [parameter for name in group for parameter in parameters[name]]
        for title, group in zip(titles, groups, strict=True)
    }
