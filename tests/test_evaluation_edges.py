"""What an evaluation must refuse, and what it must not claim."""

import os
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sightline.evaluation import batches as reading
from sightline.evaluation import evaluate, findings, planning
from sightline.evaluation.batches import Predictions
from sightline.evaluation.ranking import failing
from sightline.evaluation.scores import Scores, exact_text, key_of
from sightline.explainers import Explainer
from sightline.report import tables
from sightline.testing import PooledModel

MODEL = PooledModel(torch.eye(3))


def batches(n=12, size=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, 8, 8, generator=generator)
    labels = torch.randint(3, (n,), generator=generator)
    masks = torch.zeros(n, 1, 8, 8, dtype=torch.bool)
    masks[:, :, 2:5, 3:6] = True
    fields = {"images": images, "labels": labels, "masks": masks}
    return [{name: of[at : at + size] for name, of in fields.items()} for at in range(0, n, size)]


def stopping(after):
    def stop(what, done, total):
        if what == "explaining and scoring" and done >= after:
            raise KeyboardInterrupt

    return stop


def test_images_that_are_others_in_the_second_pass_are_refused(monkeypatch):
    monkeypatch.setattr(reading, "MEMORY", 0)
    images, labels, _ = (torch.cat([batch[name] for batch in batches(40)]) for name in ("images", "labels", "masks"))
    shuffled = DataLoader(TensorDataset(images, labels), 8, shuffle=True)
    with pytest.raises(ValueError, match=r"expected the same images in every pass over the data, got others .* shuffl"):
        evaluate(MODEL, shuffled, ["cam"], ["deletion_auc"], steps=2)
    straight = evaluate(MODEL, DataLoader(TensorDataset(images, labels), 8), ["cam"], ["deletion_auc"], steps=2)
    assert straight.n_images == 40


@pytest.mark.parametrize(("memory", "passes"), [(reading.MEMORY, 1), (0, 2)])
@pytest.mark.parametrize("budget", [None, 1e6])
def test_data_is_read_once_where_it_fits_in_memory_and_else_twice(memory, passes, budget, monkeypatch):
    class Counted:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(batches(40))

    monkeypatch.setattr(reading, "MEMORY", memory)
    data = Counted()
    found = evaluate(
        MODEL, data, ["cam", "grad_cam"], ["deletion_auc", "sparsity"], limit=10, steps=2, examples=4, budget=budget
    )
    assert data.passes == passes and len(found.per_image["name"]) == 10
    assert len(found.examples) == 4 and found.errors and len(found.worst["cam"]) == 3


def test_a_part_made_with_other_arguments_is_not_taken(tmp_path):
    class Shared(PooledModel):
        def forward(self, images, share):  # the logits are the same whatever the share, the gradients are not
            return super().forward(share * images + (1 - share) * images.detach())

    def score(columns, **more):
        share = torch.zeros(1, 1, 1, 8)
        share[..., :columns] = 1
        data = [batch | {"forward_kwargs": {"share": share}} for batch in batches()]
        found = evaluate(Shared(torch.eye(3)), data, ["saliency"], ["entropy"], controls=[], **more)
        return found.score("saliency", "entropy").interval.value

    with pytest.raises(KeyboardInterrupt):
        score(8, partial_results=tmp_path / "parts", progress=stopping(4))
    assert any((tmp_path / "parts").iterdir()) and score(1) < score(8) == 1
    assert score(1, partial_results=tmp_path / "parts") == score(1)


def test_volumes_are_refused():
    volumes = [(torch.rand(2, 1, 4, 4, 4), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"expected \(b, c, h, w\) for evaluate, got a volume \(2, 1, 4, 4, 4\)"):
        evaluate(MODEL, volumes, ["saliency"], ["deletion_auc"])


def test_an_answer_that_is_no_number_is_no_answer():
    class Broken(PooledModel):
        def forward(self, images):
            logits = super().forward(images)
            return torch.where(torch.arange(len(images))[:, None] == 2, torch.nan, logits)

    with pytest.raises(ValueError, match="expected finite logits, got others for 'image 2' and 2 more; leave"):
        evaluate(Broken(torch.eye(3)), batches(), ["cam"], ["deletion_auc"], steps=2)


def test_no_control_that_is_undefined_is_beaten():
    data = batches(20)
    for batch in data:
        batch["images"][:] = batch["images"][:, :, :1, :1]  # without edges or contrast

    @Explainer
    def known(activations):
        found = torch.rand(len(activations), 8, 8, generator=torch.Generator().manual_seed(0))
        found[:, 2:5, 3:6] += 3
        return found[:, None]

    found = evaluate(MODEL, data, [known], ["energy_in_mask"], controls=["random_map", "edge_map"])
    assert found.standings["energy_in_mask"].unbeaten == ()
    assert found.summary[3].endswith("; it beats every control that is defined for enough images (not edge map).")
    found = evaluate(MODEL, data, [known], ["energy_in_mask"], controls=["edge_map", "contrast_map"])
    assert "times what a map without" in found.summary[3]  # it is better than chance
    assert "control" not in found.summary[3]
    found = evaluate(MODEL, data, [known], ["iou"], controls=["edge_map", "contrast_map"])
    assert found.summary[3].endswith("; no control is defined for enough images.")
    assert tables.best(found, "iou") is None


def test_two_images_make_no_method_fail():
    def fails(values, groups=None):
        return failing({"random_logit": {"a": values}}, {"random_logit": ["a"]}, groups)["random_logit"]

    assert fails(np.array([0.98, 0.99])) == () and fails(np.array([0.9, 0.8] * 3)) == ("a",)
    assert fails(np.array([0.9, 0.8] * 3), np.array([0, 0, 0, 1, 1, 1])) == ()
    assert fails(np.array([0.9, 0.8, np.nan] * 3)) == ()


def test_metrics_are_at_odds_over_the_methods_that_both_have():
    names = ["random_map", "center_map", "edge_map", "contrast_map"]
    found = evaluate(MODEL, batches(), ["cam"], ["iou", "energy_in_mask"], controls=names)
    found = replace(found, metric_agreement=np.array([[1.0, -0.99], [-0.99, 1.0]]))
    both = [pair for pair in found.comparisons if {pair.method, pair.other} <= {"cam", "random_map", "center_map"}]
    of_two = [pair for pair in found.comparisons if pair.metric == "iou" or pair in both]
    assert len(list(findings._at_odds(found))) == 1
    assert not list(findings._at_odds(replace(found, comparisons=tuple(of_two))))  # one order of three in six


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"limit": 0}, "expected a limit of at least 1 image, got 0"),
        ({"limit": -3}, "expected a limit of at least 1 image, got -3"),
        ({"examples": -1}, "expected at least 0 examples, got -1"),
        ({"batch_size": 0}, "expected at least 1 image per batch, got 0"),
        ({"budget": 0.0}, "expected a budget above 0 seconds, got 0.0"),
        ({"budget": float("nan")}, "expected a budget above 0 seconds, got nan"),
        ({"metrics": "gini"}, r"expected a list of metrics or 'all', got 'gini'; write metrics=\['gini'\]"),
        ({"controls": "edge_map"}, r"expected a list of controls, got 'edge_map'; write controls=\['edge_map'\]"),
        ({"methods": "cam"}, r"expected a list of methods or 'all' or 'fast', got 'cam'; write methods=\['cam'\]"),
    ],
)
def test_bad_numbers_and_names_are_refused_before_the_work(asked, message):
    class Never(PooledModel):
        def forward(self, images):
            raise AssertionError

    with pytest.raises(ValueError, match=message):
        evaluate(Never(torch.eye(3)), batches(), **{"methods": ["cam"], "metrics": ["gini"]} | asked)


def test_a_method_that_does_not_fit_is_refused_or_left_out():
    asked = {"data": batches(), "methods": ["cam", "attention"], "metrics": ["gini"], "controls": ["random_map"]}
    with pytest.raises(ValueError, match="attention"):
        evaluate(MODEL, **asked)
    found = evaluate(MODEL, **asked, strict=False)
    assert found.methods == ("cam", "random_map") and list(found.unsuited) == ["attention"] and not found.left_out
    with pytest.raises(ValueError, match="attention"):  # the only one
        evaluate(MODEL, **asked | {"methods": ["attention"]}, strict=False)
    assert "attention" in evaluate(MODEL, **asked | {"methods": "all"}).unsuited


def test_findings_are_values():
    found = evaluate(MODEL, batches(), ["cam"], ["energy_in_mask"], controls=["random_map"])
    first, *others = found.summary
    assert first.kind == "no better than majority" and first.values["accuracy"] == found.accuracy.value
    assert "cam" in {finding.values.get("method") for finding in others}


def test_a_budget_without_end_is_none():
    found = evaluate(MODEL, batches(), ["cam"], ["gini"], budget=float("inf"))
    assert found.left_out == {} and len(found.per_image["name"]) == 12


def test_a_metric_named_twice_is_one():
    found = evaluate(MODEL, batches(), ["cam"], ["gini", "energy_in_mask", "gini"])
    assert found.metrics == ("gini", "energy_in_mask")


def test_what_is_not_known_may_be_none():
    data = [batch | {"labels": None, "names": None, "groups": None, "masks": None} for batch in batches()]
    found = evaluate(MODEL, data, ["cam"], ["gini"])
    assert found.accuracy is None and found.per_image["name"][1] == "image 1" and found.unit == "images"
    data = [batch | {"masks": batch["masks"].numpy(), "labels": batch["labels"].numpy()} for batch in batches()]
    assert evaluate(MODEL, data, ["cam"], ["energy_in_mask"]).chance == {"energy_in_mask": 9 / 64}


def test_a_share_is_never_rounded_to_a_certainty():
    images = torch.zeros(3000, 3, 2, 2)
    images[:, 0] = 1
    labels = torch.zeros(3000, dtype=torch.long)
    labels[0] = 1
    found = evaluate(MODEL, [(images, labels)], ["cam"], ["gini"], limit=8)
    assert found.summary[0].startswith(
        "The model names the right class in >99.9 % of 3,000 images (95 % interval 99.8 to 100.0 %)"
    )


def test_a_group_column_of_any_name_has_a_place_in_the_table():
    one = np.array([0])
    answers = Predictions(("x", "y"), one, one, np.array([0.9]), np.array([[0.9, 0.1]]), ["1.png"], np.array(["p"]))
    assert answers.columns(one, "patient")["patient"] == ["p"]
    for taken in ("name", "label"):
        table = answers.columns(one, taken)
        assert table["group"] == ["p"] and table["name"] == ["1.png"] and table["label"] == ["x"]


def test_a_budget_is_planned_once(tmp_path, monkeypatch):
    seconds = iter([0.1, 0.2, 0.1])  # what is measured differs from run to run
    monkeypatch.setattr(planning, "seconds_per_image", lambda *given, **options: now)
    monkeypatch.setattr(planning, "_forward_seconds", lambda *given: 0.0)
    asked = {"metrics": ["gini"], "controls": [], "batch_size": 4, "partial_results": tmp_path / "parts"}
    now = next(seconds)
    with pytest.raises(KeyboardInterrupt):
        evaluate(MODEL, batches(80), ["cam"], **asked, budget=5.5, progress=stopping(40))
    kept = set((tmp_path / "parts").iterdir())
    now = next(seconds)
    with pytest.raises(KeyboardInterrupt):
        evaluate(MODEL, batches(80), ["cam"], **asked, budget=5.5, progress=stopping(40))
    assert set((tmp_path / "parts").iterdir()) == kept
    found = evaluate(MODEL, batches(80), ["cam"], **asked, budget=5.5)
    assert len(found.per_image["name"]) == 55 and not (tmp_path / "parts").exists()
    with pytest.raises(KeyboardInterrupt):
        evaluate(MODEL, batches(80), ["cam"], **asked, budget=5.5, progress=stopping(4))
    for change in ({"budget": 6.0}, {"seed": 1}, {"limit": 70}, {"steps": 3}):
        before = set((tmp_path / "parts").iterdir())
        with pytest.raises(KeyboardInterrupt):
            evaluate(MODEL, batches(80), ["cam"], **asked | {"budget": 5.5} | change, progress=stopping(4))
        assert len(set((tmp_path / "parts").iterdir()) - before) >= 1


def test_options_are_told_apart_to_the_last_number(tmp_path):
    long = torch.zeros(3, 40, 40)
    other = long.clone()
    other[1, 20, 20] = 1
    assert str(long) == str(other)
    assert key_of(MODEL, long) != key_of(MODEL, other)
    first, again, second = (lambda output, k=k: output[k] for k in ("a", "a", "b"))
    assert exact_text([first]) == exact_text([again]) != exact_text([second])


def test_a_damaged_part_is_made_again(tmp_path):
    asked = {"metrics": ["gini"], "controls": [], "batch_size": 4, "partial_results": tmp_path / "parts"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(MODEL, batches(), ["cam"], **asked, progress=stopping(4))
    (kept,) = (tmp_path / "parts").iterdir()
    whole = kept.read_bytes()
    directory = whole.rindex(b"PK\x01\x02")
    for at, bit in ((directory + 8, 1), (directory + 8, 32), (directory + 6, 127), (directory + 10, 7)):
        damaged = bytearray(whole)
        damaged[at] ^= bit
        kept.write_bytes(damaged)
        assert Scores.load(kept) is None
    with zipfile.ZipFile(kept, "w"):
        pass
    assert Scores.load(kept) is None


def test_two_evaluations_may_share_a_folder(tmp_path, monkeypatch):
    asked = {"metrics": ["gini"], "controls": [], "batch_size": 4, "partial_results": tmp_path / "parts"}
    replace = os.replace

    def late(source, target):  # another process that makes the same part was quicker, and took its file along
        replace(source, target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    found = evaluate(MODEL, batches(), ["cam"], **asked)
    assert len(found.per_image["name"]) == 12 and not (tmp_path / "parts").exists()
