"""The pages that a build of the documentation writes: everything in a registry has one, whatever is added."""

import doctest
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference_pages
import torch

from sightline.attention import ATTENTION
from sightline.explainers import EXPLAINERS, Explainer
from sightline.metrics import METRICS, MOSAIC_METRICS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return dict(reference_pages.all_pages())


def test_every_entry_of_a_registry_has_a_page_and_a_row(pages: dict[str, str]) -> None:
    for kind, registry in (("explainers", EXPLAINERS), ("metrics", METRICS | MOSAIC_METRICS), ("attention", ATTENTION)):
        overview = pages[f"{kind}/index.md"]
        for name in registry:
            page = pages[f"{kind}/{name}.md"]
            assert re.match(rf"# .+: `{name}`\n\n[^|#`]", page), name
            assert "in code\n\n```python\n" in page, name
            assert f"| [`{name}`]({name}.md) | " in overview, name
        assert overview.count("](") == len(registry)


def test_a_page_says_what_the_registry_and_the_hand_written_pages_say(pages: dict[str, str]) -> None:
    page = pages["explainers/finer_cam.md"]
    assert "# Finer-CAM: `finer_cam`" in page
    assert "- *what it does not say:* the evidence that both share, which may be most of it" in page
    assert "`runner_up_gradients`: (b, t, k, h, w) gradient of the runner-up class's logit" in page
    assert "| `gamma` | `1.0` |" in page and "partial(sl.explainers.finer_cam, gamma=1.0)" in page
    assert "[2501.11309](https://arxiv.org/abs/2501.11309)" in page
    assert "def finer_cam(" in page and "def _weighted(" in page and '"""' not in page
    assert "| **Adds up** | the map should sum" in pages["explainers/lrp.md"]
    assert "many passes" in pages["explainers/rise.md"] and "many passes" not in page
    assert "| **Depends on the class** | no" in pages["explainers/eigen_cam.md"]
    assert "nothing: it never looks at the model" in pages["explainers/edge_map.md"]

    page = pages["metrics/energy_in_mask.md"]
    assert "| **Better** | higher |" in page and "| **Chance** | the mask's area |" in page
    assert "reads the map only" in page and "`sl.metrics.EnergyInMask`" in page
    assert "each image is explained 2 times" in pages["metrics/random_logit.md"]

    page = pages["attention/se.md"]
    assert "| **Parameters** | 8,464 for 256 channels |" in page and "gating" in page
    assert "pooling" in pages["attention/brnpa.md"]


def test_names_in_other_libraries_are_collected(pages: dict[str, str]) -> None:
    page = pages["elsewhere.md"]
    assert "| `LayerGradCam` | [`grad_cam`](explainers/grad_cam.md) |" in page
    assert "| `RelevanceMassAccuracy` | [`energy_in_mask`](metrics/energy_in_mask.md) |" in page
    assert "| `SEModule` | [`se`](attention/se.md) |" in page


def test_signatures_show_shapes(pages: dict[str, str]) -> None:
    assert "(model: nn.Module, images: Images, targets: Targets=None" in pages["api/sightline.md"]
    assert 'dict[str, Float[Tensor, "b _ _ _"]]' in pages["api/sightline.md"]
    assert "{py:class} sl.recipe.Optim" in pages["api/recipe.md"]
    momentum = "{py:attribute} sl.recipe.Optim.momentum\n:type: float\n:value: 0.9\n\nMomentum of SGD.\n"
    assert momentum in pages["api/recipe.md"]


def test_links_of_pages_outside_docs_lead_to_pages_of_the_site(pages: dict[str, str]) -> None:
    assert "](../../explanation/maps.md)" in pages["contributing.md"]
    assert "](benchmarks.md)" in pages["contributing.md"]
    page = ROOT / "docs/howto/training.md"
    text = "[a](../../src/sightline/recipe.py) [b](https://x.y) [c](#d)\n```\n[e](../../Makefile)\n```\n"
    shown = "[a](../reference/generated/files/src/sightline/recipe.py.md) [b](https://x.y) [c](#d)"
    assert reference_pages.relinked(text, page, page) == shown + text[text.index("\n") :]
    assert "files/src/sightline/recipe.py.md" in pages


def test_a_new_explainer_has_its_page() -> None:
    @partial(Explainer, is_signed=True)
    def loudest(activations: torch.Tensor, targets: torch.Tensor, power: float = 2.0) -> torch.Tensor:
        """The largest activation.

        Elsewhere: `Loud` (noise).
        """
        return activations.amax(1, keepdim=True) ** power

    page = reference_pages.explainer_page("loudest", loudest)
    assert page.startswith("# Loudest: `loudest`\n\nThe largest activation.\n\n**Elsewhere:** `Loud` (noise).")
    assert "negative values speak against the class" in page and "| `power` | `2.0` |" in page
    assert "    return activations.amax(1, keepdim=True) ** power" in page


def test_pages_that_are_gone_are_removed_and_equal_ones_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(reference_pages, "all_pages", lambda: [("a/b.md", "text")])
    (tmp_path / "old.md").write_text("")
    reference_pages.write(tmp_path)
    before = (tmp_path / "a/b.md").stat().st_mtime_ns
    reference_pages.write(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.md")] == ["b.md"]
    assert (tmp_path / "a/b.md").stat().st_mtime_ns == before


def test_examples() -> None:
    result = doctest.testmod(reference_pages)
    assert result.attempted == 2 and not result.failed
