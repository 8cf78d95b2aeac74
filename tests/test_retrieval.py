"""CMC and mAP against loops over every ranked list, and against torchreid's and DG-Net's conventions."""

from functools import partial

import numpy as np
import pytest
import torch
from tests.reference import retrieval as reference

from sightline.metrics.retrieval import nearest, ranking, ranking_of_features
from sightline.metrics.uncertainty import mean_interval

FORMS = {"step": reference.torchreid_average_precision, "trapezoid": reference.dg_net_average_precision}


def gallery(seed, levels):
    """Random queries and a small gallery with junk (-1), distractors (0), ties and queries without a match."""
    rng = np.random.default_rng(seed)
    queries, size = int(rng.integers(1, 4)), int(rng.integers(1, 8)) if levels else int(rng.integers(1, 40))
    similarities = rng.integers(0, levels, (queries, size)) / 4 if levels else rng.random((queries, size))
    ids, cameras = rng.integers(-1, 4, size), rng.integers(0, 3, size)
    return torch.from_numpy(similarities), rng.integers(1, 5, queries), ids, rng.integers(0, 3, queries), cameras


@pytest.mark.parametrize("levels", [0, 3])
def test_scores_equal_loops_over_200_galleries(levels):
    seen = {"junk": 0, "same camera": 0, "distractors": 0, "no match": 0, "ties": 0}
    for seed in range(200):
        similarities, query_ids, ids, query_cameras, cameras = gallery(seed, levels)
        ranked = ranking(similarities, query_ids, ids, query_cameras, cameras)
        for row, (values, identity, camera) in enumerate(
            zip(similarities.tolist(), query_ids, query_cameras, strict=True)
        ):
            listed = (values, identity, camera, ids, cameras)
            for k in (1, 2, 5, 50):
                expected = reference.expected(partial(reference.cmc, k=k), *listed)
                assert_is(ranked.cmc(k)[row], expected)
            for form, loop in FORMS.items():
                assert_is(ranked.average_precision(form)[row], reference.expected(loop, *listed))
            found = reference.hits(range(len(ids)), identity, camera, ids, cameras)
            assert ranked.matches[row] == sum(found)
            seen["no match"] += 1 not in found
            seen["ties"] += len(set(values)) < len(values)
            seen["same camera"] += any((ids == identity) & (cameras == camera))
        seen["junk"] += int((ids < 0).sum())
        seen["distractors"] += int((ids == 0).sum())
    assert all(count > 20 for kind, count in seen.items() if levels or kind != "ties"), seen


def assert_is(value, expected):
    if expected is None:
        assert torch.isnan(value)
    else:
        assert float(value) == pytest.approx(expected, abs=1e-12)


def test_features_in_parts_equal_the_whole_matrix(tmp_path):
    rng = np.random.default_rng(0)
    ids, cameras = rng.integers(-1, 9, 300), rng.integers(0, 4, 300)
    query_ids, query_cameras = rng.integers(0, 11, 40), rng.integers(0, 4, 40)
    features = rng.integers(-2, 3, (340, 6)).astype(np.float32)  # products are exact, and many are equal
    stored = np.memmap(tmp_path / "gallery", np.float32, "w+", shape=(300, 6))
    stored[:] = features[40:]
    queries = torch.from_numpy(features[:40])
    whole = ranking(queries @ torch.from_numpy(features[40:]).mT, query_ids, ids, query_cameras, cameras)
    for batch_size in (1, 7, 299, 1000):
        parts = ranking_of_features(queries, stored, query_ids, ids, query_cameras, cameras, batch_size)
        for k in (1, 5):
            assert np.array_equal(parts.cmc(k), whole.cmc(k), equal_nan=True)
        assert np.array_equal(parts.average_precision(), whole.average_precision(), equal_nan=True)
        scores, places = nearest(queries, stored, 10, batch_size)
        products = queries @ torch.from_numpy(features[40:]).mT
        assert torch.equal(places, products.argsort(dim=1, descending=True, stable=True)[:, :10])
        assert torch.equal(scores, products.gather(1, places))
    assert torch.isnan(whole.cmc(1)).any()


def test_equal_features_get_what_a_random_order_gets():
    ids = np.array([1] * 3 + [0] * 97)
    ranked = ranking(torch.zeros(1, 100), np.array([1]), ids)
    shuffled = [reference.hits(order, 1, 0, ids, ids + 9) for order in orders_of(ids, 4000)]
    assert float(ranked.cmc(1)) == pytest.approx(0.03, abs=1e-12)
    assert float(ranked.cmc(98)) == 1
    for form, loop in FORMS.items():
        assert float(ranked.average_precision(form)) == pytest.approx(np.mean([*map(loop, shuffled)]), abs=0.004)


def orders_of(ids, n):
    rng = np.random.default_rng(0)
    return [rng.permutation(len(ids)) for _ in range(n)]


def test_conventions_count_queries_without_a_match_differently():
    similarities = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    ranked = ranking(similarities, np.array([1, 5]), np.array([1, 2]))
    values = ranked.average_precision()
    assert mean_interval(values.numpy()).value == 1.0  # torchreid: over the queries with a match
    assert values.nan_to_num().mean() == 0.5  # DG-Net: over all


def test_gallery_of_one():
    ranked = ranking(torch.ones(2, 1), np.array([1, 2]), np.array([1]), np.array([0, 0]), np.array([1]))
    assert ranked.cmc(1)[0] == 1 and ranked.average_precision("trapezoid")[0] == 1
    assert torch.isnan(ranked.cmc(1)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gallery_ids": np.array([], int)}, "expected a query and an image to find, got 2 queries and a gallery of 0"),
        ({"query_ids": np.array([0, -1])}, "expected queries with an identity of 0 or more, got -1"),
        ({"query_cameras": np.array([0, 1])}, "got those of one side"),
        ({"similarities": torch.tensor([[0.0], [torch.nan]])}, "expected finite similarities, got NaN"),
        (
            {"query_cameras": np.array([0]), "gallery_cameras": np.array([0])},
            "expected a camera for each of 2 queries and 1 images of the gallery, got 1 and 1",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(change, message):
    good = {"similarities": torch.ones(2, 1), "query_ids": np.array([0, 1]), "gallery_ids": np.array([0])}
    wrong = good | change
    wrong["similarities"] = wrong["similarities"][:, : len(wrong["gallery_ids"])]
    with pytest.raises(ValueError, match=message):
        ranking(**wrong)


@pytest.mark.usefixtures("unchecked")
def test_bad_options():
    ranked = ranking(torch.ones(1, 1), np.array([0]), np.array([0]))
    with pytest.raises(ValueError, match="expected k of 1 or more, got 0"):
        ranked.cmc(0)
    with pytest.raises(ValueError, match="expected form to be step or trapezoid, got 'other'"):
        ranked.average_precision("other")
    with pytest.raises(ValueError, match="expected k of 1 or more, got 0"):
        nearest(torch.eye(2), torch.eye(2), 0)
    with pytest.raises(ValueError, match="expected a batch size of at least 1, got 0"):
        ranking_of_features(torch.eye(2), torch.eye(2), np.arange(2), np.arange(2), batch_size=0)
