"""CMC and average precision of one ranked list, image by image, over every order of equally similar images.

Source: the evaluation of torchreid (`eval_market1501`) and of DG-Net and Market-1501 (`evaluate`, `compute_mAP`), in
words; Zheng et al. 2015.
"""

from itertools import groupby, permutations, product


def orders(similarities):
    """Every order of the images from the most similar on; equally similar ones in each of their orders."""
    ranked = sorted(range(len(similarities)), key=lambda i: -similarities[i])
    tied = [list(group) for _, group in groupby(ranked, key=lambda i: similarities[i])]
    for parts in product(*map(permutations, tied)):
        yield [i for part in parts for i in part]


def hits(order, identity, camera, ids, cameras):
    """1 for a match, 0 for a wrong image, in the order of the list; junk removed."""
    kept = [i for i in order if ids[i] >= 0 and not (ids[i] == identity and cameras[i] == camera)]
    return [int(ids[i] == identity) for i in kept]


def cmc(found, k):
    return float(1 in found[:k])


def torchreid_average_precision(found):
    precisions = []
    for place, hit in enumerate(found):
        if hit:
            precisions.append(sum(found[: place + 1]) / (place + 1))
    return sum(precisions) / len(precisions)


def dg_net_average_precision(found):
    places = [place for place, hit in enumerate(found) if hit]
    area = 0.0
    for i, place in enumerate(places):
        precision = (i + 1) / (place + 1)
        before = i / place if place != 0 else 1.0
        area += (before + precision) / 2 / len(places)
    return area


def expected(value, query, identity, camera, ids, cameras):
    """Mean of a value over all orders; None where the query has no match."""
    values = []
    for order in orders(query):
        found = hits(order, identity, camera, ids, cameras)
        if 1 not in found:
            return None
        values.append(value(found))
    return sum(values) / len(values)
