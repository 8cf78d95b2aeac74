"""Agreement of maps, of images and of raters: by hand, by slow reference, by published values."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from tests.reference import statistics as reference
from tests.same import close

from sightline import maps as pixels
from sightline.metrics.agreement import (
    RankCorrelation,
    TopOverlap,
    krippendorff_alpha,
    rank_correlation,
    ranks,
    reliability,
    top_overlap,
    win_rate,
)


def of(*cells):
    return torch.tensor(cells)[None, None, None]


def two(seed=0, n=5, size=(6, 7), levels=9):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(levels, (2, n, 1, *size), generator=generator)
    return draw.double() - levels // 2


def test_ranks_are_those_of_scipy_in_any_shape():
    values = two()[0].reshape(5, 6, 7)
    expected = stats.rankdata(values.numpy(), axis=-1)
    assert torch.equal(ranks(values), torch.from_numpy(expected))
    assert np.array_equal(ranks(values.numpy()[:, ::-1]), expected[:, ::-1])
    assert ranks(np.array([0.0, -0.0, 1.0])).tolist() == [1.5, 1.5, 3.0]
    assert ranks(torch.tensor([7, 7, 7])).tolist() == [2.0, 2.0, 2.0]
    assert ranks(torch.zeros(3, 1)).tolist() == [[1.0]] * 3 and ranks(torch.zeros(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("levels", [3, 9, 10_000])
def test_rank_correlation_equals_the_reference(levels):
    a, b = two(levels=levels)
    slow = [reference.spearman(x.flatten().tolist(), y.flatten().tolist()) for x, y in zip(a, b, strict=True)]
    assert close(rank_correlation(a, b), torch.tensor(slow, dtype=torch.float64))
    assert close(rank_correlation(a.float(), b.float()), torch.tensor(slow))


def test_rank_correlation_by_hand():
    # Quantus' values for Spearman: 1, 1, 0, .5, -1
    base = of(1.0, 2.0, 3.0)
    assert rank_correlation(base, base).item() == pytest.approx(1)
    assert rank_correlation(base, of(1.0, 4.0, 9.0)).item() == pytest.approx(1)
    assert rank_correlation(base, of(1.0, 0.0, 1.0)).item() == pytest.approx(0, abs=1e-7)
    assert rank_correlation(base, of(1.0, 3.0, 2.0)).item() == pytest.approx(0.5)
    assert rank_correlation(base, -base).item() == pytest.approx(-1)
    a, b = two()
    assert close(rank_correlation(a, b), rank_correlation(b, a)) and close(
        rank_correlation(a**3, b), rank_correlation(a, b)
    )


def test_overlap_by_hand():
    a, b = of(9.0, 8.0, 1.0, 0.0, 0.0), of(9.0, 0.0, 8.0, 1.0, 0.0)
    assert top_overlap(a, b, share=0.2).item() == 1
    assert top_overlap(a, b, share=0.4).item() == pytest.approx(1 / 3)
    assert top_overlap(a, b, share=0.6).item() == pytest.approx(2 / 3 / (4 / 3))  # the last of a tied three with b's 1
    assert top_overlap(a, b, share=1.0).item() == 1
    assert top_overlap(a, b, share=0.01).item() == 1  # at least one cell


def test_ties_of_the_top_are_shared_out():
    # two ones among four cells, one of them taken: each belongs by half
    assert top_overlap(of(1.0, 1.0, 0.0, 0.0), of(1.0, 0.0, 0.0, 0.0), share=0.25).item() == pytest.approx(0.5 / 1.5)
    flat, peaked = of(*[3.0] * 10), of(*map(float, range(10)))
    assert top_overlap(flat, peaked, share=0.2).item() == pytest.approx(0.2 / 1.8)  # chance
    assert top_overlap(flat, flat, share=0.2).item() == pytest.approx(1)
    cells = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert top_overlap(flat, peaked[..., cells], share=0.2).item() == pytest.approx(0.2 / 1.8)


def test_undefined_maps():
    flat, peaked = of(0.3, 0.3, 0.3), of(1.0, 2.0, 3.0)
    assert rank_correlation(flat, peaked).isnan() and rank_correlation(peaked, flat).isnan()
    assert rank_correlation(of(0.3, 0.3, 0.3), torch.rand(1, 1, 7, 11)).isnan()  # resizing a flat map rounds
    assert rank_correlation(of(1.0), of(2.0)).isnan() and top_overlap(of(1.0), of(2.0)).item() == 1
    for bad in (float("nan"), float("inf"), float("-inf")):
        for function in (rank_correlation, top_overlap):
            both = torch.cat([peaked, of(1.0, bad, 3.0)]), torch.cat([peaked, peaked])
            assert function(*both).isnan().tolist() == function(*both[::-1]).isnan().tolist() == [False, True]


def test_the_smaller_map_is_resized():
    generator = torch.Generator().manual_seed(0)
    small, large = torch.rand(3, 1, 4, 9, generator=generator), torch.rand(3, 1, 8, 5, generator=generator)
    grown = [pixels.resize(one, (8, 9)) for one in (small, large)]
    for function in (rank_correlation, top_overlap):
        assert torch.equal(function(small, large), function(*grown))


@pytest.mark.parametrize(("function", "metric"), [(rank_correlation, RankCorrelation), (top_overlap, TopOverlap)])
def test_batches_and_order_change_nothing(function, metric):
    a, b = two(n=6)
    whole = function(a, b)
    assert close(torch.cat([function(x[None], y[None]) for x, y in zip(a, b, strict=True)]), whole)
    assert close(function(a.flip(0), b.flip(0)), whole.flip(0))
    stream = metric()
    for rows in ([0, 1], [2], [3, 4, 5]):
        stream.update(maps=a[rows], others=b[rows])
    assert stream.compute().item() == pytest.approx(whole.mean().item(), rel=1e-12)


def test_shapes_and_shares_that_do_not_fit(unchecked):
    maps = torch.rand(2, 1, 3, 3)
    for function in (rank_correlation, top_overlap):
        with pytest.raises(ValueError, match=r"expected two maps .*compare one target"):
            function(maps, torch.rand(3, 1, 3, 3))
        with pytest.raises(ValueError, match=r"expected two maps .*compare one target"):
            function(torch.rand(2, 2, 3, 3), torch.rand(2, 2, 3, 3))
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=r"expected a share above 0"):
            top_overlap(maps, maps, share=share)


_ = np.nan
# Krippendorff 2011, example C: 4 observers, 12 units
EXAMPLE = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
)


def test_alpha_has_the_published_values():
    for level, value in [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]:
        assert krippendorff_alpha(EXAMPLE, level) == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_equals_its_sum_over_pairs(level):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        ratings = rng.integers(1, 6, (4, 9)).astype(float)
        ratings[rng.random(ratings.shape) < 0.3] = np.nan
        slow = reference.krippendorff(ratings.tolist(), level)
        assert krippendorff_alpha(ratings, level) == pytest.approx(slow, abs=1e-12)
        assert krippendorff_alpha(ratings[::-1, ::-1], level) == pytest.approx(slow, abs=1e-12)
    if level != "interval":
        assert krippendorff_alpha(EXAMPLE**3, level) == pytest.approx(krippendorff_alpha(EXAMPLE, level))


def test_alpha_where_there_is_nothing_to_agree_on(unchecked):
    assert np.isnan(krippendorff_alpha(np.full((3, 4), 0.1), "interval"))
    assert np.isnan(krippendorff_alpha(np.array([[1.0, np.nan], [np.nan, 2.0]])))
    assert np.isnan(krippendorff_alpha(np.zeros((1, 5))))
    with pytest.raises(ValueError, match=r"expected level to be one of nominal, ordinal, interval; got 'ratio'"):
        krippendorff_alpha(EXAMPLE, "ratio")


def test_reliability():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=400)  # images differ, methods do not change places
    assert reliability({"a": hard, "b": hard + 1, "c": hard + 2}) == pytest.approx(1)
    noise = {name: rng.normal(size=400) for name in "abcde"}
    assert abs(reliability(noise)) < 0.02
    opposite = np.where(np.arange(400) % 2, 1.0, -1.0)
    assert reliability({"a": opposite, "b": -opposite}) < 0.01
    table = np.stack(list(noise.values()), 1)[:12] + np.arange(5) * 0.7
    table[3, 1] = table[8, 4] = np.nan
    placed = [stats.rankdata(row).tolist() for row in table if not np.isnan(row).any()]
    slow = reference.krippendorff(placed, "ordinal")
    assert reliability(dict(zip("abcde", table.T, strict=True))) == pytest.approx(slow, abs=1e-12)
    assert np.isnan(reliability({"a": hard})) and np.isnan(reliability({"a": hard[:1], "b": hard[:1]}))
    missing = noise | {"f": np.full(400, np.nan)}
    assert reliability(missing) == pytest.approx(reliability(noise), abs=1e-12)
    agreed = np.arange(5.0) + np.zeros((4, 1))  # all put five methods in the same order, two lack some of them
    agreed[:2, :2] = np.nan
    assert reliability(dict(zip("abcde", agreed.T, strict=True))) == 1


def test_win_rate():
    a, b = np.array([1.0, 2.0, 3.0, np.nan, 4.0]), np.array([0.0, 2.0, 1.0, 0.0, 5.0])
    up, down = (win_rate(a, b, higher_is_better=higher) for higher in (True, False))
    assert (up.value, down.value, up.n) == (0.625, 0.375, 4)
    assert win_rate(b, a, higher_is_better=True).value == 0.375
    assert win_rate(a, b, higher_is_better=True, groups=np.array(list("xxyyz"))).n == 3
    always = win_rate(np.ones(10), np.zeros(10), higher_is_better=True)
    assert always.value == always.high == 1 and always.low == pytest.approx(0.7225, abs=1e-4)
    for one, other in itertools.permutations([np.zeros(4), np.zeros(4)], 2):
        assert win_rate(one, other, higher_is_better=True).value == 0.5
