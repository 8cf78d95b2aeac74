"""What the score is, whatever a model returns: probabilities of any making, several tensors, class indices."""

from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tests.same import close
from torch import nn

from sightline import explainers, metrics
from sightline.evaluation import evaluate
from sightline.explainers import explain, fitting
from sightline.inference import ForwardCall, answers, forward_call, logits_of
from sightline.metrics import METRICS
from sightline.testing import ConstantModel, LinearModel

MASKS = partial(explainers.rise, masks=6, cells=3)
COVERED = partial(explainers.occlusion, patch=4, stride=4)


class Members(nn.Module):
    """Three small networks whose logits `end` makes one output of."""

    def __init__(self, end, sharpness=30.0, classes=4):
        super().__init__()
        self.end = end
        self.members = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)
            )
            for _ in range(3)
        )
        with torch.no_grad():
            for member in self.members:
                member[-1].weight *= sharpness

    def forward(self, x):
        return self.end(*[member(x) for member in self.members])


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def model_of(end, **options):
    torch.manual_seed(0)
    return Members(end, **options).eval()


WEIGHTS = torch.tensor([0.25, 0.25, 0.5])


def opaque(z):
    """A softmax that no operation tells."""
    powers = torch.pow(2.718281828459045, z - z.amax(1, keepdim=True))
    return powers / powers.sum(1, keepdim=True)


MIXTURES = {
    "sum / 3": lambda *z: sum(each.softmax(1) for each in z) / 3,
    "stack, mean": lambda *z: torch.stack([each.softmax(-1) for each in z]).mean(0),
    "stack at the end": lambda *z: torch.stack([each.softmax(1) for each in z], -1).mean(dim=-1),
    "softmax of a stack": lambda *z: torch.stack(z, 1).softmax(2).mean(1, keepdim=True).squeeze(1),
    "one batch, in chunks": lambda *z: sum(torch.cat(z).softmax(1).chunk(3)) / 3,
    "one batch, as a view": lambda *z: torch.cat(z).softmax(1).view(3, -1, 4).mean(0),
    "weights": lambda a, b, c: 0.3 * a.softmax(1) + b.softmax(1) * 0.2 + c.softmax(1) / 2,
    "weights in a tensor": lambda *z: (WEIGHTS[:, None, None] * torch.stack([e.softmax(1) for e in z])).sum(0),
    "a gate": lambda a, b, c: (g := a[:, :1].sigmoid()) * b.softmax(1) + (1 - g) * c.softmax(1),
    "einsum": lambda *z: torch.einsum("m,mbn->bn", WEIGHTS.to(z[0]), torch.stack([e.softmax(1) for e in z])),
    "lerp": lambda a, b, c: torch.lerp(a.softmax(1), b.softmax(1), 0.3),
    "in place": lambda a, b, c: a.softmax(1).clone().add_(b.softmax(1)).div_(2),
    "a selection, made to sum to 1": lambda a, b, c: (p := a.softmax(1)[:, :3]) / p.sum(1, keepdim=True),
    "with a floor": lambda a, b, c: 0.9 * a.softmax(1) + 0.1 / 4,
    "in a dict": lambda *z: {"loss": z[0].sum(), "prediction": sum(each.softmax(1) for each in z) / 3},
    "opaque": lambda a, b, c: opaque(a),
}


def tensor_of(output):
    return output["prediction"] if isinstance(output, dict) else output


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_probabilities_are_what_they_are(name, images):
    model = model_of(MIXTURES[name]).double()
    images = images.double()
    says = tensor_of(model(images)).detach()
    assert close(says.float(), answers(model, images)[1])
    found = explain(model, images, 1, ["saliency", COVERED, MASKS])
    assert any("read as probabilities" in notice and "output='logits'" in notice for notice in found.notices)
    assert torch.equal(found.logits, says.log()) or close(found.logits.exp(), says)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(tensor_of(model(leaf))[:, 1].log().sum(), leaf)
    assert close(gradient.abs().amax(1)[:, None], found["saliency"])
    own = explain(model, images, lambda output: tensor_of(output)[:, 1].log(), [COVERED, "saliency"])
    assert close(*(e[COVERED_NAME] for e in (own, found)))
    (rise,) = explain(model, images, lambda output: tensor_of(output)[:, 1], [MASKS]).maps.values()
    assert close(rise, found[RISE_NAME])
    targets = torch.tensor([1, 0, 2])
    whole = metrics.deletion_auc(model, images, targets, images[:, :1], steps=1, fill=0.0)
    empty = tensor_of(model(torch.zeros_like(images)))
    expected = (says + empty).gather(1, targets[:, None])[:, 0] / 2
    assert close(expected.detach(), whole)


COVERED_NAME = explainers.named(COVERED)[0]
RISE_NAME = explainers.named(MASKS)[0]


def test_the_figures_of_an_average_over_flips(images):
    """In the order of the issue of probabilities that went through softmax again: 0.831 had become 0.419."""
    p = torch.tensor([[0.023, 0.831, 0.139, 0.007]])
    model = ConstantModel(torch.zeros(4))
    model.forward = lambda x: (p.expand(len(x), -1) + p.expand(len(x), -1)) / 2 + 0 * x.flatten(1).sum(1, keepdim=True)
    assert answers(model, images[:1])[1][0, 1].item() == pytest.approx(0.831, abs=1e-6)


LABELS = {
    "one class of four": lambda a, b, c: a.softmax(1)[:, 2],
    "one class, kept": lambda a, b, c: a.softmax(1)[:, 2:3],
    "two of four classes": lambda a, b, c: a.softmax(1)[:, :2],
    "mean of sigmoids": lambda *z: sum(each.sigmoid() for each in z) / 3,
    "mean of single sigmoids": lambda *z: torch.stack([each[:, 0].sigmoid() for each in z]).mean(0),
    "largest of several sigmoids": lambda *z: (
        torch.stack([each[:, 0].sigmoid() for each in z]).mean(0).maximum(z[0][:, 1].sigmoid())
    ),
    "any of several sigmoids": lambda *z: 1 - torch.stack([1 - each[:, 0].sigmoid() for each in z]).prod(0),
    "what lacks to 1": lambda a, b, c: 1 - a.softmax(1)[:, 0],
}


@pytest.mark.parametrize("name", LABELS)
def test_probabilities_of_single_labels_keep_their_values(name, images):
    model, images = model_of(LABELS[name]).double(), images.double()
    says = model(images).detach().reshape(3, -1)
    shares = answers(model, images)[1]
    assert close(says.float(), shares[:, 1:] if says.shape[1] == 1 else shares)
    found = explain(model, images, 1, ["saliency"])
    assert any("log-odds" in notice for notice in found.notices)
    leaf = images.clone().requires_grad_()
    odds = model(leaf).reshape(3, -1)[:, -1 if says.shape[1] == 1 else 1].logit()
    assert close(torch.autograd.grad(odds.sum(), leaf)[0].abs().amax(1)[:, None], found["saliency"])


def test_both_classes_of_one_sigmoid_are_its_logit_and_the_opposite(images):
    for join in (lambda p: torch.cat([1 - p, p], 1), lambda p: torch.stack([1 - p[:, 0], p[:, 0]], 1)):
        model = model_of(lambda a, b, c, join=join: join(a[:, :1].sigmoid())).double()
        plain = model_of(lambda a, b, c: a[:, :1]).double()
        for target in (0, 1):
            one, other = (explain(m, images.double(), target, ["saliency", COVERED]) for m in (model, plain))
            assert all(close(other[name], one[name]) for name in one.maps) and not one.notices
        assert close(model(images.double()).detach().float(), answers(model, images.double())[1])


def test_the_largest_of_several_sigmoids_has_the_logit_of_that_one(images):
    model, plain = (model_of(lambda *z, f=f: f(torch.stack(z, 2)[:, :2]).amax(2)) for f in (torch.sigmoid, torch.clone))
    found, expected = (explain(m, images, 1, ["saliency"]) for m in (model, plain))
    assert torch.equal(expected.logits, found.logits) and not found.notices
    assert close(model(images).detach(), found.probabilities)


def test_a_certain_mixture_still_has_maps(images):
    """In float32 the class's probability is 1: what the operations say of the others is kept."""
    for name in ("sum / 3", "stack, mean", "weights in a tensor"):
        mixture = MIXTURES[name]

        def end(a, b, c, mixture=mixture):
            return mixture(a, a + b / 100, a + c / 100)

        model, exact = (model_of(end, sharpness=600.0).to(dtype) for dtype in (torch.float32, torch.float64))
        certain = (model(images) == 1).any(1)
        assert certain.any()
        found, expected = (explain(m, images.to(m.members[0][0].weight), None, ["saliency"]) for m in (model, exact))
        for one, other, said in zip(found["saliency"], expected["saliency"], found.verdicts["saliency"], strict=True):
            assert float((one - other).abs().max() / other.abs().max()) < 1e-2 and other.max() > 0
            assert said == []


def test_an_impossible_class_has_a_finite_score():
    p = torch.tensor([[0.0, 0.25, 0.75]])

    class Never(nn.Module):
        def forward(self, x):
            return p.expand(len(x), -1) * (1 + 0 * x.flatten(1).sum(1, keepdim=True))

    found = explain(Never(), torch.ones(2, 3, 4, 4), 0, ["saliency"])
    assert found.logits.isfinite().all() and found["saliency"].isfinite().all()
    assert close(found.logits.softmax(1), p.expand(2, -1))


# --- what the values alone do not say -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [[0.2, 0.3], [0.5, 0.6], [1.5, -0.5], [0.0, 0.0], [0.25, 0.7499], [0.5, 0.2, 0.2], [1.0, 0.0]]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_stay_logits(row, batch):
    logits = torch.tensor(row)
    images = torch.ones(batch, 3, 4, 4)
    assert close(logits.softmax(0).expand(batch, -1), answers(ConstantModel(logits), images)[1])
    notices = explain(ConstantModel(logits), images, 0, ["saliency"]).notices
    doubt = ("All outputs are 0 or 1 and were read as logits; if they are probabilities, pass output='probabilities'",)
    assert notices == (doubt if row == [1.0, 0.0] else ())


def test_one_image_whose_rows_do_not_sum_to_1_speaks_for_all():
    rows = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.1, 0.8]])

    class Rows(nn.Module):
        def forward(self, x):
            return rows[x[:, 0, 0, 0].long()]

    images = torch.arange(3.0)[:, None, None, None].expand(-1, 3, 2, 2).clone()
    assert close(rows.softmax(1), answers(Rows(), images)[1])
    assert close(rows[:2], answers(Rows(), images[:2])[1])


def test_what_was_decided_for_the_images_holds_for_all_that_is_made_of_them():
    """Logits that are a distribution where the image is empty: an area between two softmaxes."""
    model = LinearModel(torch.ones(2, 1, 2, 2))
    model.forward = lambda x: torch.einsum("bchw,nchw->bn", x, model.weight) + torch.tensor([0.25, 0.75])
    image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    area = metrics.deletion_auc(model, image, torch.tensor([1]), image, steps=2)
    assert close(torch.tensor([0.25, 0.75]).softmax(0)[1:], area)  # both logits rise alike
    # and the other way round: probabilities of the image, and of the changed ones whatever sums to 1
    found = explain(model, 0 * image, 1, [COVERED_OF_TWO])
    assert found.notices and close(found.logits, torch.tensor([[0.25, 0.75]]).log())


COVERED_OF_TWO = partial(explainers.occlusion, patch=1, stride=1)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_the_user_decides(kind, images):
    model = model_of(MIXTURES["opaque"])
    says = model(images).detach()
    found = explain(model, images, None, ["saliency"], output=kind)
    assert found.notices == () and close(says if kind == "logits" else says.log(), found.logits)
    expected = says.softmax(1) if kind == "logits" else says
    assert close(expected, answers(model, images, call=forward_call(images, kind))[1])
    targets = torch.tensor([0, 1, 2])
    area = metrics.insertion_auc(model, images, targets, images[:, :1], steps=1, fill=0.0, output=kind)
    empty = model(torch.zeros_like(images)).detach()
    empty = empty.softmax(1) if kind == "logits" else empty
    assert close((expected + empty).gather(1, targets[:, None])[:, 0] / 2, area)


def test_the_user_decides_against_a_softmax_that_was_seen(images):
    model = model_of(lambda a, b, c: a.softmax(1))
    assert torch.equal(model(images), explain(model, images, 0, ["saliency"], output="logits").logits)


@pytest.mark.parametrize("columns", [1, 3])
def test_probabilities_of_labels_need_to_be_said_where_no_operation_does(columns, images):
    model = model_of(lambda a, b, c: 1 / (1 + (-a[:, :columns]).exp()), sharpness=1.0)
    says = model(images).detach()
    shares = answers(model, images, call=forward_call(images, "probabilities"))[1]
    assert close(says, shares[:, 1:] if columns == 1 else shares)
    assert close(says.logit(), forward_call(images, "probabilities")(model, images).logits.detach())
    with pytest.raises(ValueError, match=r"expected probabilities from 0 to 1, got -.*; pass output='logits'"):
        explain(model_of(lambda a, b, c: a), images, output="probabilities")


# --- which tensor ---------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "embedding prediction")
SEVERAL = {
    "a tuple": (lambda e, z: (e, z), 1, "0 (3, 6), 1 (3, 4); choose one, as output=1 does"),
    "a dict": (
        lambda e, z: {"embedding": e, "prediction": z},
        "prediction",
        "embedding (3, 6), prediction (3, 4); choose",
    ),
    "nested": (lambda e, z: {"out": [e, {"y": z}]}, "out.1.y", "out.0 (3, 6), out.1.y (3, 4); choose"),
    "a named tuple": (Pair, "prediction", "embedding (3, 6), prediction (3, 4); choose"),
    "an object": (lambda e, z: SimpleNamespace(embedding=e, head=SimpleNamespace(y=z)), "head.y", None),
    "two heads": (lambda e, z: (z, -z), 0, "0 (3, 4), 1 (3, 4); choose"),
    "a function": (lambda e, z: (e, z), lambda output: output[1], None),
    "both": (lambda e, z: {"embedding": e, "probabilities": z.softmax(1)}, "probabilities", None),
    "both, elsewhere": (lambda e, z: {"embedding": e, "y": opaque(z)}, ("y", "probabilities"), None),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_tensors_one_is_picked(name, images):
    end, output, error = SEVERAL[name]
    plain, model = model_of(lambda a, b, c: a), model_of(lambda a, b, c: end(torch.cat([b, c], 1)[:, :6], a))
    expected = explain(plain, images, None, ["saliency", "members.0.1"][:1])
    if error is not None:
        for call in (explain, answers):
            with pytest.raises(ValueError, match="expected one tensor of logits from the model, got ") as raised:
                call(model, images)
            assert error in str(raised.value)
    found = explain(model, images, None, ["saliency"], output=output)
    assert torch.equal(found.targets, expected.targets)
    targets, maps = expected.targets[:, 0], expected["saliency"]
    if "both" not in name:
        assert close(expected.logits, found.logits) and close(expected["saliency"], found["saliency"])
    areas = (
        metrics.deletion_auc(m, images, targets, maps, steps=3, **o)
        for m, o in ((plain, {}), (model, {"output": output}))
    )
    assert close(*areas)
    assert fitting(model, images, ["grad_cam"], output=output)[0] == ["grad_cam"]


@pytest.mark.usefixtures("unchecked")
def test_what_is_not_there_is_said(images):
    model = model_of(lambda a, b, c: {"embedding": b, "prediction": a})
    for output in ("predictions", "prediction.y", 7):
        with pytest.raises(
            ValueError, match=r"expected output= that the model returns, got .*prediction \(3, 4\); choose"
        ):
            explain(model, images, output=output)
    with pytest.raises(ValueError, match=r"got 'data' and a tensor of shape \(3, 4\); choose"):
        explain(model_of(lambda a, b, c: a), images, output="data")
    for output in (1.5, True, ("prediction", "odds"), ("a", "b", "c")):
        with pytest.raises(TypeError, match="expected output= a key, an index, an attribute or a function"):
            explain(model, images, output=output)


def test_what_needs_no_choice():
    z, e = torch.zeros(2, 4), torch.ones(2, 8)
    assert logits_of({"embedding": e, "logits": z}) is z
    assert logits_of(SimpleNamespace(embedding=e, logits=z)) is z
    assert logits_of((z, torch.zeros(2), torch.ones(2, 3, 4, 4), torch.zeros(2, 4).long())) is z
    assert logits_of([z, torch.ones(9, 8)], batch=2) is z  # prototypes, a table
    assert logits_of((z, {"again": z})) is z
    assert logits_of({"logit": torch.zeros(2), "loss": torch.tensor(0.0)}).shape == (2, 1)


def test_auxiliary_heads_do_not_stand_in_the_way():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.googlenet(num_classes=5, init_weights=False, aux_logits=True)
    images = torch.randn(2, 3, 64, 64)
    assert logits_of(model(images)).shape == (2, 5)  # in training it returns three
    found = explain(model, images, 0, ["activation_map"])
    with torch.no_grad():
        assert torch.equal(found.logits, model.eval()(images))


# --- class indices --------------------------------------------------------------------------------------------------


def test_a_class_index_is_no_logit(images):
    labels = model_of(lambda a, b, c: a.argmax(1))
    for call in (explain, answers, lambda *a: metrics.deletion_auc(*a, torch.tensor([1, 1, 1]), images[:, :1])):
        with pytest.raises(ValueError, match=r"got torch.int64 of shape \(\d+,\), which look like class indices"):
            call(labels, images)
    asked = 1
    found = explain(labels, images, lambda output: (output == asked).float(), [MASKS])
    expected = explain(model_of(lambda a, b, c: a), images, lambda z: (z.argmax(1) == asked).float(), [MASKS])
    assert torch.equal(found[RISE_NAME], expected[RISE_NAME])


def again(model, images, targets):
    return explain(model, images, targets)["grad_cam"]


ASKED = [
    "fooling_rate",
    *(name for name, m in METRICS.items() if "targets" in metrics.inputs_of(m) or hasattr(m.function, "needs")),
]


@pytest.mark.parametrize("name", ASKED)
def test_a_class_that_does_not_exist_is_said_the_same_everywhere(name, images):
    model = model_of(lambda a, b, c: a)
    function = metrics.fooling_rate if name == "fooling_rate" else METRICS[name].function
    wants = {} if name == "fooling_rate" else metrics.inputs_of(METRICS[name])
    given = {"explain": again} if "explain" in wants else {} if name == "fooling_rate" else {"maps": images[:, :1]}
    for classes, said in ((torch.tensor([0, 1, 7]), "0..7"), (torch.tensor([-2, 1, 3]), "-2..3")):
        with pytest.raises(
            ValueError, match=r"expected targets in 0\.\.3, got .*; the model has 4 classes, counted"
        ) as raised:
            function(model, images, classes, **given)
        assert f"got {said};" in str(raised.value)
    with pytest.raises(ValueError, match=r"expected targets in 0\.\.3, got 0\.\.7; the model has 4 classes, counted"):
        explain(model, images, torch.tensor([0, 1, 7]))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "name", ["fooling_rate", "deletion_auc", "random_logit", "completeness", "parameter_randomization"]
)
def test_targets_of_another_type_or_shape(name, images):
    model = model_of(lambda a, b, c: a)
    given = {"explain": again} if name in ("random_logit", "parameter_randomization") else {"maps": images[:, :1]}
    function = partial(getattr(metrics, name), model, images, **({} if name == "fooling_rate" else given))
    with pytest.raises(TypeError, match=r"expected targets .*an integer tensor.*got a torch.float32 tensor"):
        function(torch.tensor([0.0, 1.0, 2.0]))
    for wrong in (torch.tensor([0, 1]), torch.zeros(3, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"expected 3 targets, one per image, got shape \("):
            function(wrong)


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_decides_once_and_says_it(images):
    model = model_of(MIXTURES["stack, mean"])
    data = [(images, torch.tensor([0, 1, 2])), (images.flip(3), torch.tensor([0, 1, 2]))]
    asked = ["grad_cam"], ["deletion_auc", "completeness"]
    found = evaluate(model, data, *asked, controls=["center_map"], steps=3, examples=2)
    says = torch.cat([model(batch).detach() for batch, _ in data])
    assert found.per_image["probability"] == pytest.approx(says.amax(1).tolist(), abs=1e-6)
    (notice,) = (each for each in found.notices if "probabilities" in each)
    assert "log-probability" in notice
    told = evaluate(model, data, *asked, controls=["center_map"], steps=3, examples=2, output="probabilities")
    assert set(told.notices) == set(found.notices) - {notice} and told.per_image == found.per_image
    other = evaluate(model, data, *asked, controls=["center_map"], steps=3, examples=2, output="logits")
    assert other.per_image["probability"] == pytest.approx(says.softmax(1).amax(1).tolist(), abs=1e-6)


def test_a_later_batch_does_not_change_the_reading():
    """Logits, of which those of the second batch lie in [0, 1] and sum to 1."""
    weight = torch.zeros(2, 1, 2, 2)
    weight[0, 0, 0], weight[1, 0, 1] = 1.0, 1.0
    model = LinearModel(weight)
    first, second = torch.full((2, 1, 2, 2), 2.0), torch.full((2, 1, 2, 2), 0.25)
    second[:, :, 0] *= 0.5
    second[:, :, 1] *= 1.5
    data = [(batch, torch.tensor([0, 1])) for batch in (first, second)]
    found = evaluate(model, data, ["saliency"], ["deletion_auc"], controls=["center_map"], steps=2, examples=2)
    expected = torch.cat([model(batch) for batch, _ in data]).softmax(1).amax(1)
    assert found.notices == () and found.per_image["probability"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_call_is_a_value(images):
    model = model_of(MIXTURES["sum / 3"])
    call, notice = ForwardCall().settled(model, images)
    assert notice and call.output == (None, "softmax")
    assert forward_call(images, call.output)(model, images).notice == ""


def test_labels_of_several_classes_are_no_class_indices(images):
    model = ConstantModel(torch.zeros(4))
    with pytest.raises(ValueError, match=r"zeros and ones for all 4 classes, .* torch\.arange\(4\)\.expand\(3, -1\)"):
        explain(model, images, torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1]]), ["saliency"])
    for targets in (torch.arange(4).expand(3, -1), torch.tensor([[0, 1]] * 3), torch.tensor([[0, 0, 0, 0]] * 3)):
        assert explain(model, images, targets, ["random_map"]).targets.equal(targets)


def test_images_with_channels_last_are_told_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(RuntimeError, match=r"got 2 x 8 x 8 x 3, .*; move the channels: images\.movedim\(-1, 1\)$"):
        explain(model, torch.rand(2, 8, 8, 3))
    with pytest.raises(RuntimeError, match=r"got 2 channels instead$"):
        explain(model, torch.rand(2, 2, 8, 8))


@pytest.mark.parametrize(
    "targets, hint",
    [
        (["grad_cam"], r"pass class indices, and methods as methods=\['grad_cam'\]"),
        ([0, 1, 2], r"pass torch\.tensor\(\[0, 1, 2\]\)"),
        ([lambda output: output[0]] * 3, "pass one function for the whole batch"),
        ("cat", "pass class indices"),
    ],
    ids=["methods", "indices", "functions", "name"],
)
def test_targets_of_another_type_say_what_to_pass(targets, hint, images, unchecked):
    with pytest.raises(TypeError, match=f"{hint}$"):
        explain(ConstantModel(torch.zeros(4)), images, targets)


def test_a_function_that_detaches_is_named(images):
    with pytest.raises(ValueError, match=r"switch gradients off and the function in targets= does not detach$"):
        explain(model_of(lambda a, b, c: a), images, lambda logits: logits.detach()[:, 0], ["saliency"])
