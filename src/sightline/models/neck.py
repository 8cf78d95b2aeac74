"""BNNeck, the classifier of re-identification: BatchNorm between features and logits, a triplet loss in front of it."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.attention.places import Trace
from sightline.checks import missing
from sightline.inference import head_name

__all__ = ["BNNeck", "add_neck", "batch_hard_triplet"]


class BNNeck(nn.Module):
    """BatchNorm without shift, then a linear layer without bias; optionally with a triplet loss.

    The triplet loss pulls the features in front of the BatchNorm, where distances are free; the identities are told
    apart, and images are compared by their cosine, behind it.

    Args:
        features: number of features.
        num_classes: number of identities to train with.
        triplet: weight of `batch_hard_triplet` in the training loss; 0: none.
        margin: of that loss.

    Raises:
        ValueError: a negative weight or margin.
        ModuleNotFoundError: a triplet loss without pytorch-metric-learning.

    Source: Luo et al. 2019 (1903.07071), "Bag of Tricks and A Strong Baseline for Deep Person Re-identification":
    BNNeck.

    >>> import torch
    >>> neck = BNNeck(8, 3).eval()
    >>> neck(torch.zeros(2, 8)).tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    def __init__(self, features: int, num_classes: int, *, triplet: float = 0.0, margin: float = 0.3) -> None:
        super().__init__()
        if triplet < 0 or margin < 0:
            raise ValueError(
                f"expected triplet and margin of 0 or more, got {triplet} and {margin}; 1 and 0.3 are usual"
            )
        self.triplet, self.margin = triplet, margin
        if triplet:
            _metric_learning()
        self.norm = nn.BatchNorm1d(features)
        self.norm.bias.requires_grad_(False)
        self.fc = nn.Linear(features, num_classes, bias=False)
        nn.init.normal_(self.fc.weight, std=0.001)
        self.features: Tensor | None = None

    def forward(self, features: Float[Tensor, "b c"]) -> Float[Tensor, "b n"]:
        """Logits."""
        if self.triplet and self.training:
            self.features = features
        return self.fc(self.norm(features))

    def own_loss(self, logits: Float[Tensor, "b n"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """The triplet loss of the last forward in training mode, times its weight; 0 without one."""
        features, self.features = self.features, None
        if features is None:
            return logits.new_zeros(())
        return self.triplet * batch_hard_triplet(features.float(), labels, self.margin)

    def extra_repr(self) -> str:
        """Options."""
        return f"triplet={self.triplet}, margin={self.margin}"

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and files, without the tensors of the last forward's graph."""
        return self.__dict__ | {"features": None}


def batch_hard_triplet(
    features: Float[Tensor, "b c"], labels: Int[Tensor, " b"], margin: float = 0.3
) -> Float[Tensor, ""]:
    """Mean of max(0, margin + d(farthest image of the identity) - d(nearest of another)) over the batch.

    Distances are Euclidean, of the features as they are. Images without another one of their identity, or of another
    identity, in the batch are left out.

    Raises:
        ModuleNotFoundError: pytorch-metric-learning is not installed.

    Source: Hermans et al. 2017 (1703.07737), "In Defense of the Triplet Loss for Person Re-Identification": batch hard.

    >>> import torch
    >>> two = torch.tensor([[0.0], [1.0], [1.5], [4.0]])
    >>> round(float(batch_hard_triplet(two, torch.tensor([0, 0, 1, 1]))), 4)  # 0, 0.8, 2.3, 0 beside the margin
    0.775
    """
    learning = _metric_learning()
    distance = learning.distances.LpDistance(normalize_embeddings=False)
    pairs = learning.miners.BatchHardMiner(distance=distance)(features, labels)
    loss = learning.losses.TripletMarginLoss(margin, distance=distance, reducer=learning.reducers.MeanReducer())
    return loss(features, labels, pairs)


def add_neck(model: nn.Module, **options: float) -> nn.Module:
    """Replace the linear layer that makes the logits of a model by a `BNNeck` with as many outputs, in place.

    Raises:
        ValueError: no single linear layer makes the logits, or an option is wrong.
    """
    images = Trace(model).images
    try:
        name = head_name(model, images)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"expected a network with one head, an nn.Linear that makes the logits, got {type(model).__name__}; leave "
            "out neck"
        ) from error
    parent, _, child = name.rpartition(".")
    head: Any = model.get_submodule(name)
    try:
        neck = BNNeck(head.in_features, head.out_features, **options)
    except TypeError as error:
        raise ValueError(
            f"neck: expected triplet and margin, got {', '.join(options)}; leave the others out"
        ) from error
    setattr(model.get_submodule(parent), child, neck.train(model.training))
    return model


def _metric_learning() -> Any:
    try:
        import pytorch_metric_learning
        from pytorch_metric_learning import distances, losses, miners, reducers  # noqa: F401  # pyright: ignore
    except ModuleNotFoundError:
        raise missing("the triplet loss needs pytorch-metric-learning", "reid") from None
    return pytorch_metric_learning
