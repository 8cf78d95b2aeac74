"""The pages beside other libraries say what their JSON files hold, and every difference in them is explained."""

import json
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks import peer_metrics
from torch import Tensor

ONE, TWO = torch.tensor([1.0]), torch.tensor([2.0])


def peers() -> ModuleType:
    for name in ("captum", "pytorch_grad_cam", "torchcam", "zennit"):
        pytest.importorskip(name)
    from benchmarks import peers

    return peers


@pytest.mark.parametrize("script", [lambda: peer_metrics, peers], ids=["peer_metrics", "peers"])
def test_the_page_is_what_the_json_file_says(script: Any) -> None:
    module = script()
    assert module.page(json.loads(module.RESULTS.read_text())) == module.PAGE.read_text()


def test_every_score_of_every_peer_is_explained() -> None:
    found = json.loads(peer_metrics.RESULTS.read_text())
    assert [row["metric"] for rows in found["peers"].values() for row in rows if row["verdict"] == "unexplained"] == []
    assert list(found["peers"]) == list(peer_metrics.CASES) and all(found["peers"].values())


def fails() -> Tensor:
    raise ValueError("no such thing")


@pytest.mark.parametrize(
    ("theirs", "options", "verdict"),
    [
        (ONE, {}, "equal"),
        (ONE + 1e-6, {}, "equal"),
        (TWO, {}, "unexplained"),
        (TWO, {"verdict": "differs"}, "unexplained"),  # without a proof
        (TWO, {"verdict": "differs", "proof": peer_metrics.is_theirs(lambda: ONE)}, "unexplained"),
        (TWO, {"verdict": "differs", "proof": peer_metrics.is_theirs(lambda: TWO)}, "differs"),
        (TWO, {"verdict": "peer is wrong", "proof": peer_metrics.differ(lambda: ONE, lambda: ONE)}, "unexplained"),
        (TWO, {"verdict": "peer is wrong", "proof": peer_metrics.differ(lambda: ONE, lambda: TWO)}, "peer is wrong"),
        (ONE, {"truth": [2.0]}, "unexplained"),  # ours is wrong
        (torch.tensor([torch.nan]), {}, "unexplained"),
        (None, {}, "unexplained"),
        (None, {"verdict": "peer is wrong", "error": "no such"}, "peer is wrong"),
        (None, {"verdict": "peer is wrong", "error": "another"}, "unexplained"),
    ],
)
def test_a_verdict_needs_its_proof(theirs: Tensor | None, options: dict[str, Any], verdict: str) -> None:
    peer = fails if theirs is None else lambda: theirs
    case = peer_metrics.Case(metric="", ours="", theirs=peer, mine=lambda: ONE, **options)
    assert peer_metrics.measure("captum", case)["verdict"] == verdict
