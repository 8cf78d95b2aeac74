"""Gini index, entropy and sparsity: closed forms, slow reference, other libraries."""

import math

import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from tests.reference import localization as reference
from tests.same import close

from sightline.metrics.complexity import Entropy, Gini, Sparsity, entropy, gini, sparsity

SCORES = {"gini": gini, "entropy": entropy, "sparsity": sparsity}


def signed_maps(n=5, size=(4, 6), dtype=torch.float64):
    """Half of the values positive; the first map has ties."""
    maps = torch.randn(n, 1, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[0] = maps[0].round()
    return maps.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["gini", "entropy"])
def test_scores_equal_the_reference(name, dtype):
    maps = signed_maps(dtype=dtype)
    slow = [getattr(reference, name)(one.flatten().tolist()) for one in maps]
    assert close(SCORES[name](maps), torch.tensor(slow, dtype=dtype))


def test_entropy_equals_scipys():
    maps = signed_maps()
    shares = maps.clamp(min=0).flatten(1).numpy()
    assert close(entropy(maps), torch.from_numpy(scipy_entropy(shares, axis=1) / math.log(24)))


@pytest.mark.parametrize("n", [1, 2, 9, 49, 64 * 64])
def test_closed_forms(n):
    flat, one_hot = torch.full((1, 1, 1, n), 0.3), torch.zeros(1, 1, 1, n)
    one_hot[..., n // 2] = 7.0
    assert gini(flat).item() == pytest.approx(0, abs=1e-6)
    assert gini(one_hot).item() == pytest.approx(1 - 1 / n, abs=1e-6)
    assert entropy(flat).item() == pytest.approx(1, abs=1e-6)
    assert entropy(one_hot).item() == pytest.approx(0 if n > 1 else 1, abs=1e-6)
    assert sparsity(flat).item() == pytest.approx(1, rel=1e-5)
    assert sparsity(one_hot).item() == pytest.approx(n, rel=1e-5)


@pytest.mark.parametrize("marked", [1, 3, 10, 20])
def test_a_map_of_equal_marked_pixels(marked):
    # k of n pixels: Gini 1 - k / n, entropy log k / log n, sparsity n / k
    maps = torch.zeros(1, 1, 4, 5)
    maps.view(-1)[:marked] = 2.0
    assert gini(maps).item() == pytest.approx(1 - marked / 20, abs=1e-6)
    assert entropy(maps).item() == pytest.approx(math.log(marked) / math.log(20), abs=1e-6)
    assert sparsity(maps).item() == pytest.approx(20 / marked, rel=1e-6)


def test_what_changes_the_gini_index_and_what_does_not():
    maps = signed_maps().clamp(min=0)
    assert close(gini(maps * 1e3), gini(maps))  # scaling
    assert close(gini(maps.repeat_interleave(2, 2).repeat_interleave(3, 3)), gini(maps))  # cloning
    assert (gini(maps + 1) < gini(maps)).all()  # rising tide
    assert (gini(torch.nn.functional.pad(maps, (0, 1))) > gini(maps)).all()  # babies: more zeros


@pytest.mark.parametrize("score", SCORES.values())
def test_edges_batches_order_scale(score):
    maps = signed_maps(6, dtype=torch.float32)
    whole = score(maps)
    assert close(torch.cat([score(one[None]) for one in maps]), whole)
    assert close(score(maps.flip(0)).flip(0), whole)
    assert close(score(maps.clamp(min=0)), whole), "negative values count as 0"
    for scale in (1e-20, 1e30):
        assert close(score(maps * scale), whole)
    maps[0], maps[1], maps[2, 0, 1, 1], maps[3, 0, 1, 1], maps[4, 0, 1, 1] = 0, -1, torch.nan, torch.inf, -torch.inf
    assert score(maps).isnan().tolist() == [True] * 5 + [False]
    assert close(score(maps)[5:], whole[5:])


@pytest.mark.parametrize(("metric", "score"), [(Gini, gini), (Entropy, entropy), (Sparsity, sparsity)])
def test_classes_are_means(metric, score):
    maps = signed_maps()
    maps[3] = -1
    found = metric()
    for part in maps.split(2):
        found.update(maps=part, images=None)
    assert close(found.compute(), score(maps).nanmean())
    assert found.higher_is_better is None and not found.meaning  # concentrated is not right
