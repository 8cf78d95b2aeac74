"""The pages beside other libraries say what their JSON files hold, and every difference in them is explained."""

import json
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks import peer_metrics
from benchmarks.compare import Case, Proof, Reason, differ, is_theirs
from torch import Tensor

ONE, TWO = torch.tensor([1.0]), torch.tensor([2.0])


def peers() -> ModuleType:
    for name in ("captum", "pytorch_grad_cam", "torchcam", "zennit"):
        pytest.importorskip(name)
    from benchmarks import peers

    return peers


@pytest.mark.parametrize("script", [lambda: peer_metrics, peers], ids=["peer_metrics", "peers"])
def test_the_pages_are_what_the_json_file_says(script: Any) -> None:
    module = script()
    pages = module.pages(json.loads(module.RESULTS.read_text()))
    assert {path: path.read_text() for path in pages} == pages


def test_every_score_of_every_peer_is_explained() -> None:
    tables = json.loads(peer_metrics.RESULTS.read_text())["peers"]
    assert [row["metric"] for rows in tables.values() for row in rows if row["verdict"] == "unexplained"] == []
    assert list(tables) == list(peer_metrics.CASES) and all(tables.values())


def fails() -> Tensor:
    raise ValueError("no such thing")


def differs(evidence: Proof | str) -> list[Reason]:
    return [Reason("differs", "", evidence, None)]


def wrong(evidence: Proof | str) -> list[Reason]:
    return [Reason("peer is wrong", "", evidence, None)]


@pytest.mark.parametrize(
    ("theirs", "options", "verdict"),
    [
        (ONE, {}, "equal"),
        (ONE + 1e-6, {}, "equal"),
        (TWO, {}, "unexplained"),
        (TWO, {"reasons": differs("")}, "unexplained"),  # without a proof
        (TWO, {"reasons": differs(is_theirs(lambda: ONE))}, "unexplained"),
        (TWO, {"reasons": differs(is_theirs(lambda: TWO))}, "differs"),
        (TWO, {"reasons": differs(is_theirs(fails))}, "unexplained"),
        (TWO, {"reasons": wrong(differ(lambda: ONE, lambda: ONE))}, "unexplained"),
        (TWO, {"reasons": wrong(differ(lambda: ONE, lambda: TWO))}, "peer is wrong"),
        (ONE, {"truth": [2.0]}, "unexplained"),  # ours is wrong
        (TWO, {"truth": [2.0], "reasons": wrong(is_theirs(lambda: TWO))}, "unexplained"),  # ours is wrong
        (torch.tensor([torch.nan]), {}, "unexplained"),
        (None, {}, "unexplained"),
        (None, {"reasons": wrong("no such")}, "peer is wrong"),
        (None, {"reasons": wrong("another")}, "unexplained"),
    ],
)
def test_a_verdict_needs_its_proof(theirs: Tensor | None, options: dict[str, Any], verdict: str) -> None:
    peer = fails if theirs is None else lambda: theirs
    case = Case("", peer, lambda: ONE, **options)
    assert peer_metrics.measure("captum", case)["verdict"] == verdict
