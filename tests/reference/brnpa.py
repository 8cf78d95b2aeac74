"""BR-NPA's representative vectors, position by position. Source: Gomez et al., 2106.02566, and the authors' code.

In torch, so that autograd gives the gradient too.
"""

import torch


def represent(features, k, update="cosine", power=1, start=None):
    """Vectors (b, k, c), vectors without refinement (b, k, c), maps (b, k, h, w) and picks of features (b, c, h, w)."""
    height, width = features.shape[2:]
    all_vectors, all_raw, all_maps, all_picks = [], [], [], []
    for n, image in enumerate(features):
        f = [image[:, y, x] for y in range(height) for x in range(width)]
        norms = [(v * v).sum().sqrt() + 1e-5 for v in f]
        scores = [norm.item() ** power for norm in norms] if start is None else start[n].tolist()
        vectors, raw, maps, picks = [], [], [], []
        for _ in range(k):
            pick = max(range(len(f)), key=scores.__getitem__)
            cosines = [torch.relu((v * f[pick]).sum() / (norm * norms[pick])) for v, norm in zip(f, norms, strict=True)]
            total = sum(cosines)
            weights = [cosine / total for cosine in cosines]
            vectors.append(sum(w * v for w, v in zip(weights, f, strict=True)))
            raw.append(f[pick])
            maps.append(torch.stack(weights).unflatten(0, (height, width)))
            picks.append(pick)
            factors = cosines if update == "cosine" else weights
            scores = [score * (1 - factor.item()) for score, factor in zip(scores, factors, strict=True)]
        all_vectors.append(torch.stack(vectors))
        all_raw.append(torch.stack(raw))
        all_maps.append(torch.stack(maps))
        all_picks.append(picks)
    return torch.stack(all_vectors), torch.stack(all_raw), torch.stack(all_maps), all_picks
