"""Re-identification: the neck, its triplet loss, batches by identity, validation and the task on other identities."""

import json
import pickle
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.reference import retrieval as reference
from torch import nn
from torch.nn.functional import normalize

import sightline as sl
from sightline import bench, cli, data, runs, tasks
from sightline.data.sets import batches
from sightline.inference import features_of
from sightline.models.neck import BNNeck, batch_hard_triplet
from sightline.models.transformed import add_transformer
from sightline.recipe import Data, Model, Optim, Recipe
from sightline.report.ranked import write_ranked
from sightline.training import fit

OPTIONS = {"depth": 8, "width": 0.25, "stem_stride": 2}
SMALL = Recipe(
    data=Data(source="clutter-person", size=(32, 16), train_size=400, test_size=40),
    model=Model(name="cifar_resnet", options=OPTIONS | {"neck": {"triplet": 1.0}}),
    optim=Optim(epochs=1, lr=0.01, batch_size=32, images_per_class=2),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trained = fit(SMALL, tmp_path_factory.mktemp("reid") / "run", progress=False)
    assert isinstance(trained, runs.Run)
    return trained


def loop_triplet(features, labels, margin):
    losses = []
    for i, anchor in enumerate(features):
        distances = [sum((a - b) ** 2 for a, b in zip(anchor, other, strict=True)) ** 0.5 for other in features]
        same = [d for j, d in enumerate(distances) if j != i and labels[j] == labels[i]]
        others = [d for j, d in enumerate(distances) if labels[j] != labels[i]]
        if same and others:
            losses.append(max(0.0, margin + max(same) - min(others)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(5))
def test_triplet_loss_equals_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(24, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 8, (24,), generator=generator)
    loss = batch_hard_triplet(features, labels, 0.3)
    assert float(loss.detach()) == pytest.approx(loop_triplet(features.tolist(), labels.tolist(), 0.3), abs=1e-9)
    loss.backward()
    assert features.grad is not None and features.grad.abs().sum() > 0


def test_triplet_loss_without_pairs_is_zero():
    features = torch.randn(3, 4, requires_grad=True)
    loss = batch_hard_triplet(features, torch.arange(3))
    loss.backward()
    assert float(loss.detach()) == 0 and features.grad is not None and not features.grad.any()


def test_neck_trains_features_before_its_norm():
    torch.manual_seed(0)
    neck, features = BNNeck(6, 3, triplet=2.0), torch.randn(8, 6)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    logits = neck(features)
    expected = 2 * loop_triplet(features.tolist(), labels.tolist(), 0.3)
    assert float(neck.own_loss(logits, labels)) == pytest.approx(expected, rel=1e-5)
    assert neck.own_loss(logits, labels) == 0  # used once
    normed = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
    assert torch.allclose(logits, normed @ neck.fc.weight.T, atol=1e-6)
    assert not neck.norm.bias.requires_grad and neck.fc.bias is None
    neck(features)
    assert pickle.loads(pickle.dumps(neck)).features is None
    neck.eval()(features)
    plain = BNNeck(6, 3)
    assert plain.own_loss(plain(features), labels) == 0


@pytest.mark.parametrize("attention", [None, "bap", "brnpa"])
def test_neck_on_any_network(attention):
    options = {} if attention is None else {"attention": attention}
    model = sl.create_model("cifar_resnet", num_classes=7, depth=8, neck={}, **options).eval()
    images = torch.rand(2, 3, 32, 16)
    assert model(images).shape == (2, 7)
    with torch.no_grad():
        features = features_of(model, images)
    neck = model.get_submodule("fc")
    assert isinstance(neck, BNNeck) and features.shape == (2, 64 * (1 if attention is None else 3))
    assert torch.equal(neck.fc(features), model(images))


def test_neck_refuses():
    with pytest.raises(ValueError, match="neck: expected triplet and margin, got triplets; leave the others out"):
        sl.create_model("cifar_resnet", neck={"triplets": 1.0})
    with pytest.raises(ValueError, match=r"expected triplet and margin of 0 or more, got -1\.0 and 0\.3"):
        sl.create_model("cifar_resnet", neck={"triplet": -1.0})
    with pytest.raises(
        ValueError,
        match=r"expected a network with one head, an nn\.Linear that makes the logits, got Sequential; leave",
    ):
        sl.models.neck.add_neck(nn.Sequential(nn.Conv2d(3, 2, 1)))


def test_the_head_is_the_layer_that_makes_the_logits():
    model = sl.create_model("cifar_resnet", num_classes=5, depth=8, neck={}).eval()
    add_transformer(model)  # its affine map is registered last
    assert isinstance(model.get_submodule("fc"), BNNeck)
    images = torch.rand(2, 3, 32, 16)
    with torch.no_grad():
        assert torch.equal(tasks.encoder(model)(images), features_of(model, images))
    again = sl.models.neck.add_neck(model)
    assert not isinstance(again.get_submodule("spatial_transformer.affine"), BNNeck)
    small = {"backbone": "cifar_resnet", "backbone_options": {"depth": 8, "width": 0.25}}
    with pytest.raises(ValueError, match=r"expected a network with one head, .*, got FCAN; leave out neck"):
        sl.create_model("fcan", neck={}, **small)
    tall = {"num_classes": 3, "img_size": (64, 32), "depth": 1}
    assert isinstance(sl.create_model("vit_tiny_patch16_224", neck={}, **tall).get_submodule("head"), BNNeck)


def test_install_line_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    with pytest.raises(ModuleNotFoundError, match=r"install it: pip install 'sightline\[reid\]'"):
        BNNeck(4, 2, triplet=1.0)
    BNNeck(4, 2)


def test_batches_by_identity():
    images = data.load(Data(source="clutter-person", size=(32, 16), train_size=500))["train"]
    labels = [batch.labels.tolist() for batch in batches(images, 12, shuffle=(0, 0), drop_last=True, per_class=4)]
    assert len(labels) == 41
    for batch in labels:
        assert all(len({*batch[i : i + 4]}) == 1 for i in (0, 4, 8))
    firsts = [batch[0] for batch in labels]
    again = [b.labels[0].item() for b in batches(images, 12, shuffle=(0, 0), drop_last=True, per_class=4)]
    other = [b.labels[0].item() for b in batches(images, 12, shuffle=(0, 1), drop_last=True, per_class=4)]
    assert firsts == again != other and len({*firsts}) > 20


def by_loop(run):
    """Ranks of all queries, one by one, from features of image and mirrored image."""
    splits = {name: replace(images, preprocess=run.preprocess) for name, images in data.load(run.recipe.data).items()}
    model = runs.load_model(run.folder)
    neck = model.get_submodule("fc")
    features = {}
    for name in ("query", "gallery", "val"):
        seen = []
        hook = neck.norm.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output))
        batch = splits[name].batch(range(len(splits[name])))
        inputs = data.normalize(batch.images, run.preprocess)
        with torch.no_grad():
            model(inputs)
            model(inputs.flip(3))
        hook.remove()
        one, mirrored = map(normalize, seen)
        features[name] = (one, normalize(one + mirrored))
    return splits, features


def hits_of(query, gallery, similarities):
    for row, values in enumerate(similarities.tolist()):
        order = sorted(range(len(values)), key=lambda i: -values[i])
        yield reference.hits(order, query.labels[row], query.cameras[row], gallery.labels, gallery.cameras)


def test_task_equals_a_loop(run):
    outcome = tasks.perform("retrieval", run)
    splits, features = by_loop(run)
    similarities = features["query"][1] @ features["gallery"][1].T
    found = [*hits_of(splits["query"], splits["gallery"], similarities)]
    assert len(found) == 40
    expected = {
        "rank-1": [reference.cmc(hits, 1) for hits in found],
        "rank-5": [reference.cmc(hits, 5) for hits in found],
        "mAP": [reference.torchreid_average_precision(hits) for hits in found],
        "mAP (trapezoid)": [reference.dg_net_average_precision(hits) for hits in found],
    }
    for name, values in expected.items():
        assert np.allclose(outcome.figures[name].values, values, atol=1e-6), name
    chance = outcome.figures["rank-1"].chance
    assert chance == pytest.approx(6 / 798, abs=1e-12)  # of 8 images two are junk, one of them the query itself
    assert 0 < outcome.figures["rank-1"].interval.value < 1
    alone = tasks.perform("retrieval", run, mirror=False)
    hits = [*hits_of(splits["query"], splits["gallery"], features["query"][0] @ features["gallery"][0].T)]
    assert np.allclose(alone.figures["rank-1"].values, [reference.cmc(found, 1) for found in hits])


def test_validation_is_rank_1_of_held_out_identities(run):
    splits, features = by_loop(run)
    images, one = splits["val"], features["val"][0]
    hits = [*hits_of(images, images, one @ one.T)]
    assert run.history[-1]["val_accuracy"] == pytest.approx(
        np.mean([reference.cmc(found, 1) for found in hits]), abs=0.005
    )
    assert np.isnan(run.history[-1]["val_loss"])


def test_found_lists_the_nearest_with_junk(run):
    model = runs.load_model(run.folder)
    found = tasks.find(run, model, queries=5, k=8)
    splits, features = by_loop(run)
    assert len({*found.query.labels.tolist()}) == 5
    rows = [splits["query"].names.index(name) for name in found.query.names]
    similarities = features["query"][1][rows] @ features["gallery"][1].T
    itself = torch.tensor([splits["gallery"].names.index(name) for name in found.query.names])
    similarities.scatter_(1, itself[:, None], -2.0)  # the query is in the gallery, but not in its own list
    assert torch.allclose(found.scores, similarities.topk(8).values, atol=1e-5)
    for row in range(5):
        assert found.query.names[row] not in [found.gallery.names[place] for place in found.places[row]]
        assert found.verdict(row, int(itself[row])) == "junk"
        for place in range(800):
            same = found.gallery.labels[place] == found.query.labels[row]
            camera = found.gallery.cameras[place] == found.query.cameras[row]
            assert found.verdict(row, place) == ("wrong" if not same else "junk" if camera else "right")


def test_train_and_task_by_the_command_line(tmp_path, capsys):
    out = tmp_path / "run"
    small = ["--data.size", "32,16", "--data.train_size", "200", "--data.test_size", "20", "--optim.epochs", "1"]
    small += [f"--model.options.{name}={value}" for name, value in OPTIONS.items()]
    cli.main(["train", "--data", "clutter-person", "--model", "cifar_resnet", *small, "--out", str(out)])
    said = capsys.readouterr().out
    assert "rank-1" in said and "task-retrieval.json" in said and "report" not in said
    assert (out / "ranked.html").is_file()
    cli.main(["task", "retrieval", str(out), "--task.mirror", "false", "--out", str(tmp_path)])
    assert " identities" in capsys.readouterr().out
    assert json.loads((tmp_path / "task-retrieval.json").read_text())["figures"]["mAP"]["unit"] == "queries"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.batch_size": 30, "optim.images_per_class": 4}, r"optim\.batch_size: expected a multiple of optim\.im"),
        ({"augment.mixup": 0.2}, r"augment\.mixup: expected 0 with BNNeck, whose own loss takes one label per "),
        ({"augment.rotate": True}, r"augment\.rotate: expected images as high as wide"),
    ],
)
def test_settings_that_do_not_go_together(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(SMALL, tmp_path / "run", changes, progress=False)
    assert not (tmp_path / "run").exists()


def table_of(folder, lines):
    """A table of small images with the columns who, seen and split."""
    rng = np.random.default_rng(0)
    for i in range(len(lines)):
        Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [f"{i}.png,{line}" for i, line in enumerate(lines)]
    (folder / "people.csv").write_text("\n".join(["image,who,seen,split", *rows]) + "\n")
    return Data(source=str(folder / "people.csv"), label="who", camera="seen", size=(32, 16))


def test_validation_without_a_match_is_refused(tmp_path):
    lines = [f"{who},{camera},train" for who in "abcd" for camera in (1, 2, 3, 4)]
    lines += [f"{who},{camera},test" for who in "ef" for camera in (1, 2)]
    lines += [f"{who},{camera},val" for who, camera in (("g", 1), ("g", 1), ("h", 2))]
    recipe = replace(SMALL, data=table_of(tmp_path, lines), optim=Optim(epochs=1, batch_size=8))
    with pytest.raises(ValueError, match="expected a val image whose identity another camera has seen, got none of 3"):
        fit(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_notices_of_queries_and_of_the_gallery_are_told_once(run, tmp_path):
    for folder, names in {
        "bounding_box_train": [f"{who:04d}_c{camera}.png" for who in (1, 2, 3) for camera in (1, 2)],
        "query": ["0004_c1.png", "0005_c1.png"],
        "bounding_box_test": ["0004_c2.png", "0005_c2.png"],
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            rng = np.random.default_rng([*name.encode()])
            Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(tmp_path / folder / name)
    for folder, name in (("query", "0004_c1"), ("bounding_box_test", "0005_c2")):
        (tmp_path / folder / f"{name}_again.png").write_bytes((tmp_path / folder / f"{name}.png").read_bytes())
    notices = tasks.perform("retrieval", run, source=str(tmp_path)).notices
    told = [notice for notice in notices if "repeat another of the same identity and camera" in notice]
    assert [notice.split()[1] for notice in told] == ["query", "gallery"] and len({*notices}) == len(notices)


@pytest.mark.parametrize("name", ["robustness", "segmentation"])
def test_tasks_of_classes_refuse_identities(name, run):
    with pytest.raises(
        ValueError, match="expected images with classes, got identities of clutter-person; use the task"
    ):
        tasks.perform(name, run)


def test_a_run_as_weights_gives_both_sides_of_its_images(run):
    start = replace(SMALL, data=Data(source="clutter-person"), model=replace(SMALL.model, weights=str(run.folder)))
    assert runs.filled(start).data.size == (32, 16)


def test_data_without_identities(run, tmp_path):
    with pytest.raises(ValueError, match="expected data of identities seen by cameras, got clutter; name the column"):
        tasks.perform("retrieval", run, source="clutter")


def test_page_of_ranked_lists(run, tmp_path):
    model = runs.load_model(run.folder)
    found = tasks.find(run, model, queries=3, k=10)
    page = write_ranked(found, model, tmp_path / "ranked.html", run).read_text()
    marks = {"right": "✓ right", "wrong": "✗ wrong", "junk": "– junk"}
    shown = re.findall(r'<b class="verdict \w+">(.+?)</b><small>(rank \d+, )?', page)
    expected = []
    for row in range(3):
        rank = 0
        for place in found.places[row].tolist():
            kind = found.verdict(row, place)
            rank += kind != "junk"
            expected.append((marks[kind], "" if kind == "junk" else f"rank {rank}, "))
    assert len(expected) == 30 and [one for one in shown if one != ("", "")] == expected
    for kind, mark in marks.items():
        count = sum(text == mark for text, _ in expected)
        assert f'<b class="verdict {kind}">{mark}</b> {count}' in page
    assert page.count('class="pixels"') == 3 * (1 + 3 * 10) and 'src="http' not in page
    assert "of its positive values lie in the" in page


def test_maps_of_a_pair_add_up_to_its_product(run):
    net = tasks.encoder(runs.load_model(run.folder))
    gallery = replace(data.load(run.recipe.data)["gallery"], preprocess=run.preprocess)
    images = data.normalize(gallery.batch(range(3)).images, run.preprocess)
    with torch.no_grad():
        features = net(images)
        shift = net.get_submodule("fc").norm(torch.zeros(1, features.shape[1]))  # what the norm adds at no position
    partner = features[[1, 2, 0]]
    maps = sl.explain(net, images, sl.targets.Similarity(partner, cosine=False), ["hires_cam"])["hires_cam"]
    products = ((features - shift) * normalize(partner)).sum(1)
    assert torch.allclose(maps.sum((1, 2, 3)), products, rtol=1e-4, atol=1e-5)


def test_a_study_on_identities_compares_by_retrieval(tmp_path):
    file = tmp_path / "study.yaml"
    rows = {"GAP": {}, "parts": {"model.options.attention": "brnpa"}}
    recipe = replace(SMALL, data=replace(SMALL.data, train_size=200, test_size=20))
    file.write_text(sl.recipe.dump(recipe) + f"rows: {json.dumps(rows)}\ntasks: [retrieval]\n")
    result = bench.bench(bench.load_study(file), tmp_path / "out")
    columns, lines = result.table()
    assert "accuracy, %" not in columns and not result.failed and not result.no_costs
    for row, line in zip(rows, lines, strict=True):
        network = runs.open_run(bench.folder(tmp_path / "out", row, 0))
        expected = tasks.perform("retrieval", network).figures["rank-1"].interval.value
        assert line[columns.index("retrieval, rank-1")] == f"{expected:.3f}"
