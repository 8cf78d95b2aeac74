"""The pages under examples/, with fewer steps: they run, and what they say is true."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def test_attention_toy(tmp_path, capsys):
    import attention_toy

    found = attention_toy.main(["--steps", "80", "--out", str(tmp_path / "toy.png")])
    assert found["accuracy"] > 0.9 and found["energy"] > 0.8
    assert found["energy before"] == pytest.approx(found["area"], abs=0.02)
    assert (tmp_path / "toy.png").stat().st_size > 10_000 and "after training" in capsys.readouterr().out


def test_spatial_and_channel(tmp_path):
    import spatial_and_channel

    found = spatial_and_channel.main(["--steps", "60", "--out", str(tmp_path / "both.png")])
    assert found["accuracy"] > 0.9 and found["energy"] > 1.5 * found["area"]
    assert found["shift"] < 1e-5 and found["channel"] < 1e-5
    assert (tmp_path / "both.png").is_file()
