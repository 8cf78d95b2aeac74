"""Small versions of benchmarks/serve_load.py and benchmarks/serve_fuzz.py."""

from collections.abc import Callable
from pathlib import Path

import httpx2
from benchmarks.serve_fuzz import KINDS, fuzz
from benchmarks.serve_load import load


def test_many_clients_get_the_maps_of_explain(address_of: Callable[..., str], run_folder: Path) -> None:
    row = load(address_of(waiting=2), run_folder, clients=6, requests=12)
    assert row["answered"] == 12 and row["other errors"] == 0 and row["differs"] == 0


def test_malformed_requests_are_refused(address_of: Callable[..., str], unchecked: None) -> None:
    address = address_of()
    rows = fuzz(address, 300, seed=1)
    assert sum(row["requests"] for row in rows) == 300 and len(rows) >= len(KINDS) - 1
    assert [fault for row in rows for fault in row["faults"]] == []
    assert httpx2.get(f"{address}/health").json()["status"] == "ok"
