"""Scores against masks: planted maps, slow reference, other libraries, edges."""

import numpy as np
import pytest
import torch
from scipy.stats import pointbiserialr
from sklearn.metrics import roc_auc_score
from tests.hand import quarter
from tests.reference import localization as reference
from tests.reference.maps import linear_at
from tests.same import close
from torchmetrics.functional.classification import binary_auroc, binary_jaccard_index

from sightline import maps as pixels
from sightline.metrics.localization import (
    EnergyInMask,
    IoU,
    MaskAUC,
    MaxBoxAccuracy,
    PointBiserial,
    PointingGame,
    RelevanceRank,
    energy_in_mask,
    iou,
    mask_auc,
    max_box_accuracy,
    point_biserial,
    pointing_game,
    relevance_rank,
)
from sightline.metrics.per_image import PerImageMean

SCORES = [pointing_game, energy_in_mask, relevance_rank, iou, max_box_accuracy, mask_auc, point_biserial]
CLASSES = [PointingGame, EnergyInMask, RelevanceRank, IoU, MaxBoxAccuracy, MaskAUC, PointBiserial]


def random_case(dtype=torch.float64, n=6, size=(5, 7)):
    """Maps of both signs and masks of a third; every other map has five levels, so that there are ties."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(n, 1, *size, generator=generator, dtype=torch.float64)
    maps[::2] = torch.randint(0, 5, maps[::2].shape, generator=generator).double()
    masks = torch.rand(maps.shape, generator=generator) < 0.3
    return maps.to(dtype), masks


def flat_lists(maps, masks):
    return zip(maps.flatten(1).tolist(), masks.flatten(1).tolist(), strict=True)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (pointing_game, [1, 0, 0.5]),
        (energy_in_mask, [1, 0, 0.5]),
        (relevance_rank, [1, 0, 0.5]),
        (iou, [1, 0, 0.5]),
        (mask_auc, [1, 1 / 3, 5 / 6]),
        (point_biserial, [1, -1 / 3, 3**-0.5]),
    ],
)
def test_planted_maps(score, expected):
    maps, masks = quarter()
    assert close(score(maps, masks), torch.tensor(expected, dtype=torch.float32))
    assert close(score(maps, masks.float()), score(maps, masks)), "masks of 0 and 1"


def test_boxes_of_planted_maps():
    # threshold 0 boxes the whole image, a quarter of which is the object
    maps, masks = quarter()
    found = max_box_accuracy(maps, masks)
    assert found.shape == (3, 20)
    assert found[:, 0].tolist() == [0, 0, 0] and max_box_accuracy(maps, masks, iou=0.25)[:, 0].tolist() == [1, 1, 1]
    assert found[:, 1:].unique(dim=1).tolist() == [[1], [0], [1]]
    assert max_box_accuracy(maps, masks, iou=0.51)[2].tolist() == [0] * 20
    corner, opposite = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    corner[..., 0, 0], opposite[..., 7, 7] = 1, True
    assert not max_box_accuracy(corner, opposite, iou=0.1).any()


def test_the_best_threshold_is_that_of_the_data_set():
    # the first map fits up to 0.4, the second from 0.5 on: each has its threshold, together they have none
    masks = torch.tensor([True, True, True, False, False, False, False, False]).expand(2, 1, 1, 8)
    maps = torch.tensor([[9, 4, 4, 0, 0, 0, 0, 0], [9, 9, 9, 4, 4, 4, 4, 0]]).reshape(2, 1, 1, 8).float()
    hits = max_box_accuracy(maps, masks)
    assert hits.amax(1).tolist() == [1, 1]
    metric = MaxBoxAccuracy()
    for i in range(2):
        assert metric(maps[i : i + 1], masks[i : i + 1]) == 1
    assert metric.compute() == hits.double().mean(0).amax() == 0.5
    metric.update(maps=torch.full_like(maps, torch.nan), masks=masks)
    assert metric.compute() == 0.5 and metric.MaxBoxAccuracy_undefined.tolist() == [2] * 20
    metric.reset()
    metric.update(maps=torch.full_like(maps, torch.nan), masks=masks)
    assert metric.compute().isnan()


def test_of_rows_the_best_column_counts():
    class Best(PerImageMean):
        function = staticmethod(lambda maps: maps)
        higher_is_better = True

    class Least(Best):
        higher_is_better = False

    rows = torch.tensor([[1.0, 0.0, 4.0], [2.0, 5.0, torch.nan], [3.0, 1.0, 1.0]])
    for metric, expected in ((Best(), 2.5), (Least(), 2.0)):
        for part in rows.split(2):
            metric.update(part)
        assert metric.compute() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("score", "slow"),
    [
        (iou, lambda values, mask: reference.jaccard(values, mask, 0.15)),
        (mask_auc, reference.auc),
        (point_biserial, reference.point_biserial),
    ],
)
def test_scores_equal_the_reference(score, slow, dtype):
    maps, masks = random_case(dtype)
    expected = [slow(values, mask) for values, mask in flat_lists(maps, masks)]
    assert close(score(maps, masks), torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("tolerance", [0, 1, 2, 5])
def test_the_circle_of_the_pointing_game(tolerance):
    maps, masks = random_case()
    masks &= torch.rand(masks.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    expected = [
        reference.pointing(rows, mask, tolerance)
        for rows, mask in zip(maps[:, 0].tolist(), masks[:, 0].tolist(), strict=True)
    ]
    assert close(pointing_game(maps, masks, tolerance=tolerance), torch.tensor(expected, dtype=torch.float64))


def test_the_tolerance_is_a_circle_that_may_touch():
    spot, mask = torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    spot[..., 20, 20] = 1
    for y, x, hit in [(20, 5, 1), (11, 8, 1), (8, 11, 1), (10, 8, 0), (20, 4, 0), (32, 30, 0), (29, 32, 1)]:
        mask.zero_()[..., y, x] = True
        assert pointing_game(spot, mask, tolerance=15).item() == hit, (y, x)


def test_relevance_rank_is_the_mean_over_all_orders_of_tied_pixels():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(-2, 2, (8, 1, 1, 7), generator=generator).double()
    masks = torch.rand(maps.shape, generator=generator) < 0.5
    masks[:, ..., 3] = True
    expected = [reference.rank(values, mask) for values, mask in flat_lists(maps, masks)]
    assert close(relevance_rank(maps, masks), torch.tensor(expected, dtype=torch.float64))
    assert len(set(expected)) > 4


@pytest.mark.parametrize("least", [0.3, 0.5, 0.7])
def test_box_hits_equal_the_reference(least):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(12, 1, 8, 9, generator=generator)
    masks = torch.zeros(noise.shape, dtype=torch.bool)
    masks[:, :, 2:6, 3:8] = True
    masks[0, 0, 2, 3], masks[1, 0, 7, 0] = False, True  # the box goes around what is left, and around both parts
    maps = (noise + masks * torch.linspace(0, 1.5, 12)[:, None, None, None] - 1).double()
    expected = [
        reference.box_hits(rows, mask, least)
        for rows, mask in zip(maps[:, 0].tolist(), masks[:, 0].tolist(), strict=True)
    ]
    found = max_box_accuracy(maps, masks, iou=least)
    assert found.tolist() == expected
    assert 0.1 < found.mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_libraries_agree(dtype):
    maps, masks = random_case(dtype)
    areas, correlations, overlaps = mask_auc(maps, masks), point_biserial(maps, masks), iou(maps, masks, threshold=0.25)
    for i, (values, mask) in enumerate(zip(maps.flatten(1), masks.flatten(1), strict=True)):
        known = roc_auc_score(mask.numpy(), values.numpy()), pointbiserialr(mask.numpy(), values.double().numpy())[0]
        assert close(areas[i], torch.tensor(known[0], dtype=dtype))
        assert close(correlations[i], torch.tensor(known[1], dtype=dtype))
        # torchmetrics takes the sigmoid of values outside [0, 1], which merges none of these, and counts in float32
        assert areas[i].item() == pytest.approx(binary_auroc(values, mask.long()).item(), abs=1e-6)
        marked = (values >= 0.25 * values.max()).long()
        assert overlaps[i].item() == pytest.approx(binary_jaccard_index(marked, mask.long()).item(), abs=1e-6)


def test_identities():
    maps, masks = random_case()
    assert close(mask_auc(-maps, masks), 1 - mask_auc(maps, masks))
    assert close(mask_auc(maps, ~masks), 1 - mask_auc(maps, masks))
    assert close(point_biserial(3 - 2 * maps, masks), -point_biserial(maps, masks))
    for score in (mask_auc, relevance_rank, pointing_game):
        assert close(score(maps.exp(), masks), score(maps, masks)), "only the order counts"
    for score in (energy_in_mask, iou):
        assert close(score(maps.clamp(min=0), masks), score(maps, masks)), "negative values count as 0"
    assert close(max_box_accuracy(2 * maps - 7, masks), max_box_accuracy(maps, masks)), "scaled from 0 to 1"
    for score in SCORES:
        oracle = score(masks.double(), masks)
        assert (oracle.amax(1) if oracle.ndim == 2 else oracle).tolist() == pytest.approx([1] * 6)


@pytest.mark.parametrize("value", [-2.0, 0.0, 0.1])
@pytest.mark.parametrize("size", [(4, 4), (3, 7), (30, 50)])
def test_flat_maps_of_any_size_score_chance(value, size):
    # 0.1 resized by rounded weights is no longer flat
    masks = quarter()[1][:1]
    flat = torch.full((1, 1, *size), value)
    assert pointing_game(flat, masks).item() == relevance_rank(flat, masks).item() == 0.25
    assert mask_auc(flat, masks).item() == 0.5
    assert point_biserial(flat, masks).isnan().all()
    assert max_box_accuracy(flat, masks).tolist() == [[0] * 20]
    assert max_box_accuracy(flat, masks, iou=0.25).tolist() == [[1] * 20]
    for score in (energy_in_mask, iou):
        assert score(flat, masks).item() == 0.25 if value > 0 else score(flat, masks).isnan().all()


@pytest.mark.parametrize("score", SCORES)
def test_undefined_is_nan_and_leaves_the_neighbors_alone(score):
    maps, masks = random_case(torch.float32)
    before = score(maps, masks)
    maps[0, 0, 4, 4], maps[1, 0, 0, 0], maps[2, 0, 2, 2] = torch.nan, torch.inf, -torch.inf
    masks[3] = False
    found = score(maps, masks)
    assert found[:4].isnan().all() and close(found[4:], before[4:])


def test_full_masks_and_one_pixel():
    maps, masks = quarter()
    full = torch.ones_like(masks)
    for score in (pointing_game, energy_in_mask, relevance_rank):
        assert score(maps, full).tolist() == [1, 1, 1]
    assert iou(maps, full).tolist() == [0.25, 0.25, 0.5]
    assert max_box_accuracy(maps, full)[:, :2].tolist() == [[1, 0], [1, 0], [1, 1]]
    for score in (mask_auc, point_biserial):
        assert score(maps, full).isnan().all()
    one, pixel = torch.full((1, 1, 1, 1), 2.0), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    found = [float(score(one, pixel).mean()) for score in SCORES]
    assert found[:5] == [1] * 5 and np.isnan(found[5:]).all()


@pytest.mark.parametrize("score", SCORES)
def test_batches_order_and_precision_change_nothing(score):
    maps, masks = random_case(torch.float32)
    whole = score(maps, masks)
    assert whole.dtype == torch.float32 and score(maps.double(), masks).dtype == torch.float64
    alone = [score(one[None], mask[None]) for one, mask in zip(maps, masks, strict=True)]
    assert close(torch.cat(alone), whole)
    assert close(score(maps.flip(0), masks.flip(0)).flip(0), whole)
    for half in (torch.float16, torch.bfloat16):
        assert close(score(maps.to(half), masks), score(maps.to(half).float(), masks))


@pytest.mark.parametrize("score", SCORES)
def test_maps_are_resized_to_the_mask(score):
    small = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = torch.rand(2, 1, 8, 11, generator=torch.Generator().manual_seed(1)) < 0.3

    def enlarged(rows):
        wide = [linear_at(row, 11) for row in rows]
        return [list(row) for row in zip(*(linear_at(column, 8) for column in zip(*wide, strict=True)), strict=True)]

    large = torch.tensor([[enlarged(image[0].tolist())] for image in small], dtype=torch.float64)
    assert close(score(small, masks), score(large, masks))


@pytest.mark.parametrize(("metric", "score"), list(zip(CLASSES, SCORES, strict=True)))
def test_classes_stream(metric, score):
    maps, masks = random_case()
    found = metric()
    assert found.higher_is_better and found.meaning
    for i, j in ((0, 1), (1, 6)):
        found.update(maps=maps[i:j], masks=masks[i:j], images=None)
    assert close(found.compute(), score(maps, masks).mean(0).amax())


def test_box_around():
    inside = torch.zeros(2, 2, 3, 5, dtype=torch.bool)
    inside[0, 0, 1, 1] = inside[0, 0, 2, 3] = inside[1, 1, 0, 4] = True
    assert pixels.box_around(inside).tolist() == [[[1, 1, 4, 3], [0, 0, 0, 0]], [[0, 0, 0, 0], [4, 0, 5, 1]]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda maps, masks: pointing_game(maps, masks, tolerance=-1), "expected a tolerance of at least 0 pixels"),
        (lambda maps, masks: iou(maps, masks, threshold=15), "expected a threshold from 0 to 1, got 15"),
        (lambda maps, masks: max_box_accuracy(maps, masks, iou=0), "expected an iou above 0 and up to 1, got 0"),
        (lambda maps, masks: mask_auc(maps[:2], masks), r"got \(2, 1, 4, 4\) and \(3, 1, 4, 4\); score one target"),
        (lambda maps, masks: point_biserial(maps, masks * 255), "expected masks that are bool or 0 and 1, got .* 255"),
    ],
)
def test_bad_inputs_say_what_to_do(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call(*quarter())


def test_more_thresholds_hold_the_fewer_and_find_a_better_best_one():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(12, 1, 5, 5, generator=generator)
    masks = torch.zeros(12, 1, 40, 40, dtype=torch.bool)
    for mask, (top, left, height, width) in zip(masks, torch.randint(5, 20, (12, 4), generator=generator), strict=True):
        mask[0, top : top + height, left : left + width] = True
    few, many = (max_box_accuracy(maps, masks, iou=0.3, thresholds=count) for count in (20, 1000))
    assert few.shape == (12, 20) and many.shape == (12, 1000)
    assert torch.equal(few, max_box_accuracy(maps, masks, iou=0.3)) and torch.equal(few, many[:, ::50])
    assert torch.equal(many[:, [137, 777]], max_box_accuracy(maps, masks, iou=0.3, thresholds=[0.137, 0.777]))
    metric = MaxBoxAccuracy(iou=0.3, thresholds=1000)
    metric.update(maps, masks)
    assert metric.compute() == many.double().mean(0).amax() > few.double().mean(0).amax()


@pytest.mark.parametrize("thresholds", [0, [], [1.5], [-0.1, 0.5]])
def test_bad_thresholds_say_what_to_do(thresholds, unchecked):
    with pytest.raises(ValueError, match="expected thresholds from 0 to 1, at least one, got"):
        max_box_accuracy(torch.rand(1, 1, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool), thresholds=thresholds)
