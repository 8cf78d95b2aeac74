"""Maps of where a model looks. `explain` computes all of them from as few forwards and backwards as they need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline import maps
from sightline.arguments import checked_options
from sightline.explainers.cams import (
    cam,
    eigen_cam,
    finer_cam,
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    xgrad_cam,
)
from sightline.explainers.capture import Layer
from sightline.explainers.controls import center_map, contrast_map, edge_map, random_map
from sightline.explainers.evidence import Evidence, Explainer, gather
from sightline.explainers.gradients import (
    deconvolution,
    guided_backprop,
    guided_grad_cam,
    guided_grad_cam_plus_plus,
    input_x_gradient,
    integrated_gradients,
    saliency,
    smooth_grad,
    var_grad,
)
from sightline.explainers.intrinsic import activation_map, attention, attention_maps
from sightline.explainers.perturbation import ablation_cam, occlusion, rise, score_cam
from sightline.explainers.relevance import (
    AlphaBeta,
    Composite,
    Epsilon,
    Flat,
    Gamma,
    ZBox,
    Zero,
    ZPlus,
    lrp,
    lrp_epsilon_alpha2_beta1,
    lrp_epsilon_gamma_box,
    lrp_epsilon_plus_flat,
)
from sightline.explainers.rollout import attention_rollout, gradient_rollout
from sightline.explainers.scorer import Targets
from sightline.explainers.verdicts import signs_of, verdicts_of
from sightline.facts import Layer as Place
from sightline.facts import Progress, Verdict, current_name, did_you_mean, old_names
from sightline.inference import Output, check_images, forward_call, preserving

__all__ = [
    "EXPLAINERS",
    "AlphaBeta",
    "Composite",
    "Epsilon",
    "Explainer",
    "Explanation",
    "Flat",
    "Gamma",
    "Progress",
    "Verdict",
    "ZBox",
    "ZPlus",
    "Zero",
    "ablation_cam",
    "activation_map",
    "attention",
    "attention_maps",
    "attention_rollout",
    "cam",
    "center_map",
    "contrast_map",
    "deconvolution",
    "edge_map",
    "eigen_cam",
    "explain",
    "finer_cam",
    "fitting",
    "grad_cam",
    "grad_cam_plus_plus",
    "gradient_rollout",
    "guided_backprop",
    "guided_grad_cam",
    "guided_grad_cam_plus_plus",
    "hires_cam",
    "input_x_gradient",
    "integrated_gradients",
    "layer_cam",
    "lrp",
    "lrp_epsilon_alpha2_beta1",
    "lrp_epsilon_gamma_box",
    "lrp_epsilon_plus_flat",
    "occlusion",
    "random_map",
    "rise",
    "saliency",
    "score_cam",
    "smooth_grad",
    "var_grad",
    "xgrad_cam",
]

EXPLAINERS: dict[str, Explainer] = {
    "attention": attention,
    "activation_map": activation_map,
    "cam": cam,
    "grad_cam": grad_cam,
    "grad_cam_plus_plus": grad_cam_plus_plus,
    "xgrad_cam": xgrad_cam,
    "layer_cam": layer_cam,
    "hires_cam": hires_cam,
    "eigen_cam": eigen_cam,
    "score_cam": score_cam,
    "ablation_cam": ablation_cam,
    "finer_cam": finer_cam,
    "saliency": saliency,
    "input_x_gradient": input_x_gradient,
    "integrated_gradients": integrated_gradients,
    "smooth_grad": smooth_grad,
    "var_grad": var_grad,
    "guided_backprop": guided_backprop,
    "deconvolution": deconvolution,
    "guided_grad_cam": guided_grad_cam,
    "guided_grad_cam_plus_plus": guided_grad_cam_plus_plus,
    "lrp": lrp,
    "lrp_epsilon_plus_flat": lrp_epsilon_plus_flat,
    "lrp_epsilon_gamma_box": lrp_epsilon_gamma_box,
    "lrp_epsilon_alpha2_beta1": lrp_epsilon_alpha2_beta1,
    "occlusion": occlusion,
    "rise": rise,
    "attention_rollout": attention_rollout,
    "gradient_rollout": gradient_rollout,
    "random_map": random_map,
    "center_map": center_map,
    "edge_map": edge_map,
    "contrast_map": contrast_map,
}

Method = str | Explainer | partial[Any]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Maps of a batch, with what was explained and where. `explanation["grad_cam"]` is the raw map."""

    maps: dict[str, Float[Tensor, "b t ..."]]
    """Raw float32 maps by method; larger = more important; `method@layer` where several layers were asked for."""
    targets: Int[Tensor, "b t"]
    """Class indices; -1 where a function made the score."""
    logits: Float[Tensor, "b n"]
    """Two classes of a single logit z: -z/2 and z/2, whose softmax is its sigmoid; the scores that a function made.
    Logarithms of probabilities that have no logits."""
    probabilities: Float[Tensor, "b n"]
    """Of each class, or of each label for itself, as the model has it; where a function made the scores, the scores."""
    layers: dict[str, Place]
    """Where each map was read: name and shape, for example `features.conv13 (128 x 5 x 5)`; empty for controls."""
    verdicts: dict[str, list[list[Verdict]]]
    """For each method and image what to distrust, strings with a `level`: "note", "doubt" or "do not read"; an empty
    list says that nothing was found."""
    unchecked: tuple[str, ...] = ()
    """Maps that were not compared with those of another class in every image, because that would have taken another
    backward or two: that they are not said to be `class-independent` means nothing. Ask for two targets to compare."""
    notices: tuple[str, ...] = ()
    """What was decided about the model that its owner may want otherwise, one sentence each: how its output was read,
    where a layer's positions were guessed."""

    def __repr__(self) -> str:
        places = {name: f" at {layer}" if layer else "" for name, layer in self.layers.items()}
        found = ", ".join(f"{name} {tuple(value.shape)}{places[name]}" for name, value in self.maps.items())
        return f"Explanation({found})"

    @property
    def layer(self) -> Place:
        """Where the first map was read that has a layer."""
        return next((layer for layer in self.layers.values() if layer), Place())

    def __getitem__(self, key: str | tuple[str, str]) -> Float[Tensor, "b t ..."]:
        name = "@".join(key) if isinstance(key, tuple) else key
        if name not in self.maps:
            raise KeyError(f"expected one of {', '.join(self.maps)}, got {name!r}; name it in methods= of explain")
        return self.maps[name]

    def resized(self, size: tuple[int, ...]) -> "Explanation":
        """The same explanation with every map at another size (height, width; of volumes depth, height, width)."""
        resized = {name: maps.resize(value, size) for name, value in self.maps.items()}
        return replace(self, maps=resized)


@preserving
def explain(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    targets: Targets = None,
    methods: Sequence[Method] = ("grad_cam",),
    layer: Layer | Sequence[str | nn.Module] = None,
    *,
    output: Output = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
    call: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
    differentiable: bool = False,
    compile: bool = False,
) -> Explanation:
    """All maps of all methods for a batch, from one forward and one backward of each kind that they need.

    docs/maps.md, "Cost", counts them.

    A method is a name from `EXPLAINERS`, an explainer, or a `functools.partial` of one for its options; `name@layer`
    asks for one method at a layer of its own. `layer` is a dotted name, a module, or a list of them (then the maps are
    found as `explanation[method, layer]`); None is the model's `default_layer`, else the last feature map, or the last
    tokens of a transformer's patches, that feeds the logits. A layer may yield (b, c, h, w), (b, h, w, c) or tokens.

    The model, its flags, buffers, attributes and gradients, and the random states of PyTorch, NumPy and Python are left
    as they were, even after an error or Ctrl-C. Threads may explain one model at the same time: they take turns, also
    where two models share modules. Nothing protects a model that you run yourself in another thread meanwhile, and
    random numbers drawn there may repeat. A GPU computes convolutions in full 32 bits, not in TF32, unless you have set
    `torch.backends.cudnn.conv.fp32_precision`.

    Args:
        model: any classifier that takes (b, c, h, w), or (b, c, d, h, w), and returns logits: a tensor, the only one in
            a tuple or a dict, or that of an object with `.logits`.
        images: normalized as the model wants them.
        targets: None = the predicted class, an int = that class in every image, class indices (b,) or (b, t), or a
            function from whatever the model returns to one score per image, (b,) or (b, t). A single logit counts as
            two classes; a softmax or sigmoid at the very end of the model is undone. Probabilities without logits (an
            average of several softmaxes, say) are explained by their logarithm, a label's own by its log-odds.
        methods: what to make; several share the forward and the backward.
        layer: where to read.
        output: which tensor of several that the model returns: a key, an index, a (dotted) attribute, or a function
            from the output to a tensor. `"logits"` or `"probabilities"` say what the numbers are, where the operations
            that made them and their values are misread (a notice says what was decided), `(which, "probabilities")`
            both. A function in `targets` gets the whole output all the same.
        forward_args: what the model takes behind the images, a tuple. Tensors with as many rows as images have one for
            each of them, which goes along wherever an image is changed or repeated; other tensors (a 0-d one, one with
            a leading 1 beside several images) and everything else are handed on as they are.
        forward_kwargs: the same by name.
        call: which run of a layer that the forward calls several times, from 0.
        batch_size: images per forward of the methods that look at many changed images; bounds their memory.
        progress: called by these with (what, images done, images in all).
        differentiable: keep the graph, so that maps and logits can stand in a loss. The model is in eval mode.
        compile: class activation maps of a model that ends in pooling and one linear layer, by a compiled copy of it;
            the first call takes a minute or so, and needs a C++ compiler on a CPU.

    Raises:
        ValueError: an unknown method or layer, targets out of range, a method that this model has no evidence for.

    >>> import torch
    >>> from sightline.testing import PooledModel
    >>> explanation = explain(PooledModel(torch.eye(3)), torch.ones(1, 3, 2, 2), targets=1, methods=["cam", "grad_cam"])
    >>> explanation["cam"].flatten().tolist(), explanation["grad_cam"].flatten().tolist()
    ([1.0, 1.0, 1.0, 1.0], [0.25, 0.25, 0.25, 0.25])
    >>> explanation.layer, explanation.verdicts["cam"]
    ('features (3 x 2 x 2)', [['flat']])
    """
    check_images(images)
    asked = _requests(methods, layer)
    requests = [(at, method.needs) for _, method, _, at in asked]
    gathered = gather(
        model,
        images,
        requests,
        targets,
        asked=forward_call(images, output, forward_args, forward_kwargs),
        call=call,
        batch_size=batch_size,
        progress=progress,
        differentiable=differentiable,
        compile=compile,
    )
    pieces: list[list[tuple[Tensor, Tensor | None, Evidence]]] = [[] for _ in asked]
    for block in gathered.blocks():
        for own, (_, method, options, _), evidence in zip(pieces, asked, block, strict=True):
            if evidence is not None:
                rival = None if evidence.rival is None else method.map_of(evidence.rival, **options)
                own.append((method.map_of(evidence, **options), rival, evidence))
    found: dict[str, Tensor] = {}
    layers: dict[str, Place] = {}
    signs: list[Tensor] = []
    for own, (name, method, _, _) in zip(pieces, asked, strict=True):
        _, rival, evidence = own[0]
        name = name if name is not None else f"{method.name}@{evidence.layer}"
        if name in found:
            raise ValueError(f"expected every map to have a name of its own, got {name!r} twice; ask for it once")
        found[name] = torch.cat([value for value, _, _ in own], 1)
        source = evidence.gate if evidence.gate is not None else evidence.activations
        layers[name] = Place() if source is None else Place(evidence.layer, source.shape[1:])
        signs.append(signs_of(method, found[name], rival, evidence))
    read = dict(zip(found, torch.stack(signs).tolist(), strict=True))
    methods_of = zip(found, asked, pieces, strict=True)
    return Explanation(
        maps=found,
        targets=gathered.scorer.classes_of(gathered.scorer.targets),
        logits=gathered.logits,
        probabilities=gathered.probabilities,
        layers=layers,
        verdicts={name: verdicts_of(method, own[0][2], read[name]) for name, (_, method, _, _), own in methods_of},
        unchecked=tuple(name for name, rows in read.items() if not all(row[-1] for row in rows)),
        notices=tuple(gathered.scorer.notices),
    )


def fitting(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    methods: Sequence[str] = tuple(EXPLAINERS),
    targets: Targets = None,
    layer: Layer = None,
    *,
    output: Output = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Names of those methods that a model has evidence for, and for each of the others why not.

    Each is tried on the first image; a method that looks at many changed images only until it has seen the first.

    Raises:
        ValueError: none fits.
        torch.OutOfMemoryError: memory ran out, which says nothing about the method.

    >>> from sightline.testing import PooledModel
    >>> found, reasons = fitting(PooledModel(torch.eye(3)), torch.ones(1, 3, 2, 2), ["cam", "attention", "rise"])
    >>> found, list(reasons)
    (['cam', 'rise'], ['attention'])
    """

    class Started(Exception):
        pass

    def started(what: str, done: int, total: int) -> None:
        raise Started

    found: list[str] = []
    reasons: dict[str, str] = {}
    check_images(images)
    first = targets[:1] if isinstance(targets, Tensor) else targets
    one = forward_call(images, output, forward_args, forward_kwargs).at(torch.zeros(1, dtype=torch.long))
    given: dict[str, Any] = {"output": output, "forward_args": one.args, "forward_kwargs": one.kwargs}
    for method in methods:
        try:
            explain(model, images[:1], first, [method], layer, progress=started, **given)
        except Started:
            found.append(method)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            reasons[method] = str(error)
        else:
            found.append(method)
    if not found:
        raise ValueError(f"expected at least one method that fits this model, got none: {next(iter(reasons.values()))}")
    return found, reasons


def find_explainer(name: str) -> Explainer:
    """The explainer of that name.

    Raises:
        ValueError: there is none; the closest names are shown.
    """
    if current_name(name) not in EXPLAINERS:
        hint = did_you_mean(name, EXPLAINERS, f"choose from {', '.join(EXPLAINERS)}")
        raise ValueError(f"expected the name of an explainer, got {name!r}{hint}")
    return EXPLAINERS[current_name(name)]


def named(method: Method) -> tuple[str, Explainer, dict[str, Any], Layer]:
    """Name, explainer, options and layer of its own, if any, of a method however it is given.

    Raises:
        ValueError: there is no such method, or it has no such option.
        TypeError: neither a name, an explainer nor a partial of one.

    >>> named(partial(activation_map, norm="mean"))[0], named("cam@features")[0]
    ('activation_map(norm=mean)', 'cam@features')
    """
    if isinstance(method, str):
        base, at, layer = method.partition("@")
        if at and not layer:
            raise ValueError(f"expected the name of a layer after @, got {method!r}; write {base}@LAYER")
        return method, find_explainer(base), {}, layer or None
    if isinstance(method, Explainer):
        return method.name, method, {}, None
    if not isinstance(method, partial) or not isinstance(method.func, Explainer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected a method by name, an explainer or a functools.partial of one, got {method!r}; "
            "see sightline.explainers.EXPLAINERS"
        )
    explainer = method.func
    if method.args:
        raise ValueError(f"expected options of {explainer.name} by keyword, got {method.args[0]!r}; name it")
    options = checked_options(explainer.formula, method.keywords, explainer.name)
    text = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{explainer.name}({text})", explainer, options, None


def _requests(
    methods: Sequence[Method], layer: Layer | Sequence[str | nn.Module]
) -> list[tuple[str | None, Explainer, dict[str, Any], Layer]]:
    if isinstance(methods, str) or not methods:
        raise ValueError(f"expected a list of methods, got {methods!r}; write methods=['grad_cam']")
    several = isinstance(layer, Sequence) and not isinstance(layer, str)
    layers: list[Layer] = [*layer] if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]
    if not layers:
        raise ValueError("expected at least one layer, got an empty list; leave it out for the model's own")
    asked: list[tuple[str | None, Explainer, dict[str, Any], Layer]] = []
    for method in methods:
        name, explainer, options, own = named(method)
        by_layer = several and own is None and not explainer.is_control
        places = layers if own is None and not (several and explainer.is_control) else [own]
        asked += [(None if by_layer else name, explainer, options, at) for at in places]
    return asked


__getattr__ = old_names("sightline.explainers")
