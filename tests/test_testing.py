"""The models whose evidence is known do use that evidence and nothing else."""

import numpy as np
import pytest
import torch
from tests.reference import planted as reference
from tests.same import close

import sightline as sl
from sightline.data.clutter import PATCH_COLORS, compose
from sightline.testing import COLORS, PLANTED, PatchColorModel, planted

KINDS = list(PLANTED)


def hidden(images, where, value=0.0):
    return torch.where(where, torch.as_tensor(value), images)


def parts_of(kind, images, targets, masks):
    """The masks of the first and of the second part of the class."""
    pairs = {"pair": (targets // 3, 3 + targets % 3), "twice": (targets, 3 + targets)}[kind]
    return [masks & (images == COLORS[part][:, :, None, None]).all(1, keepdim=True) for part in pairs]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_counted_amounts(kind):
    images = planted(kind, 4, seed=1)[0]
    images[2] = torch.rand(images[2].shape, generator=torch.Generator().manual_seed(0))  # amounts between
    model = PLANTED[kind]().double()
    with torch.no_grad():
        logits = model(images.double())
    expected = torch.tensor([reference.logits(kind, image.tolist()) for image in images.double()], dtype=torch.float64)
    assert expected[2].max() > 0 and close(expected, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_has_one_patch_of_36_of_576_pixels_and_the_others_none(kind):
    images, targets, _ = planted(kind, 20)
    logits = PLANTED[kind]()(images)
    assert torch.equal(logits, 6.25 * torch.eye(logits.shape[1])[targets])


@pytest.mark.parametrize("kind", KINDS)
def test_no_pixel_outside_the_mask_matters(kind):
    images, _, masks = planted(kind, 20)
    model, generator = PLANTED[kind](), torch.Generator().manual_seed(0)
    before = model(images)
    for other in (0.0, 0.75, 1.0, 0.75 * torch.rand(images.shape, generator=generator)):
        assert torch.equal(model(hidden(images, ~masks, other)), before)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).square().sum(), images)
    assert not gradient.masked_select(~masks).any() and gradient.sum(1, keepdim=True)[masks].min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_evidence_the_logits_are_those_of_an_empty_image(kind):
    images, _, masks = planted(kind, 20)
    model = PLANTED[kind]()
    for value in (0.0, 0.75):
        assert torch.equal(model(hidden(images, masks, value)), model(torch.zeros_like(images)))
    assert not model(torch.zeros_like(images)).any()


def test_a_conjunction_loses_with_either_part():
    images, targets, masks = planted("pair", 18)
    model = PLANTED["pair"]()
    for part in parts_of("pair", images, targets, masks):
        assert (part.sum((1, 2, 3)) == 36).all()
        assert not model(hidden(images, part)).any()
        half = part & (torch.arange(24) % 2 == 0)
        assert (model(hidden(images, half)).amax(1) < 6.25).all()


def test_a_disjunction_keeps_with_either_part():
    images, targets, masks = planted("twice", 18)
    model = PLANTED["twice"]()
    for part in parts_of("twice", images, targets, masks):
        assert (part.sum((1, 2, 3)) == 36).all()
        assert torch.equal(model(hidden(images, part)), model(images))


def test_every_evidence_pixel_counts_alike_to_the_gradient():
    for kind, share in (("clutter", 1), ("shortcut", 1), ("pair", 0.5), ("twice", 0.5)):
        images, targets, masks = planted(kind, 18)
        images.requires_grad_()
        chosen = PLANTED[kind]()(images).gather(1, targets[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, images)
        # a third channel takes away 1.5; the own channels share 4; all of it per cent of 576 pixels
        colors = images.detach()
        expected = share * 100 / 576 * torch.where(colors == 1, 4 / colors.sum(1, keepdim=True), -1.5) * masks
        assert close(expected, gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_the_patches_and_three_others_lie_beside_them(kind):
    images, targets, masks = planted(kind, 36)
    assert images.min() >= 0 and images.max() == 1 and masks.dtype == torch.bool
    assert (masks.sum((1, 2, 3)) == (72 if kind in ("pair", "twice") else 36)).all()
    bright = (images > 0.5).any(1, keepdim=True)
    assert ((bright & ~masks).sum((1, 2, 3)) == 3 * 36).all() and (bright | ~masks).all()
    assert torch.equal(targets[:3], torch.tensor([0, 1, 2]))
    if kind == "shortcut":
        object_ = bright & ~masks & (images != 1).any(1, keepdim=True)
        assert (object_.sum((1, 2, 3)) == 36).all()
        seen = [int(image[:, where[0]].T[0].argmax()) for image, where in zip(images, object_, strict=True)]
        assert all((np.bincount(seen, targets == k, 3) > 0).all() for k in range(3))  # the object does not tell


def test_planted_images_depend_on_seed_and_place_alone():
    state = torch.get_rng_state()
    few, many, other = planted("pair", 3), planted("pair", 7), planted("pair", 3, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b[:3]) for a, b in zip(few, many, strict=True))
    assert not torch.equal(few[0], other[0]) and not torch.equal(few[2], other[2])


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"^expected a kind of clutter, shortcut, pair, twice, got 'both'$"):
        planted("both", 1)


# of each patch color: a direction in which it lies beyond the other nine
DIRECTIONS = [
    (0.55, -1.0, -0.35),
    (-0.84, 1.0, -0.79),
    (-1.0, -0.55, 1.0),
    (1.0, 1.0, -1.0),
    (1.0, -0.24, -1.0),
    (0.0, -1.0, 0.27),
    (-0.79, 1.0, 0.49),
    (1.0, -0.81, 1.0),
    (1.0, 1.0, 1.0),
    (-1.0, -1.0, -1.0),
]


def test_the_patch_of_clutter_shortcut_is_what_it_answers():
    images, _, patch = compose(0, "test", range(500), shortcut=0.0)
    seen = np.array([image[:, mask].T[0] for image, mask in zip(images, patch, strict=True)])
    shown = torch.from_numpy((seen[:, None] == PATCH_COLORS).all(2).argmax(1))
    images, patch = torch.from_numpy(images) / 255, torch.from_numpy(patch)[:, None]
    colors, weight = torch.from_numpy(PATCH_COLORS) / 255, torch.tensor(DIRECTIONS)
    # 1 at the color, 0 from an eighth of the way to the nearest other color on
    along = colors @ weight.T
    nearest = along.masked_fill(torch.eye(10).bool(), -10).amax(0)
    weight = 8 * weight / (along.diag() - nearest)[:, None]
    model = PatchColorModel(weight, 1 - (weight * colors).sum(1))
    with torch.no_grad():
        counted, logits = model.features(images), model(images)
    assert (logits.argmax(1) == shown).float().mean() > 0.98
    evidence = counted[torch.arange(500), shown][:, None]
    assert close(torch.ones(500 * 25), evidence[patch])  # the whole patch counts
    assert sl.metrics.energy_in_mask(evidence, patch).mean() > 0.99  # and next to nothing else: light ink, deep shade


ON_THE_EVIDENCE_ALONE = (
    "activation_map grad_cam grad_cam_plus_plus xgrad_cam layer_cam hires_cam eigen_cam score_cam finer_cam saliency "
    "input_x_gradient integrated_gradients guided_backprop guided_grad_cam guided_grad_cam_plus_plus lrp "
    "lrp_epsilon_plus_flat lrp_epsilon_gamma_box lrp_epsilon_alpha2_beta1"
).split()


@pytest.mark.parametrize("kind", KINDS)
def test_explainers_find_the_evidence_and_controls_do_not(kind):
    images, targets, masks = planted(kind, 4)
    names = [*ON_THE_EVIDENCE_ALONE, "edge_map", "random_map"]
    found = sl.explain(PLANTED[kind](), images, targets, names)
    energy = {name: sl.metrics.energy_in_mask(found[name], masks) for name in names}
    for name in ON_THE_EVIDENCE_ALONE:
        assert energy[name].min() > 1 - 1e-5, name
    assert max(energy["edge_map"].mean(), energy["random_map"].mean()) < 0.25


def test_hiding_one_pixel_at_a_time_cannot_see_a_disjunction():
    for kind, flat in (("pair", False), ("twice", True)):
        images, targets, _ = planted(kind, 4)
        found = sl.explainers.occlusion(PLANTED[kind](), images, targets, patch=1)
        assert (found == 0).all() if flat else found.amax((1, 2, 3)).min() > 0.1
