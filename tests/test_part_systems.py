"""benchmarks/part_systems.py: its figures by hand, and a tiny run that continues."""

import json

import part_systems
import pytest
import torch
from part_systems import figures, main, owners, shares, windows


def test_windows_are_the_pixels_of_the_crops():
    positions = torch.zeros(2, 2, 4, 4)
    positions[0, 0, 0, 0] = positions[0, 1, 3, 3] = positions[1, 0, 1, 2] = positions[1, 1, 2, 0] = 1
    seen = windows(torch.zeros(2, 3, 16, 16), positions, 0.5)
    assert seen.shape == (2, 2, 16, 16) and (seen.sum((2, 3)) == 64).all()
    # cells of 4 px, windows of 8 px around their middles, kept inside the image
    for image, glimpse, top, left in ((0, 0, 0, 0), (0, 1, 8, 8), (1, 0, 2, 6), (1, 1, 6, 0)):
        assert seen[image, glimpse, top : top + 8, left : left + 8].all()


def test_figures_by_hand():
    first, second = torch.zeros(2, 2, 1, 4, 4, dtype=torch.bool)
    first[:, :, 0, :2], second[:, :, 3, :] = True, True
    maps = torch.zeros(2, 2, 4, 4)
    maps[0, 0, 3, 0], maps[0, 0, 1, 1] = 3, 1  # 3/4 on the second part, nothing on the first
    maps[0, 1, 0, 0] = 2  # all on the first
    maps[1, 0, 3], maps[1, 1, 3, 2] = 1, 1  # both on the second
    energy = shares(maps, first, second)
    assert energy.tolist() == [[[0, 0.75], [1, 0]], [[0, 1], [0, 1]]]
    order = owners(energy)
    assert order == (1, 0)
    found = {name: values.tolist() for name, values in figures(energy, maps, order).items()}
    assert found["own part"] == [0.875, 0.5] and found["either part"] == [0.875, 1] and found["apart"] == [1, 0]
    assert found["overlap"] == pytest.approx([0, 0.5])


@pytest.mark.usefixtures("few_validation_images")
def test_a_tiny_run_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(part_systems, "FILE", tmp_path / "part_systems.json")
    tiny = ["data.train_size=36", "data.test_size=18", "optim.epochs=2", "optim.batch_size=18"]
    options = [*(word for pair in tiny for word in ("--set", pair)), "--out", str(tmp_path / "runs")]
    rows = "no attention;MA-CNN;FCAN;MG-CNN"
    main(["--rows", rows, "--seeds", "0", *options])
    cells = json.loads((tmp_path / "part_systems.json").read_text())["cells"]
    assert [*cells] == rows.split(";") and all(0 < cell["0"]["chance"] < 0.2 for cell in cells.values())
    assert (
        all(0 <= cells[row]["0"]["apart"]["value"] <= 1 for row in [*cells][1:])
        and "apart" not in cells["no attention"]["0"]
    )
    printed = capsys.readouterr().out
    assert printed.count("seed 0:") == 4 and "| MA-CNN | 1 | " in printed
    main(["--rows", rows, "--seeds", "0", *options])
    assert "seed 0:" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--rows", "MA-CNN", "--seeds", "1"])  # other settings than those of the file
    with pytest.raises(SystemExit):
        main(["--rows", "x"])
