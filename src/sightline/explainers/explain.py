"""`explain`, and the explainers by their names."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sightline.arguments import checked_options
from sightline.data import Preprocess
from sightline.explainers import cams, controls, gradients, intrinsic, perturbation, relevance, rollout
from sightline.explainers.capture import LayerLike
from sightline.explainers.evidence import Settings
from sightline.explainers.explainer import Explainer, Explanation, Request, explanation_of
from sightline.explainers.scorer import Targets
from sightline.facts import Progress, current_name, did_you_mean
from sightline.inference import Images, Memory, Output, forward_call, inputs_of
from sightline.notebook import bar_of
from sightline.targets import Target

EXPLAINERS: dict[str, Explainer] = {
    name: explainer
    for module in (intrinsic, cams, gradients, relevance, perturbation, rollout, controls)
    for name in module.__all__
    if isinstance(explainer := getattr(module, name), Explainer)
}

FAST = tuple(name for name, explainer in EXPLAINERS.items() if not explainer.many_passes)
"""Names of those that cost a few passes per image."""

Method = str | Explainer | partial[Any]


def explain(
    model: nn.Module,
    images: Images,
    targets: Targets = None,
    methods: Sequence[Method] = ("grad_cam",),
    layer: LayerLike | Sequence[str | nn.Module] = None,
    *,
    preprocess: Preprocess | None = None,
    output: Output = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
    call: int | None = None,
    batch_size: int = 64,
    memory: Memory = None,
    progress: Progress | bool | None = None,
    differentiable: bool = False,
    compile: bool = False,
) -> Explanation:
    """Maps of all methods for a batch, from one forward and one backward of each kind that they need.

    docs/explanation/cost.md counts them.

    A method is a name from `EXPLAINERS`, an explainer, or a `functools.partial` of one that sets its options;
    `name@layer` reads another layer for this method. `layer` is a dotted name, a module, or a list of them (then the
    maps are `explanation[method, layer]`); None is the model's `default_layer`, else the last feature map, or the last
    patch tokens of a transformer, that feeds the logits. A layer may yield (b, c, h, w), (b, h, w, c) or tokens.

    Your model, its flags, buffers, attributes and gradients, and the random states of PyTorch, NumPy and Python are
    left unchanged, even after an error or Ctrl-C. Several threads may explain one model: they take turns, also where
    two models share modules. A model that you run yourself in another thread meanwhile is not protected, and random
    numbers drawn there may repeat. GPUs compute convolutions in full 32 bits, not in TF32, unless you set
    `torch.backends.cudnn.conv.fp32_precision`.

    Args:
        model: any classifier that takes (b, c, h, w), or (b, c, d, h, w), and returns logits: a tensor, the only one in
            a tuple or a dict, or that of an object with `.logits`.
        images: a float tensor, normalized as the model wants it; or pictures: a uint8 tensor (b, 3, h, w), images of
            Pillow, or paths of files and folders, one or a list. Pictures are kept in the explanation to be shown.
        targets: None = the predicted class, an int = that class in every image, class indices (b,) or (b, t), or a
            function from the model's output to one score per image, (b,) or (b, t); `sightline.targets` has functions
            for regression, segmentation, detection and embeddings. A single logit counts as two
            classes; a softmax or sigmoid at the very end of the model is undone. Probabilities without logits (an
            average of several softmaxes, say) are explained by their logarithm, a label's own by its log-odds.
        methods: which maps to make; they share the forward and the backward.
        layer: where to read.
        preprocess: how pictures become the model's input. None: as in its training, see `models.preprocess_of`.
        output: which tensor of several that the model returns: a key, an index, a (dotted) attribute, or a function
            from the output to a tensor. `"logits"` or `"probabilities"` say what the numbers are, if this is misread (a
            notice says how they were read); `(which, "probabilities")` says both. A function in `targets` still gets
            the whole output.
        forward_args: further positional arguments of the model, a tuple. A tensor with as many rows as there are images
            has one row for each, which follows its image wherever that is changed or repeated; all else is passed on as
            it is.
        forward_kwargs: the same by name.
        call: which run of a layer that the forward calls several times, from 0.
        batch_size: most images per forward of the methods that look at many changed images.
        memory: bytes that one of these forwards, with its backward, may take, or a size such as "2GB"; it decides the
            number of images up to `batch_size`. None: 300 MB on a CPU, half of the free memory on a GPU. The images
            themselves run through the model together.
        progress: True shows a bar; a function is called by these methods with (what, images done, images in all).
        differentiable: keep the graph, so that maps and logits can stand in a loss. The model is in eval mode.
        compile: use a compiled copy of the model, for class activation maps of a model that ends in pooling and one
            linear layer; the first call takes about a minute, and on a CPU needs a C++ compiler.

    Raises:
        ValueError: an unknown method or layer, targets out of range, a method that does not work on this model, a
            picture that cannot be read.
        OSError: there is no such file.

    >>> import torch
    >>> from sightline.testing import PooledModel
    >>> explanation = explain(PooledModel(torch.eye(3)), torch.ones(1, 3, 2, 2), targets=1, methods=["cam", "grad_cam"])
    >>> explanation["cam"].flatten().tolist(), explanation["grad_cam"].flatten().tolist()
    ([1.0, 1.0, 1.0, 1.0], [0.25, 0.25, 0.25, 0.25])
    >>> explanation.layer, explanation.verdicts["cam"]
    ('features (3 x 2 x 2)', [['flat']])
    """
    inputs = inputs_of(model, images, preprocess)
    forward = forward_call(inputs.images, output, forward_args, forward_kwargs)
    settings = Settings(
        call=call,
        batch_size=batch_size,
        memory=memory,
        progress=bar_of(progress),
        differentiable=differentiable,
        compile=compile,
    )
    return explanation_of(model, inputs, targets, requests_of(methods, layer), forward, settings)


def fitting(
    model: nn.Module,
    images: Images,
    methods: Sequence[str] = tuple(EXPLAINERS),
    targets: Targets = None,
    layer: LayerLike = None,
    *,
    preprocess: Preprocess | None = None,
    output: Output = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Names of the methods that work on a model, and for each of the others the reason why not.

    Each is tried on the first image; a perturbation method stops after its first batch. `progress` is called with
    (what, done, total) before each.

    Raises:
        ValueError: none fits.
        torch.OutOfMemoryError: memory ran out; the method itself may fit.

    >>> from sightline.testing import PooledModel
    >>> fitted, reasons = fitting(PooledModel(torch.eye(3)), torch.ones(1, 3, 2, 2), ["cam", "attention", "rise"])
    >>> fitted, list(reasons)
    (['cam', 'rise'], ['attention'])
    """

    class Started(Exception):
        pass

    def started(what: str, done: int, total: int) -> None:
        raise Started

    fitted: list[str] = []
    reasons: dict[str, str] = {}
    images = inputs_of(model, images, preprocess).images
    row = torch.zeros(1, dtype=torch.long)
    first = targets[:1] if isinstance(targets, Tensor) else targets.at(row) if isinstance(targets, Target) else targets
    one = forward_call(images, output, forward_args, forward_kwargs).at(row)
    given: dict[str, Any] = {"output": output, "forward_args": one.args, "forward_kwargs": one.kwargs}
    for done, method in enumerate(methods):
        if progress is not None:
            progress("trying methods", done, len(methods))
        try:
            explain(model, images[:1], first, [method], layer, progress=started, **given)
        except Started:
            fitted.append(method)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            reasons[method] = " ".join(str(error).split())
        else:
            fitted.append(method)
    if not fitted:
        raise ValueError(f"expected at least one method that fits this model, got none: {next(iter(reasons.values()))}")
    return fitted, reasons


def find_explainer(name: str) -> Explainer:
    """The explainer of that name.

    Raises:
        ValueError: there is none; the closest name is shown.
    """
    if current_name(name) not in EXPLAINERS:
        hint = did_you_mean(name, EXPLAINERS, f"choose from {', '.join(EXPLAINERS)}")
        raise ValueError(f"expected the name of an explainer, got {name!r}{hint}")
    return EXPLAINERS[current_name(name)]


def named(method: Method) -> tuple[str, Explainer, dict[str, Any], LayerLike]:
    """Name, explainer, options and layer (None: the common one) of a method in any form.

    Raises:
        ValueError: there is no such method, or it has no such option.
        TypeError: neither a name, an explainer nor a partial of one.

    >>> named(partial(intrinsic.activation_map, norm="mean"))[0], named("cam@features")[0]
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


def requests_of(methods: Sequence[Method], layer: LayerLike | Sequence[str | nn.Module]) -> list[Request]:
    """The maps to make; see `explain`.

    Raises:
        ValueError, TypeError: no methods or layers, or one that does not exist.
    """
    if isinstance(methods, str) or not methods:
        raise ValueError(f"expected a list of methods, got {methods!r}; write methods=['grad_cam']")
    layers: Sequence[LayerLike] = layer if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]
    several = layers is layer
    if not layers:
        raise ValueError("expected at least one layer, got an empty list; leave it out for the model's own")
    requests: list[Request] = []
    for method in methods:
        name, explainer, options, its_layer = named(method)
        if several and its_layer is None and not explainer.is_control:
            requests += [Request(None, explainer, options, each) for each in layers]
        else:
            requests.append(Request(name, explainer, options, its_layer if several or its_layer else layers[0]))
    return requests
