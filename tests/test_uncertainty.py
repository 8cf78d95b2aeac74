"""Intervals against their nominal coverage, p-values against all sign flips."""

import time
from dataclasses import astuple

import numpy as np
import pytest
from scipy import stats
from tests.reference import statistics as reference

from sightline.metrics.uncertainty import (
    holm,
    mean_interval,
    mean_intervals,
    paired_test,
    paired_tests,
    wilson_interval,
)


# shares of 2,000 data sets whose interval holds the truth, as measured; plain percentiles reach
# .836, .898, .929, .938 on normal and .780, .857, .904, .931 on exponential data
@pytest.mark.parametrize(
    ("n", "normal", "skewed"), [(5, 0.9145, 0.8705), (10, 0.9395, 0.904), (20, 0.95, 0.925), (50, 0.9465, 0.9355)]
)
def test_intervals_hold_the_truth_nearly_as_often_as_they_say(n, normal, skewed):
    def coverage(values, truth):
        return np.mean([found.low <= truth <= found.high for found in mean_intervals(values)])

    assert coverage(np.random.default_rng(0).normal(size=(n, 2000)), 0) == pytest.approx(normal, abs=0.002)
    assert coverage(np.random.default_rng(0).exponential(size=(n, 2000)), 1) == pytest.approx(skewed, abs=0.002)


def test_few_units_get_wider_intervals_by_the_formula_of_hesterberg():
    values = np.random.default_rng(1).normal(size=(8, 1))
    exact = np.sort(np.random.default_rng(2).choice(values[:, 0], (400_000, 8)).mean(1))
    level = stats.norm.cdf(-np.sqrt(8 / 7) * stats.t.ppf(0.975, 7))
    found = mean_interval(values[:, 0])
    spread = values.std() / np.sqrt(8)
    assert found.low == pytest.approx(np.quantile(exact, level), abs=0.25 * spread)
    assert found.high == pytest.approx(np.quantile(exact, 1 - level), abs=0.25 * spread)
    assert found.low < np.quantile(exact, 0.015) and found.high > np.quantile(exact, 0.985)


def test_columns_nan_and_groups():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=(40, 3)), np.repeat(list("abcdefgh"), 5)
    for by in (None, groups):
        for together, column in zip(mean_intervals(values, by), values.T, strict=True):
            alone = mean_interval(column, by)
            assert astuple(together) == pytest.approx(astuple(alone), abs=1e-12)
    holed = np.insert(values[:, 0], [0, 7, 40], np.nan)
    assert mean_interval(holed) == mean_interval(values[:, 0])
    assert mean_interval(holed, np.insert(groups, [0, 7, 40], "z")) == mean_interval(values[:, 0], groups)
    values[:39, 1], values[:, 2] = np.nan, np.nan
    full, one, none = mean_intervals(values)
    assert (full.n, one.n, none.n) == (40, 1, 0) and full.low < full.value < full.high
    assert one.value == values[39, 1] and np.isnan([one.low, one.high, none.value, none.low, none.high]).all()
    assert mean_intervals(values[:, 2:])[0].n == 0


def test_a_group_counts_once():
    values, groups = np.repeat([0.0, 1.0, 4.0], [2, 3, 5]), np.repeat(["a", "b", "c"], [2, 3, 5])
    shuffled = np.random.default_rng(0).permutation(10)
    found = mean_interval(values, groups)
    assert found.n == 3 and found.value == pytest.approx(2.3) and (found.low, found.high) == (0, 4)
    assert mean_interval(values[shuffled], groups[shuffled]) == found


def test_all_hits_are_no_certainty():
    for share in (0, 1):
        by_image = mean_interval(np.full(20, float(share)))
        assert by_image == wilson_interval(20 * share, 20) and by_image.high - by_image.low == pytest.approx(
            0.1611, 1e-3
        )
        by_group = mean_interval(np.full(20, float(share)), np.repeat(list("abcde"), 4))
        assert by_group == wilson_interval(5 * share, 5)
    constant = mean_interval(np.full(20, 0.25))
    assert (constant.low, constant.value, constant.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("n", [1, 2, 5, 9, 13])
def test_small_samples_get_the_exact_p_value(n):
    for seed in range(4):
        differences = np.random.default_rng(seed).normal(0.5, 1, n).round(1)
        assert paired_test(differences) == reference.sign_flip(differences.tolist())
        values = {"a": differences, "b": np.zeros(n)}
        (pair,) = paired_tests(values)
        assert pair.p == paired_test(differences)


def test_large_samples_get_no_less_than_the_exact_p_value():
    for seed, shift in [(0, 0.0), (1, 0.5), (2, 1.0), (3, 4.0)]:
        differences = np.random.default_rng(seed).normal(shift, 1, 16)
        exact = reference.sign_flip(differences.tolist())
        found = paired_test(differences)
        bound = 2 * np.exp(-(differences.sum() ** 2) / (2 * (differences**2).sum()))
        assert bound >= exact and found <= bound
        assert found == bound or found == pytest.approx(exact, abs=4 * np.sqrt(exact / 10_000) + 1e-4)
    strong = np.random.default_rng(0).normal(1, 0.5, 200)
    bound = 2 * np.exp(-(strong.sum() ** 2) / (2 * (strong**2).sum()))
    assert paired_test(strong) == pytest.approx(bound) and bound < 1e-30
    weak = np.random.default_rng(0).normal(0.1, 1, 200)
    wilcoxon_like = stats.ttest_1samp(weak, 0).pvalue
    assert paired_test(weak) == pytest.approx(wilcoxon_like, abs=0.02)


def test_p_values_without_an_effect_err_as_often_as_they_say():
    # 40 pairs that share no method, three times
    p = []
    for seed in range(3):
        draws = np.random.default_rng(seed).standard_cauchy((80, 40))
        pairs = paired_tests({str(i): draw for i, draw in enumerate(draws)})
        p += [pair.p for pair in pairs if int(pair.method) % 2 == 0 and int(pair.other) == int(pair.method) + 1]
    assert len(p) == 120 and stats.kstest(p, "uniform").pvalue > 0.05
    assert stats.binomtest(int((np.array(p) < 0.05).sum()), 120, 0.05).pvalue > 0.05


def test_groups_nan_and_nothing():
    differences = np.array([1.0, 2.0, np.nan, 3.0, -1.0, 0.5])
    groups = np.array(list("aabbcc"))
    assert paired_test(differences, groups) == reference.sign_flip([3.0, 3.0, -0.5])
    assert paired_test(differences) == reference.sign_flip([1.0, 2.0, 3.0, -1.0, 0.5])
    assert paired_test(np.zeros(5)) == 1 and paired_test(np.zeros(50)) == 1
    assert np.isnan(paired_test(np.full(3, np.nan)))
    assert paired_test(1e-200 * np.arange(1.0, 30)) < 1e-3


def test_pairs_are_what_each_pair_alone_would_be():
    rng = np.random.default_rng(0)
    values = {name: rng.normal(shift, 1, 60) for name, shift in [("a", 0.0), ("b", 0.3), ("c", 2.0)]}
    groups = np.repeat([f"g{i}" for i in range(20)], 3)
    for by in (None, groups):
        found = paired_tests(values, by)
        assert [(pair.method, pair.other) for pair in found] == [("a", "b"), ("a", "c"), ("b", "c")]
        for pair in found:
            differences, got = values[pair.method] - values[pair.other], pair.difference
            alone = mean_interval(differences, by)
            assert (got.value, got.low, got.high) == pytest.approx((alone.value, alone.low, alone.high), abs=1e-12)
            assert got.n == alone.n and pair.p == pytest.approx(paired_test(differences, by), rel=1e-12)
            (reverse,) = paired_tests({name: values[name] for name in (pair.other, pair.method)}, by)
            assert (reverse.difference.value, reverse.p) == pytest.approx((-got.value, pair.p), rel=1e-12)
        assert [pair.adjusted for pair in found] == pytest.approx(reference.holm([pair.p for pair in found]))


def test_pairs_use_the_images_that_both_have():
    values = {"a": np.array([1.0, 2.0, np.nan, 5.0]), "b": np.array([np.nan, 1.0, 1.0, 1.0]), "c": np.full(4, np.nan)}
    both, missing, _ = paired_tests(values)
    assert both.difference.value == 2.5 and both.p == reference.sign_flip([1.0, 4.0]) == both.adjusted
    ends = missing.difference
    assert np.isnan([ends.value, ends.low, ends.high, missing.p, missing.adjusted]).all()
    assert paired_tests({}) == paired_tests({"a": values["a"]}) == []


def test_holm_by_hand():
    # Holm 1979: the smallest times 4, the next times 3, and never below the one before
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    found = holm(np.array([0.5, np.nan, 0.02, 0.9]))
    assert found[[0, 2, 3]] == pytest.approx([1.0, 0.06, 1.0]) and np.isnan(found[1])
    assert holm(np.zeros(0)).shape == (0,)
    p_values = np.random.default_rng(0).random(30) ** 3
    assert holm(p_values) == pytest.approx(reference.holm(p_values.tolist()), abs=1e-15)


def test_the_seed_decides_and_the_global_state_stays():
    values = np.random.default_rng(0).normal(0.2, 1, 100)
    before = np.random.get_state()[1].copy()
    assert mean_interval(values) == mean_interval(values) != mean_interval(values, seed=1)
    assert paired_test(values) == paired_test(values) != paired_test(values, seed=1)
    assert np.array_equal(before, np.random.get_state()[1])


def test_thirty_methods_on_500_images_take_about_a_second():
    values = {str(i): column for i, column in enumerate(np.random.default_rng(0).normal(size=(30, 500)))}
    start = time.process_time()
    found = paired_tests(values)
    assert time.process_time() - start < 3 and len(found) == 30 * 29 / 2
