"""The pages under examples/, with fewer steps: they run, and what they say is true."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sightline as sl
from sightline.bench import Bench, Maps, Measured

pytestmark = pytest.mark.usefixtures("without_shape_checks")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def test_attention_toy(tmp_path, capsys):
    import attention_toy

    found = attention_toy.main(["--steps", "80", "--out", str(tmp_path / "toy.png")])
    assert found["accuracy"] > 0.9 and found["energy"] > 0.8
    assert found["energy before"] == pytest.approx(found["area"], abs=0.02)
    assert (tmp_path / "toy.png").stat().st_size > 10_000 and "after training" in capsys.readouterr().out


def test_spatial_and_channel(tmp_path):
    import spatial_and_channel

    found = spatial_and_channel.main(["--steps", "200", "--out", str(tmp_path / "both.png")])
    assert min(found["accuracy, where"], found["accuracy, what"]) > 0.9 and found["energy"] > 1.5 * found["area"]
    assert found["shift"] < 1e-5 and found["channel"] < 1e-5
    assert found["named"] > 0.95 and found["spread"] > 0.5  # the weights of channels say which light it is
    assert found["mean weights"] > 0.9 and found["other light"] < 0.65  # and the network needs them
    assert {path.name for path in tmp_path.iterdir()} == {"both.png", "both-what.png"}


def test_soft_and_hard(tmp_path, capsys):
    import soft_and_hard

    found = soft_and_hard.main(["--steps", "100", "--out", str(tmp_path / "hard.png")])
    assert (
        found["soft"]["soft"] > 0.95 and found["REINFORCE"]["best"] > 0.85 and found["straight-through"]["best"] > 0.8
    )
    for name in ("soft", "REINFORCE", "straight-through"):
        assert found[name]["energy"] > 0.7  # 0.17 by chance
        assert found[name]["hits"] == pytest.approx(found[name]["energy"], abs=0.04)  # 500 draws
        assert found[name]["gap"] < 1e-4  # read as it was trained, it gives its own logits
    assert found["REINFORCE"]["positions"] < found["soft"]["positions"] > found["straight-through"]["positions"]
    assert found["soft"]["drawn"] < found["soft"]["soft"]

    together = found["same scores"]
    assert together["sum"] < 1e-5 and together["not one-hot"] == 0
    assert together["distance"] == pytest.approx(together["sampling error"], rel=0.25)
    cooling = [together[f"T = {t:g}"] for t in soft_and_hard.COOLING]
    assert cooling == sorted(cooling, reverse=True) and cooling[0] > 0.3 and cooling[-1] < 0.02
    assert (tmp_path / "hard.png").stat().st_size > 10_000 and "one draw" in capsys.readouterr().out


def test_bam_se_cbam(tmp_path, capsys):
    import bam_se_cbam

    maps = Maps(energy={}, sparsity={}, activation_energy=0.1, similarity=float("nan"))
    rest = dict(majority=0.1, area=0.1, parameters=1, seconds=1.0, before=maps, after=maps)
    runs = [Measured(row="BAM", seed=seed, accuracy=0.5 + seed / 4, **rest) for seed in (0, 1)]
    file = tmp_path / "bench.json"
    file.write_text(
        json.dumps(asdict(Bench(control="control", rows=("control", "BAM"), measured=tuple(runs), failed={})))
    )
    options = ["--steps", "80", "--pixels", "64", "--bench", str(file)]
    found = bam_se_cbam.main([*options, "--out", str(tmp_path / "three.png")])

    def of(what):
        return [found[name].get(what) for name in ("none", "SE", "CBAM", "BAM")]

    assert of("parameters") == [25_557_032, 28_088_024, 28_089_624, 25_915_099]
    assert of("single") == [0, 8_464, 8_564, 17_361] and of("places") == [0, 16, 16, 3]
    assert of("macs") == sorted(of("macs"))  # SE multiplies least, BAM most
    assert found["BAM"]["saved"] < found["SE"]["saved"] < found["CBAM"]["saved"]
    assert min(of("accuracy")) > 0.9
    assert max(of("error")[1:]) < 1e-5  # the equations of the page are those of the blocks
    assert max(found["SE"]["high"], found["CBAM"]["high"]) < 1 <= found["BAM"]["low"] < found["BAM"]["high"] <= 2
    assert found["CBAM"]["contrast"] > 1.2 and found["BAM"]["contrast"] > 1.2 and "contrast" not in found["SE"]
    printed = capsys.readouterr().out
    assert "BAM     62.5 %, mean of 2 seeds" in printed and "CBAM    not in it" in printed
    assert (tmp_path / "three.png").stat().st_size > 10_000


def test_two_level_attention(tmp_path, capsys):
    import two_level_attention as example

    images, masks = torch.arange(2 * 1600.0).reshape(2, 1, 40, 40), torch.zeros(1, 2, 40, 40, dtype=torch.bool)
    assert torch.equal(example.windows(images)[1, 7], images[1, :, 5:25, 10:30])
    masks[0, 0, :2, :2], masks[0, 1, 24:26, 9] = True, True
    assert example.shown(masks)[0, [0, 6]].tolist() == [[1, 0], [0, 0.5]]

    found = example.main(["--images", "450", "--steps", "60", "--out", str(tmp_path / "two.png")])
    assert found["kept windows, on a digit"] > 1.3 * found["random windows, on a digit"]
    assert min(found[name] for name in found if name.endswith("accuracy")) > 0.15  # 0.11 by chance
    assert found["both, accuracy"] > found["kept windows, accuracy"] and found["filters in the smaller cluster"] >= 1
    assert (tmp_path / "two.png").stat().st_size > 10_000 and "by chance" in capsys.readouterr().out


STUDY = """
data: {train_size: 64, test_size: 20, size: 24}
model: {name: cifar_resnet, options: {depth: 8, width: 0.25, stem_stride: 2}}
optim: {epochs: 1}
seeds: [0, 1]
rows:
  control: {}
  SE: {model.options.attention: se}
  CBAM: {model.options.attention: cbam}
  BAM: {model.options.attention: bam}
  parts: {model.options.attention: brnpa}
"""


@pytest.mark.usefixtures("few_validation_images")
def test_noise(tmp_path, capsys):
    import noise

    images = torch.full((1, 3, 100, 100), 100, dtype=torch.uint8)
    assert torch.equal(noise.noisy(images, 0.0, 0), images)
    added = noise.noisy(images, 0.05, 0).float() - 100
    assert added.std() == pytest.approx(0.05 * 255, rel=0.02) and abs(added.mean()) < 0.2
    assert noise.noisy(images, 3.0, 0).unique().tolist()[::255] == [0, 255]
    (tmp_path / "study.yaml").write_text(STUDY)
    found = noise.main(["--study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "runs")])
    assert found.keys() == {(row, sigma) for row in noise.ROWS for sigma in noise.SIGMAS}
    for seed, accuracy in enumerate(found["SE", 0.0]):
        assert (
            json.loads((tmp_path / "runs" / "SE" / f"seed-{seed}" / "measured.json").read_text())["accuracy"]
            == accuracy
        )
    printed = capsys.readouterr().out
    assert "| BAM | " in printed and "difference to the control" in printed


def test_page_of_maps(tmp_path, capsys):
    import page_of_maps

    start = sl.recipe.Recipe(
        data=sl.recipe.Data(train_size=64, test_size=60),
        model=sl.recipe.Model(name="cifar_resnet", options={"depth": 8, "width": 0.25, "stem_stride": 2}),
        optim=sl.recipe.Optim(epochs=1),
    )
    sl.fit(start, tmp_path / "run")
    found = page_of_maps.main([str(tmp_path / "run"), "--images", "2", "--out", str(tmp_path / "maps")])
    printed = capsys.readouterr().out
    missing = {"attention", "attention_rollout", "gradient_rollout"}
    assert set(found["methods"]) == set(sl.explainers.EXPLAINERS) - missing
    assert all(f"left out: {name}: expected" in printed for name in missing)

    model, images = sl.load(tmp_path / "run"), sl.data.load(start.data)["test"]
    chosen = images.batch(np.array([images.names.index(name) for name in found["images"]]))
    inputs = sl.data.normalize(chosen.images, images.preprocess)
    assert model(inputs).argmax(1).tolist() == chosen.labels.tolist() and len(set(found["images"])) == 2
    with Image.open(tmp_path / "maps" / "page.png") as page:
        rows = -(-len(found["methods"]) // page_of_maps.COLUMNS)
        assert page.width == 12 * 100 - 4 and page.height > rows * 2 * 100 and page.mode == "P"
    pictures = sl.maps.resize(chosen.images.float(), (96, 96)).round().to(torch.uint8)
    cam = sl.explain(model, inputs, methods=["cam"])
    expected = sl.maps.overlay(pictures, cam["cam"], opacity=0.75, signed=True)[1, 0]
    assert torch.equal(page_of_maps.page_of(pictures, cam.maps)[:, -96:, -96:], expected)
    pair = sl.explain(model, inputs, methods=["hires_cam", "saliency"])
    table = page_of_maps.correlations(pair.maps, tuple(inputs.shape[2:]))
    one, two = (sl.maps.resize(pair[name], tuple(inputs.shape[2:])).relu().flatten(1) for name in pair.maps)
    slow = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(one.numpy(), two.numpy(), strict=True)])
    assert float(table[0, 1]) == pytest.approx(slow, abs=1e-5) and table.diag().tolist() == pytest.approx([1, 1])
    assert all(f"\n{name:28}" in printed for name in found["methods"][1:]) and "center_map" in printed
