"""FCAN: glimpses at parts, chosen by policies that are rewarded as soon as a glimpse helps.

Source: Liu et al., "Fully Convolutional Attention Networks for Fine-Grained Recognition", 2016 (1603.06765).
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.attention.hard import Glimpse, HardGate
from sightline.attention.registry import check_choice
from sightline.models.trunks import Trunk

Reward = Literal["greedy", "final", "none"]


def glimpse_rewards(
    scores: Float[Tensor, "g b n"], labels: Int[Tensor, " b"], reward: Literal["greedy", "final"] = "greedy"
) -> Float[Tensor, "_ b"]:
    """Reward of each glimpse, 1 or 0, from the logits of the whole image and of each glimpse in turn.

    The prediction after t glimpses is the mean of the first t + 1 logits. "greedy": glimpse t gets 1 if its loss is
    below that before the glimpse. "final": every glimpse gets 1 if the last prediction is right.

    Source: Liu et al. 2016, the greedy reward as remembered; "final" is what it is meant to improve.

    >>> scores = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[0.0, 3.0]]])
    >>> glimpse_rewards(scores, torch.tensor([0])).tolist()
    [[1.0], [0.0]]
    >>> glimpse_rewards(scores, torch.tensor([1]), "final").tolist()
    [[1.0], [1.0]]
    """
    counts = torch.arange(1, len(scores) + 1, device=scores.device)[:, None, None]
    fused = scores.detach().cumsum(0) / counts
    if reward == "final":
        return (fused[-1].argmax(1) == labels).to(scores.dtype).expand(len(scores) - 1, -1)
    losses = torch.stack([F.cross_entropy(logits, labels, reduction="none") for logits in fused])
    return (losses[1:] < losses[:-1]).to(scores.dtype)


class Policies(nn.Module):
    """One map per glimpse, 1 at a single position: drawn in training mode, the most probable one in eval mode."""

    def __init__(self, channels: int, glimpses: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            HardGate(channels, estimator="reinforce", mixed=0.0, compat="none") for _ in range(glimpses)
        )

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b g h w"]:
        """The maps."""
        return torch.cat([gate(features) for gate in self.gates], 1)


class Glimpses(nn.Module):
    """Square crops of the images around one position per policy; the child `gate` returns the positions as maps.

    >>> Glimpses(8, 2, 0.5)(torch.zeros(3, 3, 20, 30), torch.zeros(3, 8, 4, 6)).shape
    torch.Size([2, 3, 3, 10, 10])
    """

    def __init__(self, channels: int, glimpses: int, share: float) -> None:
        super().__init__()
        self.share = share
        self.gate = Policies(channels, glimpses)

    def forward(
        self, images: Float[Tensor, "b 3 H W"], features: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "g b 3 s s"]:
        """The crops, glimpse by glimpse."""
        crop = Glimpse(max(round(self.share * min(images.shape[2:])), 1), hard=True)
        maps = self.gate(features)
        return torch.stack([crop(images, maps[:, g : g + 1]) for g in range(maps.shape[1])])


class FCAN(nn.Module):
    """A trunk sees the image; policies on its features choose parts, all at once; another trunk sees their crops.

    The image and each glimpse have a classifier; the logits are the mean of all of theirs. In training the glimpses
    are drawn and their policies learn by REINFORCE (`reinforce_loss`), with the rewards of `glimpse_rewards`; the
    classifiers learn by the cross entropy of each and of the mean. `sl.fit` and `sightline train` do this.

    Args:
        num_classes: number of logits.
        backbone: name of a convolutional timm model, or `cifar_resnet`.
        backbone_options: keyword arguments of the backbone.
        pretrained: start from timm's weights, which are downloaded.
        level: which of a timm backbone's feature maps the policies see: -1 is the last, lower ones are larger.
        glimpses: number of parts; the paper has two.
        share: side of a glimpse as a share of the image's shorter side.
        reward: "greedy"; or, as controls, "final", one reward for all glimpses together, and "none": the policies
            learn nothing.

    Raises:
        ValueError: no glimpse, a share outside (0, 1], an unknown reward or backbone.

    Source: Liu et al. 2016 (1603.06765), abstract; the reward and further details as remembered, the text was not at
    hand.

    Differs: the glimpses share one trunk, so that it sees crops of one size only. The baseline of an image's reward is
    the mean reward of the other images in the batch.

    >>> model = FCAN(4, backbone="cifar_resnet", backbone_options={"depth": 8})
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 4])
    """

    default_layer = "features"
    """Later feature maps are those of crops."""
    scores: Float[Tensor, "g b n"] | None = None
    """Of the last forward in training mode, until `own_loss` has used them."""

    def __init__(
        self,
        num_classes: int = 10,
        *,
        backbone: str = "resnet18",
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool = False,
        level: int = -1,
        glimpses: int = 2,
        share: float = 0.5,
        reward: Reward = "greedy",
    ) -> None:
        super().__init__()
        check_choice("reward", reward, get_args(Reward))
        if glimpses < 1:
            raise ValueError(f"expected glimpses of 1 or more, got {glimpses}; the paper has 2")
        if not 0 < share <= 1:
            raise ValueError(f"expected a share of the image above 0 and up to 1, got {share}; 0.5 is half its side")
        self.reward: Reward = reward
        self.features, self.part_features = (
            Trunk(backbone, backbone_options, pretrained=pretrained, level=level) for _ in range(2)
        )
        channels = self.features.channels
        self.attention = Glimpses(channels, glimpses, share)
        self.heads = nn.ModuleList(nn.Linear(channels, num_classes) for _ in range(glimpses + 1))

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n"]:
        """Mean of the logits of the image and of the glimpses."""
        features = self.features(images)
        crops = self.attention(images, features.detach())
        parts = self.part_features(crops.flatten(0, 1)).mean((2, 3)).unflatten(0, crops.shape[:2])
        vectors = [features.mean((2, 3)), *parts]
        scores = torch.stack([head(vector) for head, vector in zip(self.heads, vectors, strict=True)])
        self.scores = scores if self.training else None
        return scores.mean(0)

    def own_loss(self, logits: Float[Tensor, "b n"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Cross entropies of the single classifiers, and `reinforce_loss` of each policy."""
        scores, self.scores = self.scores, None
        if scores is None:
            return logits.new_zeros(())
        loss = torch.stack([F.cross_entropy(one, labels) for one in scores]).sum()
        if self.reward != "none":
            rewards = glimpse_rewards(scores, labels, self.reward)
            for gate, reward in zip(self.attention.gate.gates, rewards, strict=True):
                assert isinstance(gate, HardGate)
                loss = loss + gate.reinforced(reward)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and files, without the tensors of the last forward's graph."""
        return self.__dict__ | {"scores": None}
