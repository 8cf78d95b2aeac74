"""Values that several rooms pass on, and that say themselves in one line: nothing parses such a line."""

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, get_args

Level = Literal["note", "doubt", "do not read"]
LEVELS: tuple[Level, ...] = get_args(Level)

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""
Spread = Callable[..., Iterator[tuple[Any, Any]]]
"""Calls a function elsewhere, on several machines for example: `spread(function, pairs, *common)`, with pairs of a key
and an argument, yields each key with `function(argument, *common)`, or with the reason why processes died of it, as
they finish. `sightline.scale.spread_by` makes one."""


class Notice(UserWarning):
    """A decision that its user may want to change, where the result has no place to tell it; see `notice`."""


def notice(text: str) -> None:
    """Warn of a decision; the command line prints it as a line that starts with `notice:`."""
    warnings.warn(text, Notice, stacklevel=2)


OLD_NAMES = {
    "COLOURS": "COLORS",
    "GeneralisedKernel": "GeneralizedKernel",
    "GeneralisedMean": "GeneralizedMean",
    "Hiding": "Perturbation",
    "HidingMetric": "PerturbationMetric",
    "ParameterRandomisation": "ParameterRandomization",
    "PatchColourModel": "PatchColorModel",
    "centre_map": "center_map",
    "colour": "color",
    "colour_bar": "color_bar",
    "frames_of": "perturbed_counts",
    "hidden_scores": "perturbed_scores",
    "normalise": "normalize",
    "normalise_alpha": "normalize_alpha",
    "normalised": "normalized",
    "parameter_randomisation": "parameter_randomization",
    "randomisation_curve": "randomization_curve",
    "rival": "runner_up",
    "rival_gradients": "runner_up_gradients",
}
"""Public names of version 0.1 that are still understood, and what they are called now."""


def current_name(name: str) -> str:
    """What a name of version 0.1 is called now; other names as they are.

    >>> current_name("centre_map"), current_name("grad_cam")
    ('center_map', 'grad_cam')
    """
    return OLD_NAMES.get(name, name)


def old_names(module: str, **names: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that still answers to its old names; `names` are those of this module alone."""

    def lookup(name: str) -> Any:
        current = names.get(name, current_name(name))
        if current != name and current in vars(sys.modules[module]):
            return vars(sys.modules[module])[current]
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return lookup


def did_you_mean(
    name: str,
    choices: Iterable[str],
    otherwise: str = "",
    *,
    n: int = 1,
    cutoff: float = 0.6,
    shown: Callable[[str], object] = str,
) -> str:
    """The end of an error about an unknown name: the closest of the choices, or `otherwise`.

    `shown` gives the name of a choice to show.

    >>> did_you_mean("grad_cams", ["cam", "grad_cam"])
    "; did you mean 'grad_cam'?"
    >>> did_you_mean("epoch", ["epochs"], shown={"epochs": "optim.epochs"}.get)
    "; did you mean 'optim.epochs'?"
    >>> did_you_mean("grad_cams", {"grad_cam": 1})
    "; did you mean 'grad_cam'?"
    >>> did_you_mean("x", ["cam", "grad_cam"], "choose cam or grad_cam")
    '; choose cam or grad_cam'
    """
    close = [str(shown(choice)) for choice in get_close_matches(name, list(choices), n=n, cutoff=cutoff)]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else otherwise
    return f"; {hint}" if hint else ""


def folded(name: str) -> str:
    """The name of a class or folder as it is compared: without case, with spaces for underscores.

    >>> folded("Tabby_cat")
    'tabby cat'
    """
    return name.replace("_", " ").casefold()


_TITLES = {
    "add": "ADD",
    "ablation_cam": "Ablation-CAM",
    "cam": "CAM",
    "deletion_auc": "deletion",
    "eigen_cam": "Eigen-CAM",
    "finer_cam": "Finer-CAM",
    "grad_cam": "Grad-CAM",
    "grad_cam_plus_plus": "Grad-CAM++",
    "guided_grad_cam": "guided Grad-CAM",
    "guided_grad_cam_plus_plus": "guided Grad-CAM++",
    "hires_cam": "HiRes-CAM",
    "input_x_gradient": "input × gradient",
    "insertion_auc": "insertion",
    "iou": "IoU",
    "layer_cam": "Layer-CAM",
    "lrp": "LRP",
    "lrp_epsilon_alpha2_beta1": "LRP epsilon, alpha 2, beta 1",
    "lrp_epsilon_gamma_box": "LRP epsilon, gamma, box",
    "lrp_epsilon_plus_flat": "LRP epsilon, plus, flat",
    "mask_auc": "mask AUC",
    "parameter_randomization": "randomization test",
    "rise": "RISE",
    "road": "ROAD",
    "road_lerf": "ROAD (LeRF)",
    "road_morf": "ROAD (MoRF)",
    "score_cam": "Score-CAM",
    "smooth_grad": "SmoothGrad",
    "var_grad": "VarGrad",
    "xgrad_cam": "XGrad-CAM",
}
"""How the field writes methods and metrics; the others are their names with spaces."""


def words(name: str) -> str:
    """The name of a method or metric for reading.

    >>> words("grad_cam of another class"), words("attention@attention.conv10"), words("deletion_auc")
    ('Grad-CAM of another class', 'attention at conv 10', 'deletion')
    """
    method, at, layer = name.partition("@")
    title = re.sub(r"\w+", lambda word: _TITLES.get(word[0], word[0].replace("_", " ")), method)
    place = re.sub(r"(?<=[a-z])(?=\d)", " ", layer.removeprefix(f"{method}.").replace("_", " "))
    return f"{title} at {place}" if at else title


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names of methods or metrics in a sentence.

    >>> listed(["cam", "grad_cam", "lrp"]), listed("abcd", 2)
    ('CAM, Grad-CAM and LRP', 'a, b and 2 others')
    """
    return joined(map(words, names), most)


def joined(texts: Iterable[str], most: int | None = None) -> str:
    """Texts in a sentence, at most so many of them.

    >>> joined(["a", "b", "c"]), joined(["a"]), joined([]), joined(["a", "b"], 1)
    ('a, b and c', 'a', '', 'a and 1 other')
    """
    texts = [*texts]
    if most is not None and (more := len(texts) - most) > 0:
        texts = [*texts[:most], f"{more:,} other{'s' * (more > 1)}"]
    *first, last = texts or [""]
    return f"{', '.join(first)} and {last}" if first else last


def capitalized(text: str) -> str:
    """A sentence with a capital letter at its start.

    >>> capitalized("the CAM"), capitalized("")
    ('The CAM', '')
    """
    return text[:1].upper() + text[1:]


def percent(fraction: float) -> str:
    """A fraction in percent, never rounded to a certainty.

    >>> percent(0.5), percent(1.0), percent(0.99999), percent(0.00001), percent(float("nan"))
    ('50.0 %', '100.0 %', '>99.9 %', '<0.1 %', '–')
    """
    if not math.isfinite(fraction):
        return "–"
    if 0 < fraction < 0.0005:
        return "<0.1 %"
    return ">99.9 %" if 0.9995 <= fraction < 1 else f"{100 * fraction:.1f} %"


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(0.2), duration(59.6), duration(200.0), duration(8000.0)
    ('1 s', '1 min', '3 min 20 s', '2 h 13 min')
    """
    whole = max(round(seconds), 1)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    parts = ((hours, "h"), (minutes, "min"), (rest if not hours else 0, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


class Layer(str):
    """A place in a model and the shape of what was read there, without the batch; empty for maps that read no layer.

    >>> layer = Layer("features.conv13", (128, 5, 5))
    >>> str(layer), layer.name, layer.shape
    ('features.conv13 (128 x 5 x 5)', 'features.conv13', (128, 5, 5))
    """

    name: str
    shape: tuple[int, ...]

    def __new__(cls, name: str = "", shape: Iterable[int] = ()) -> "Layer":
        """A place by its dotted name."""
        shape = tuple(shape)
        layer = super().__new__(cls, f"{name} ({' x '.join(map(str, shape))})" if shape else name)
        layer.name, layer.shape = name, shape
        return layer


class Verdict(str):
    """A reason to distrust a map: its kind, how severe it is, and what was measured.

    "note" says how to read the map, "doubt" says what speaks against it, and "do not read" means that the picture shows
    nothing about the model. A verdict equals its kind and its own text.

    >>> gap = Verdict("conservation gap", "doubt", 0.14, "88 % of the logit reaches the pixels")
    >>> str(gap)
    'conservation gap: 88 % of the logit reaches the pixels'
    >>> gap == "conservation gap", gap.kind, gap.level, gap.amount
    (True, 'conservation gap', 'doubt', 0.14)
    """

    kind: str
    level: Level
    amount: int | float | None
    details: str

    def __new__(
        cls, kind: str, level: Level = "doubt", amount: int | float | None = None, details: str = ""
    ) -> "Verdict":
        """A verdict of some kind; `details` follow its kind in the text."""
        verdict = super().__new__(cls, f"{kind}: {details}" if details else kind)
        verdict.kind, verdict.level, verdict.amount, verdict.details = kind, level, amount, details
        return verdict

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or (other == self.kind and not isinstance(other, Verdict))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.kind)


class Finding(str):
    """A sentence about a result: what kind of statement it is, and the values behind it.

    >>> finding = Finding("too few", "Only 3 images: too few to compare.", images=3)
    >>> str(finding), finding.kind, finding.values
    ('Only 3 images: too few to compare.', 'too few', {'images': 3})
    """

    kind: str
    values: dict[str, Any]

    def __new__(cls, kind: str, text: str, **values: Any) -> "Finding":
        """A sentence of some kind."""
        finding = super().__new__(cls, text)
        finding.kind, finding.values = kind, values
        return finding

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Finding, self.kind, str(self), **self.values), ()


def worst(verdicts: Iterable[Verdict]) -> Level | None:
    """The most severe level among verdicts; None if there are none.

    >>> worst([Verdict("class-independent", "note"), Verdict("flat", "do not read")]), worst([])
    ('do not read', None)
    """
    levels = {verdict.level for verdict in verdicts}
    return next((level for level in reversed(LEVELS) if level in levels), None)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Independent units behind it: images, or groups where a group column is named."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
