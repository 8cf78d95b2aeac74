"""Wrong command lines: each ends in one line and exit code 2, before anything is written."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from tests.test_cli import refused

from sightline import models, runs
from sightline.data import Preprocess
from sightline.recipe import Data, Model, Recipe

SECONDS = 30
OPTIONS = {"width": 1 / 16, "stem_pool": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run that nobody trained (`run`), images by class (`images`), and files that are none."""
    root = tmp_path_factory.mktemp("lines")
    torch.manual_seed(0)
    classes = tuple("0123456789")
    recipe = Recipe(
        data=Data(source="clutter", train_size=20, test_size=10), model=Model(name="vgg_gap", options=OPTIONS)
    )
    run = runs.Run(
        folder=root / "run",
        recipe=recipe,
        seed=0,
        classes=classes,
        preprocess=Preprocess(size=(24, 24), mean=(0.5,) * 3, std=(0.2,) * 3),
        info={},
        history=[],
        skipped=[],
    )
    runs.save(run, models.create_model("vgg_gap", num_classes=10, **OPTIONS).state_dict())
    for kind, name in enumerate(("cat", "dog")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng((kind, i)).integers(0, 255, (24, 20, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    (root / "notes.txt").write_text("x")
    (root / "empty").mkdir()
    (root / "study.yaml").write_text("rows: {}\n")
    (root / "broken.yaml").write_text("optim: [\n")
    (root / "odd.yaml").write_text("optim: {epoch: 3}\n")
    return root


TRAIN = "train --data images --out new --optim.epochs 1 --data.size 24"
EXPLAIN = "explain run images --out new"
EVALUATE = "evaluate run --out new"
LINES = [
    *(
        "",
        "trian",
        "--verson",
        "train extra",
        "explain",
        "explain run",
        "explain run images",
        "evaluate",
        "list nothing",
    ),
    *("list models --compare", "list models --compare resnet18", "list attention --compare nothing", "list a b"),
    *("demo extra", "demo --data clutter", "demo --limit 0", "demo --optim.epochs", "demo --optim.epochs three"),
    *("demo --optim.epochs 0", "demo --optim.epochs 1.5", "demo --optim.epoch 3", "demo --data.size 23", "demo --out"),
    *("demo --data.size 0", "demo --data.size -1", "demo --data.size 2", "demo --optim.lr nan", "demo --optim.lr 0"),
    *(
        "bench",
        "bench nowhere.yaml --out new",
        "bench study.yaml",
        "bench study.yaml --out new",
        "sight",
        "sight --out",
    ),
    *("bench broken.yaml --out new", "bench odd.yaml --out new", "bench images --out new", "bench notes.txt --out new"),
    *("reproduce --seeds 1", "reproduce nothing", "reproduce ltpa-cifar10 --jobs 0", "sight --out new --sets nothing"),
    *("sight --out new --budget soon", "sight --out new --known --optim.epochs 1", "push run", "push nowhere a/b"),
    *("pull a/b", "pull nothing --out new", "export run", "export run --out new.xyz", "export nowhere --out new.onnx"),
    *("train --data images", "train --data nowhere --out new", "train --out new --recipe nowhere.yaml"),
    *("train --out new --recipe broken.yaml", "train --out new --recipe odd.yaml", "train --out new --recipe images"),
    *("train --out new --model resnet", "train --out new --model vgg_att4", "train --out notes.txt"),
    *("train --data notes.txt --out new", "train --data empty --out new", "train --data images/cat --out new"),
    *("train --data hub: --out new", "train --data hub:nothing --out new", "train --data '' --out new"),
    *(
        f"{TRAIN} {more}"
        for more in (
            *("--optim.batch_size 0", "--optim.batch_size 1", "--optim.batch_size two"),
            *("--optim.optimizer adam", "--optim.schedule cosines", "--optim.precision 16", "--optim.lr -1"),
            *(
                "--optim.momentum 1",
                "--optim.weight_decay -1",
                "--optim.ema 1",
                "--optim.patience 0",
                "--optim.alpha 2",
            ),
            *("--optim.clip_norm 0", "--optim.teacher nowhere", "--optim.teacher images", "--optim.compile maybe"),
            *("--optim.micro_batches -1", "--optim.sharded 3", "--optim.sync_batch_norm true", "--optim.warmup -1"),
            *("--data.size 0", "--data.size 1", "--data.size 2", "--data.size x", "--data.val 1", "--data.val -1"),
            *("--data.test 1", "--data.test 2", "--data.label kind", "--data.group patient", "--data.mask m"),
            *("--data.box b", "--data.image i", "--data.train_size 0", "--data.train_size 1", "--data.test_size 0"),
            *("--data.streaming true", "--data.seed -1", "--data.shortcut 2", "--augment.crop -1", "--augment.crop 24"),
            *("--augment.scale 0", "--augment.scale 2", "--augment.color 3", "--augment.cutout -1", "--seeds a"),
            *("--augment.mixup -1", "--augment.flip perhaps", "--seeds 0,0", "--seeds -1", "--seeds ''", "--limit 0"),
            *("--limit x", "--model.options.width 0", "--model.options.widht 1", "--model.options.width wide"),
            *("--model.options.stem_pool 0", "--model.options [1]", "--model.weights nowhere", "--model.weights empty"),
            *("--model.weights notes.txt", "--model.weights pretrained", "--model.options.attention sea"),
            *("--model.options.attention_options.k 3", "--model.options.high_resolution 2", "--model.name nothing"),
            *("--model resnet18 --model.options.act_layer nothing", "--model tiny_vit --model.options.patch 0"),
            *("--model test_vit --model.options.patch_size 0", "--model protopnet --model.options.backbone nothing"),
            *("--model resnet18 --data.size 2", "--model resnet18 --optim.batch_size 1", "--recipe", "--resume extra"),
            *(
                "--model tiny_vit --data.size 3",
                "--model test_resnet --data.size 3",
                "--model cifar_resnet --data.size 1",
            ),
            *("--print-recipes", "--unknown 3", "--unknown.field 3", "--optim", "--strict --data.strict maybe"),
        )
    ),
    *("explain nowhere images --out new", "explain images images --out new", "explain notes.txt images --out new"),
    *("explain resnet18 images --out new", "explain resnet images --weights notes.txt --out new"),
    *("explain resnet18 images --weights notes.txt --out new", "explain resnet18 images --weights empty --out new"),
    *("explain run nowhere.png --out new", "explain run notes.txt --out new", "explain run empty --out new"),
    *(
        f"{EXPLAIN} {more}"
        for more in (
            *(
                "--methods ''",
                "--methods ,",
                "--methods grad_kam",
                "--methods attention",
                "--methods grad_cam,grad_kam",
            ),
            *("--methods grad_cam,grad_cam", "--methods grad_cam@", "--methods grad_cam@nowhere", "--methods all,cam"),
            *(
                "--layer ''",
                "--layer nowhere",
                "--layer head",
                "--target x",
                "--target 10",
                "--target -1",
                "--target ''",
            ),
            *("--batch-size 0", "--batch-size x", "--weights notes.txt", "--classes notes.txt", "--data.size 24"),
            *("--methods attention,grad_cam --strict", "--overlays extra.png", "--unknown", "--optim.epochs 3"),
        )
    ),
    *("evaluate nowhere", "evaluate images", "evaluate run run", "evaluate notes.txt", "evaluate run --out notes.txt"),
    *(
        f"{EVALUATE} {more}"
        for more in (
            *("--data nowhere", "--data images", "--data empty", "--data notes.txt", "--split tests", "--split ''"),
            *("--methods ''", "--methods grad_kam", "--methods attention", "--metrics ''", "--metrics deletion"),
            *("--metrics deletion_auc --fill gray", "--controls grad_cam", "--controls nothing", "--controls ''"),
            *("--budget 0s", "--budget soon", "--budget 3", "--steps 0", "--steps x", "--limit 0", "--limit -3"),
            *("--model.name vgg", "--optim.epochs 3", "--data.size 0", "--data.size 2", "--data.size x", "--fill ''"),
            *("--data.mask patch", "--data.label digit", "--data.test_size 0", "--unknown", "--seeds 1"),
            *("--data.size 77", "--data.size 40 --limit 1"),
        )
    ),
]


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line_is_answered_in_one_line(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    start = time.monotonic()
    arguments = ["" if word == "''" else word for word in line.split()]
    said = refused(capsys, *arguments)
    assert said.startswith("sightline") and ": error: " in said and len(said) < 1500, said
    assert time.monotonic() - start < SECONDS
    assert sorted(place.rglob("*")) == before
