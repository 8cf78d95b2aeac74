"""Random numbers that are a function of their place, and whole batches changed as torchvision changes one image."""

import numpy as np
import pytest
import torch
from scipy import stats
from tests.reference import augment as reference

from sightline.data.transforms import DRAWS, augment, draws
from sightline.recipe import Augment

FILL = (10, 120, 250)
MASK = 2**64 - 1


def splitmix(state: int) -> int:
    """One number of Steele, Lea and Flood's generator: the state moved on, then mixed."""
    z = state = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_generator_written_out_here_is_splitmix64():
    assert splitmix(1234567) == 6457827717110365317  # the first number that its authors' code gives for this seed


def test_draws_are_splitmix64_from_a_state_that_the_place_decides():
    golden = 0x9E3779B97F4A7C15
    key = int(np.random.SeedSequence((3, 4)).generate_state(1, np.uint64)[0])
    found = draws(3, 4, torch.tensor([0, 1, 49_999]), 3)
    for row, place in zip(found.tolist(), (0, 1, 49_999), strict=True):
        start = splitmix((key + (place - 1) * golden) & MASK)
        assert row == [(splitmix((start + k * golden) & MASK) >> 40) / 2**24 for k in range(3)]


def test_the_first_draws_are_the_same_in_every_version():
    assert (draws(0, 0, torch.tensor([0, 1]), 2) * 2**24).tolist() == [[7301422, 12035667], [12072724, 8541263]]
    assert (draws(2**32 - 1, 7, torch.tensor([123]), 2) * 2**24).tolist() == [[3934931, 739676]]


def test_draws_depend_on_their_place_alone():
    places = torch.arange(100)
    whole = draws(1, 2, places, DRAWS)
    assert whole.shape == (100, DRAWS) and whole.dtype == torch.float32
    assert torch.equal(draws(1, 2, places.flip(0), DRAWS), whole.flip(0))
    assert torch.equal(draws(1, 2, places[40:43], 5), whole[40:43, :5])
    assert draws(1, 2, places[:0], 5).shape == (0, 5)
    for other in (draws(2, 1, places, DRAWS), draws(1, 3, places, DRAWS), draws(0, 2, places, DRAWS)):
        assert not (other == whole).any()


def test_draws_are_uniform():
    found = draws(0, 0, torch.arange(50_000), DRAWS)
    assert found.min() >= 0 and found.max() < 1
    for column in found.T:
        counts = torch.histc(column, 100, 0, 1)
        assert 1e-4 < stats.chisquare(counts).pvalue < 1 - 1e-4


@pytest.mark.parametrize(
    ("seed", "epoch", "by"),
    [(5, 5, 1), (5, 5, 64), (5, 6, 0), (6, 5, 0), (6, 6, 1), (4, 6, -1), (5, 4, 1), (0, 0, 0)],
)
def test_draws_are_independent_of_neighbors_epochs_and_seeds(seed, epoch, by):
    places = torch.arange(1, 20_001)
    one, other = draws(5, 5, places, DRAWS), draws(seed, epoch, places + by, DRAWS)
    together = torch.corrcoef(torch.cat([one, other], 1).T) - torch.eye(2 * DRAWS)
    assert together.abs().max() < 4.5 / np.sqrt(20_000)
    fields = (one * 10).long() * 10 + (other * 10).long()
    across = (one[:, 1:] * 10).long() * 10 + (one[:, :-1] * 10).long()
    for column in torch.cat([fields, across], 1).T:
        assert 1e-5 < stats.chisquare(torch.bincount(column, minlength=100)).pvalue < 1 - 1e-5


def samples(n: int, height: int, width: int):
    """Smooth and noisy images, with masks and boxes of blocks of at least 2 x 2 pixels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 3, height, width), dtype=np.uint8)
    images[::2] = np.linspace(0, 255, width).astype(np.uint8)
    masks, boxes = np.zeros((n, 1, height, width), bool), []
    for i in range(n):
        corners = [rng.integers(0, (height - 2, width - 2)) for _ in range(i % 3)]
        for top, left in corners:
            masks[i, 0, top : top + 2, left : left + 2] = True
        boxes.append(torch.tensor([[x, y, x + 2, y + 2] for y, x in corners]).reshape(-1, 4).float())
    return torch.from_numpy(images), torch.from_numpy(masks), boxes


def both(what: Augment, n: int = 60, height: int = 24, width: int = 24):
    """Images, masks and boxes, changed all at once and one by one."""
    images, masks, boxes = samples(n, height, width)
    uniform = draws(0, 1, torch.arange(n), DRAWS)
    before = images.clone(), masks.clone(), [b.clone() for b in boxes]
    found = augment(images, masks, boxes, what, uniform, FILL)
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])
    assert all(torch.equal(a, b) for a, b in zip(boxes, before[2], strict=True))
    todo = zip(images, masks, boxes, uniform.tolist(), strict=True)
    one_by_one = [reference.augment(i, m, b, what, u, FILL) for i, m, b, u in todo]
    expected = [list(of_all) for of_all in zip(*one_by_one, strict=True)]
    return found, (torch.stack(expected[0]), torch.stack(expected[1]), expected[2])


EXACT = {
    "nothing": Augment(flip=False),
    "crop": Augment(crop=5, flip=False),
    "far": Augment(crop=8, flip=False),
    "flip": Augment(flip=True),
    "rotate": Augment(rotate=True, flip=False),
    "all": Augment(crop=5, flip=True, rotate=True),
    "cutout": Augment(cutout=9, flip=False),
    "even": Augment(cutout=8, crop=3, flip=True, rotate=True),
    "everything": Augment(cutout=100, flip=False),
}


@pytest.mark.parametrize("size", [(24, 24), (18, 30), (31, 9)], ids=str)
@pytest.mark.parametrize("what", EXACT.values(), ids=EXACT)
def test_whole_pixels_move_as_torchvision_moves_them(what, size):
    found, expected = both(what, 60, *size)
    assert found[0].dtype == torch.uint8 and torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for a, b in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(24, 24), (17, 40), (64, 64)], ids=str)
@pytest.mark.parametrize("scale", [0.05, 0.3, 0.8])
def test_a_resized_crop_is_that_of_torchvision_to_one_gray_level(scale, size):
    found, expected = both(Augment(scale=scale, flip=False), 60, *size)
    difference = (found[0].int() - expected[0].int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.2
    assert torch.equal(found[1], expected[1])
    for a, b in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_large_batch_is_resized_in_blocks():
    images = samples(5, 200, 200)[0]
    uniform = draws(0, 0, torch.arange(5), DRAWS)
    what = Augment(scale=0.4, flip=False)
    whole = augment(images, None, None, what, uniform, FILL)[0]
    for i in range(5):
        assert torch.equal(augment(images[i : i + 1], None, None, what, uniform[i : i + 1], FILL)[0][0], whole[i])


@pytest.mark.parametrize("color", [0.1, 0.5, 1.0])
def test_colors_change_as_torchvision_changes_them(color):
    found, expected = both(Augment(color=color, flip=False), 100)
    difference = (found[0].int() - expected[0].int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert torch.equal(found[1], expected[1]) and found[0].float().std() > 20


def test_everything_at_once():
    found, expected = both(Augment(crop=3, flip=True, scale=0.5, rotate=True, color=0.4, cutout=6))
    difference = (found[0].int() - expected[0].int()).abs()
    assert difference.float().mean() < 1  # a level of difference in the enlarged image grows with contrast
    assert torch.equal(found[1], expected[1])


def test_a_square_is_cut_out_anywhere_and_at_the_border_only_in_part():
    n = 4000
    images = torch.zeros(n, 3, 8, 10, dtype=torch.uint8)
    found = augment(images, None, None, Augment(cutout=3), draws(0, 0, torch.arange(n), DRAWS), FILL)[0]
    hole = (found == torch.tensor(FILL)[:, None, None]).all(1)
    assert torch.equal(hole, (found != 0).any(1))
    sizes = hole.flatten(1).sum(1)
    assert set(sizes.tolist()) == {4, 6, 9}
    # the center is each pixel equally often: 3 x 3 holes are those of the 6 x 8 pixels inside
    assert abs((sizes == 9).float().mean() - 48 / 80) < 0.03
    middle = hole[:, 1:-1, 1:-1].float().mean(0)
    assert (middle - 9 / 80).abs().max() < 0.03


def test_the_edges_of_the_draws():
    images, masks, boxes = samples(3, 12, 12)
    for value in (0.0, 1 - 2**-24):
        for what in (*EXACT.values(), Augment(scale=0.01, flip=True), Augment(color=1.0, flip=True)):
            uniform = torch.full((3, DRAWS), value)
            found = augment(images, masks, boxes, what, uniform, FILL)
            for i in range(3):
                image, mask, _ = reference.augment(images[i], masks[i], boxes[i], what, uniform[i].tolist(), FILL)
                assert (found[0][i].int() - image.int()).abs().max() <= 1 and torch.equal(found[1][i], mask)


def test_no_images():
    images, masks, _ = samples(3, 12, 12)
    what = Augment(crop=3, flip=True, scale=0.5, rotate=True, color=0.4, cutout=6)
    found = augment(images[:0], masks[:0], [], what, torch.zeros(0, DRAWS), FILL)
    assert found[0].shape == (0, 3, 12, 12) and found[1].shape == (0, 1, 12, 12) and found[2] == []
