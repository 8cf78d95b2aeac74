"""Time of maps against the bare forward and backward passes that they need, and against other libraries.

ResNet-50 at 224 px, batch 16; Score-CAM and RISE use ResNet-18 at 64 px, batch 2; then Grad-CAM of one image with one
thread, by each library, on three networks. The weights are random, because time does not depend on what the network has
learned. `--rounds 3` is a quick check and `--only WORD` selects rows; results
are written only if all rows ran. On a GPU everything runs in full 32 bits, as maps do, and the maps are compared with
those of a CPU.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import timm
import torch
from measure import Rows, bare, batches_of, keep_freed_memory
from torch import Tensor, nn

import sightline as sl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAMS = ("grad_cam", "grad_cam_plus_plus", "xgrad_cam", "layer_cam", "hires_cam", "eigen_cam")
GUIDED = ("guided_grad_cam", "guided_grad_cam_plus_plus", "saliency")
SINGLE = (
    ("resnet50", 224, "layer4", 1.10),
    ("tf_efficientnet_lite0", 224, "bn2", 1.25),
    ("resnet18", 64, "layer4", 1.30),
)
"""Network, side of the image, layer, and the most that Grad-CAM may take, in forwards."""
STAGES = ("layer1", "layer2", "layer3", "layer4")
BATCH = 64
"""Images per forward of Score-CAM and RISE."""

Call = Callable[[], object]


def waits(call: Call) -> Call:
    """The call, which then waits for the accelerator to finish."""

    def synchronized() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return synchronized


def plain(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        model(images)


def stages_by_hand(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Grad-CAM of the predicted class at all four stages, written by hand for this network."""
    with torch.no_grad():
        x = model.maxpool(model.act1(model.bn1(model.conv1(images))))
        x = model.layer1(x)
    activations = [x.requires_grad_()]
    for name in STAGES[1:]:
        activations.append(model.get_submodule(name)(activations[-1]))
    logits = model.fc(model.global_pool(activations[-1]))
    gradients = torch.autograd.grad(logits.amax(1).sum(), activations)
    return [
        torch.einsum("bk,bkhw->bhw", gradient.mean((2, 3)), activation.detach()).relu()
        for activation, gradient in zip(activations, gradients, strict=True)
    ]


def two_backwards(model: nn.Module, images: Tensor) -> None:
    """The least that saliency and guided backpropagation need: one forward pass, two backward passes to the images."""
    leaf = images.detach().requires_grad_()
    score = model(leaf).amax(1).sum()
    torch.autograd.grad(score, leaf, retain_graph=True)
    torch.autograd.grad(score, leaf)


def grad_cam_library(model: nn.Module, images: Tensor) -> None:
    import pytorch_grad_cam as peer

    kinds = (peer.GradCAM, peer.GradCAMPlusPlus, peer.XGradCAM, peer.LayerCAM, peer.HiResCAM, peer.EigenCAM)
    for kind in kinds:
        with kind(model=model, target_layers=[model.layer4]) as method:
            method(input_tensor=images, targets=None)


def torchcam_library(model: nn.Module, images: Tensor) -> None:
    from torchcam import methods as peer

    for kind in (peer.GradCAM, peer.GradCAMpp, peer.XGradCAM, peer.LayerCAM):
        with kind(model, target_layer="layer4") as method:
            logits = model(images)
            method(logits.argmax(1).tolist(), logits)


def captum_library(model: nn.Module, images: Tensor) -> None:
    from captum.attr import LayerGradCam

    for _ in CAMS:
        LayerGradCam(model, model.layer4).attribute(images, target=0)


def one_image(model: nn.Module, images: Tensor, layer: str) -> dict[str, Call]:
    """Grad-CAM of the predicted class by each library, as its readme calls it."""

    def torchcam() -> None:
        from torchcam.methods import GradCAM

        with GradCAM(model, target_layer=layer) as method:
            logits = model(images)
            method(int(logits.argmax(1)), logits)

    def captum() -> None:
        from captum.attr import LayerGradCam

        with torch.no_grad():
            predicted = int(model(images).argmax(1))
        LayerGradCam(model, model.get_submodule(layer)).attribute(images, target=predicted)

    def grad_cam() -> None:
        from pytorch_grad_cam import GradCAM

        with GradCAM(model=model, target_layers=[model.get_submodule(layer)]) as method:
            method(input_tensor=images, targets=None)

    peers = {"torchcam": torchcam, "captum": captum, "pytorch_grad_cam": grad_cam}
    ours = {"sightline, automatic layer": partial(sl.explain, model, images)}
    ours["sightline, named layer"] = partial(sl.explain, model, images, layer=layer)
    return ours | {name: call for name, call in peers.items() if find_spec(name) is not None}


def beside_a_cpu(model: nn.Module, images: Tensor, methods: tuple[str, ...]) -> dict[str, float]:
    """Largest difference of each map to that of a CPU, divided by its largest value."""
    maps = sl.explain(model, images, 0, methods).maps
    cpu_maps = sl.explain(model.cpu(), images.cpu(), 0, methods).maps
    model.to(images.device)
    return {name: float((maps[name].cpu() - other).abs().max() / other.abs().max()) for name, other in cpu_maps.items()}


def main() -> None:
    rows = Rows(__doc__)
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name, side, layer, bar in SINGLE:
        network, image = timm.create_model(name).eval().to(DEVICE), torch.randn(1, 3, side, side, device=DEVICE)
        prefix = f"one image, {name}, {side} px"
        calls = {f"{prefix}: {who}": waits(call) for who, call in one_image(network, image, layer).items()}
        bars = {f"{prefix}: sightline, automatic layer": bar}
        rows.contest(calls, waits(partial(plain, network, image)), bars)
    keep_freed_memory()  # the rows above have the memory of a Python process as it is
    torch.set_num_threads(2)
    model = timm.create_model("resnet50").eval().to(DEVICE)
    images = torch.randn(16, 3, 224, 224, device=DEVICE)
    small = timm.create_model("resnet18").eval().to(DEVICE)
    pair = torch.randn(2, 3, 64, 64, device=DEVICE)
    many = torch.randn(BATCH, 3, 64, 64, device=DEVICE)
    every = torch.arange(1000, device=DEVICE).expand(16, -1)
    forward = partial(plain, model, images)
    explain = partial(sl.explain, model, images)

    def row(what: str, ours: Call, reference: Call, bar: float | None, most: int | None = None) -> None:
        rows.ratio(what, waits(ours), waits(reference), bar, most)

    row("six CAM methods / forward", lambda: explain(methods=CAMS), forward, 1.05)
    row("cam + grad_cam, 1,000 classes / forward", lambda: explain(every, ["cam", "grad_cam"]), forward, 1.10)
    row("grad_cam, layer3 + layer4 / forward", lambda: explain(layer=STAGES[2:]), forward, 1.25)
    by_hand = partial(stages_by_hand, model, images)
    row("grad_cam, four stages / by hand", lambda: explain(layer=STAGES), by_hand, 1.05)
    back = partial(two_backwards, model, images)
    row("guided x 2 + saliency / forward + two backwards", lambda: explain(methods=GUIDED), back, 1.05)
    row("six CAM methods, compile=True / forward", lambda: explain(methods=CAMS, compile=True), forward, 1.0)
    for method in ("score_cam", partial(sl.explainers.rise, masks=500)):
        name = method if isinstance(method, str) else "rise"
        ours = partial(sl.explain, small, pair, methods=[method], batch_size=BATCH)
        sizes = batches_of(small, ours)
        reference = partial(bare, small, many, sizes)
        row(f"{name} / its {sum(sizes):,} bare forwards, resnet18, 64 px", ours, reference, 1.05)
        if DEVICE == "cpu":
            rows.memory(f"{name}, peak memory / that of the bare forwards", ours, reference)
    peers = {
        "pytorch_grad_cam": ("grad-cam, the same six methods / forward", grad_cam_library),
        "torchcam": ("torchcam, four of them / forward", torchcam_library),
        "captum": ("captum, six calls of LayerGradCam / forward", captum_library),
    }
    for package, (what, library) in peers.items():
        if find_spec(package) is not None:
            row(what, partial(library, model, images), forward, None, 3)
    if DEVICE != "cpu":
        for name, gap in beside_a_cpu(small, pair, CAMS + GUIDED + ("integrated_gradients", "lrp")).items():
            rows.number(f"{name}: largest difference to a CPU / largest value", gap, 1e-4)
    rows.save("explain", f"resnet50, 224 px, batch 16, {DEVICE}, 2 threads")


if __name__ == "__main__":
    main()
