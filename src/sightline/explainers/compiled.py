"""A forward compiled once, for maps of many batches of the same model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sightline.explainers.capture import Capture, Captured, head_of
from sightline.explainers.scorer import Scorer
from sightline.inference import ForwardCall, copy_of, logits_of, run, version_of


class _Both(nn.Module):
    """Logits and the output of one layer."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model = model
        self.kept: Any = None
        model.get_submodule(layer).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.kept = output

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return logits_of(self.model(images)), self.kept


_PLAIN = (int, float, str, tuple, type(None))
_Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
_COMPILED: WeakKeyDictionary[nn.Module, tuple[Any, _Forward, Captured]] = WeakKeyDictionary()
"""By model: what it depends on, the forward to logits and layer, and what was captured by the first forward."""


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What makes the module another one, but for its weights and children."""
    values = vars(module)
    plain = [(name, str(value)) for name, value in values.items() if isinstance(value, _PLAIN)]
    return id(module), type(module), plain, [*values["_forward_hooks"], *values["_forward_pre_hooks"]]


class CompiledCapture:
    """What `Capture` finds, by a compiled forward without any graph: the head must be pooling and one linear layer.

    A copy of the model, channels last, its weights frozen into the code, is compiled at the first call and kept as long
    as the model lives, and its modules, their hooks and settings, its weights and the size of the images stay what they
    are. Weights changed behind PyTorch's back, through `.data`, are noticed by the first number of each alone: change
    them under `torch.no_grad()`.
    """

    def __init__(self, model: nn.Module, scorer: Scorer, layer: Any, images: Tensor, places: int) -> None:
        self.model = model
        self.scorer = scorer
        self.gates: dict[str, Tensor] = {}
        weights = [*model.parameters(), *model.buffers()]
        key = (
            layer,
            [(id(weight), weight.data_ptr(), version_of(weight)) for weight in weights],
            str(torch.stack([w.detach()[(0,) * w.ndim].double() for w in weights if w.numel()]).tolist()),
            [_settings(module) for module in model.modules()],
            images.shape[2:],  # the grid, and what an average pooling of a fixed size covers
            images.dtype,
            images.device,
        )
        if model not in _COMPILED or _COMPILED[model][0] != key:
            _COMPILED[model] = key, *self._compile(layer, images)
        _, call, captured = _COMPILED[model]
        with torch.no_grad():
            logits, features = call(images.contiguous(memory_format=torch.channels_last))
        scorer.take(logits.clone())
        self.captured = [replace(captured, tensor=features)] * places

    def _compile(self, layer: Any, images: Tensor) -> tuple[_Forward, Captured]:
        capture = Capture(self.model, Scorer(self.model, None), [layer], images, call=None, gates=False, whole=False)
        capture.run()
        (captured,) = capture.captured
        head = head_of(capture.scorer.direct, captured)
        output = logits_of(ForwardCall().raw(self.model, images))
        modules = dict(self.model.named_modules())
        if head is None or captured.name not in modules or not torch.equal(output, run(self.model, images)):
            raise ValueError(
                "expected a model whose last feature map is a module's output, pooled into one linear layer that "
                f"yields the logits, for compile=True, got {type(self.model).__name__}; leave compile out"
            )
        copied = _Both(copy_of(self.model).to(memory_format=torch.channels_last), captured.name)
        call = torch.compile(copied, options={"freezing": True})
        return call, replace(captured, tensor=images.new_empty(0), head=head.detach().clone())
