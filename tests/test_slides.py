"""Slides are read as one would read the whole image, only in parts; tissue and tiles by values counted by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

openslide = pytest.importorskip("openslide")
tifffile = pytest.importorskip("tifffile")

from tests.slide_files import halved, ome, picture, pyramid  # noqa: E402

from sightline.data.slides import (  # noqa: E402
    UnreadableSlide,
    open_slide,
    sharpness,
    tiles_of,
    tissue_in,
    tissue_of,
)

RNG = np.random.default_rng(1)


def box(*ends: int) -> tuple[float, float, float, float]:
    left, top, right, bottom = map(float, ends)
    return left, top, right, bottom


WRITERS = {
    "pages, by OpenSlide": lambda path, pixels: pyramid(path / "a.tif", pixels),
    "OME, by tifffile": lambda path, pixels: ome(path / "a.ome.tif", pixels),
    "strips": lambda path, pixels: pyramid(path / "a.tif", pixels, 1, tile=None, rowsperstrip=50),
    "planes": lambda path, pixels: planes(path / "a.ome.tif", pixels),
}


def planes(path: Path, pixels: np.ndarray) -> Path:
    size = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(
        path, pixels.transpose(2, 0, 1), tile=(64, 64), photometric="rgb", planarconfig="separate",
        metadata={"axes": "SYX", **size}, ome=True,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("writer", WRITERS)
def test_regions_are_parts_of_the_whole(tmp_path: Path, writer: str) -> None:
    """At the full resolution bit for bit, between levels as the nearest finer level resized as a whole."""
    pixels = picture()
    with open_slide(WRITERS[writer](tmp_path, pixels)) as slide:
        assert slide.mpp == pytest.approx(0.5) and slide.size == (400, 600)
        np.testing.assert_array_equal(slide.region(box(37, 101, 197, 301), (200, 160)), pixels[101:301, 37:197])
        pyramid_scale = max(level.scale for level in slide.levels if level.scale <= 3)
        finer = Image.fromarray(halved(pixels, int(math.log2(pyramid_scale))))
        whole = np.asarray(
            finer.resize((200, 400 // 3), Image.Resampling.BILINEAR, (0, 0, finer.width, 400 // 3 * 3 / pyramid_scale))
        )
        part = slide.region(box(90, 60, 390, 360), (100, 100))
        assert np.abs(part.astype(int) - whole[20:120, 30:130]).max() <= 1  # places round differently by 1e-7


@pytest.mark.parametrize("writer", WRITERS)
def test_outside_is_white(tmp_path: Path, writer: str) -> None:
    pixels = picture()
    with open_slide(WRITERS[writer](tmp_path, pixels)) as slide:
        corner = slide.region(box(-50, 350, 50, 450), (100, 100))
        np.testing.assert_array_equal(corner[:50, 50:], pixels[350:, :50])
        assert (corner[50:] == 255).all() and (corner[:, :50] == 255).all()


def test_ome_levels_are_used(tmp_path: Path) -> None:
    """OpenSlide alone would read the full resolution only."""
    pixels = picture()
    file = ome(tmp_path / "a.ome.tif", pixels)
    assert openslide.OpenSlide(file).level_count == 1
    with open_slide(file) as slide:
        assert [level.scale for level in slide.levels] == [1, 2, 4]
        np.testing.assert_array_equal(slide.region(box(0, 0, 400, 400), (100, 100)), halved(pixels, 2)[:, :100])


def test_units_and_resolutions(tmp_path: Path) -> None:
    pixels = picture(100, 100)
    with open_slide(ome(tmp_path / "a.ome.tif", pixels, 1, 250.0, "nm")) as slide:
        assert slide.mpp == pytest.approx(0.25)
    unknown = pyramid(tmp_path / "b.tif", pixels, 1, None)
    with pytest.raises(
        UnreadableSlide, match=r"b.tif: expected the micrometers per pixel in the file, got none; give them: --mpp 0.5"
    ):
        open_slide(unknown)
    with open_slide(unknown, mpp=0.7) as slide:
        assert slide.mpp == 0.7
    with pytest.raises(UnreadableSlide, match=r"got 352.8, which is no microscope's"):
        open_slide(pyramid(tmp_path / "c.tif", pixels, 1, 352.8))
    with pytest.raises(ValueError, match=r"above 0, got 0"):
        open_slide(unknown, mpp=0.0)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_gray_of_16_bits(tmp_path: Path, photometric: str) -> None:
    pixels = RNG.integers(0, 2**16, (100, 100), dtype=np.uint16)
    file = tmp_path / "a.ome.tif"
    tifffile.imwrite(file, pixels, photometric=photometric, metadata={"axes": "YX", "PhysicalSizeX": 0.5}, ome=True)
    with open_slide(file) as slide:
        expected = (pixels >> 8).astype(np.uint8)
        expected = 255 - expected if photometric == "miniswhite" else expected
        np.testing.assert_array_equal(slide.region(box(0, 0, 100, 100), (100, 100)), np.stack([expected] * 3, 2))


def test_files_that_are_no_slides(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"no slide")
    with pytest.raises(UnreadableSlide, match=r"a.svs: expected a slide, got a file that is none: "):
        open_slide(tmp_path / "a.svs")
    (tmp_path / "empty.tif").write_bytes(b"")
    with pytest.raises(UnreadableSlide, match=r"empty.tif: expected a slide"):
        open_slide(tmp_path / "empty.tif")
    with pytest.raises(FileNotFoundError, match=r"no file .*there.svs"):
        open_slide(tmp_path / "there.svs")
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((8, 8), np.float32))
    with pytest.raises(
        UnreadableSlide, match=r"8 or 16 bits of gray or RGB are read, the file has YX \(8, 8\) float32"
    ):
        open_slide(tmp_path / "float.tif")


@pytest.mark.parametrize("writer", ["pages, by OpenSlide", "OME, by tifffile"])
def test_a_damaged_tile_does_not_spoil_the_others(tmp_path: Path, writer: str) -> None:
    pixels = picture()
    file = WRITERS[writer](tmp_path, pixels)
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        offset, count = page.dataoffsets[0], page.databytecounts[0]
    data = bytearray(file.read_bytes())
    data[offset : offset + count] = b"\xff" * count
    file.write_bytes(data)
    with open_slide(file) as slide:
        for _ in range(2):
            with pytest.raises(UnreadableSlide, match=f"^{file.name}: "):
                slide.region(box(0, 0, 64, 64), (64, 64))
            np.testing.assert_array_equal(slide.region(box(200, 200, 300, 300), (100, 100)), pixels[200:300, 200:300])


def test_overview_in_blocks_is_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks fit together, with and without coarse levels."""
    pixels = picture(640, 960)
    whole = np.asarray(Image.fromarray(pixels).resize((96, 64), Image.Resampling.BILINEAR))
    monkeypatch.setattr("sightline.data.slides._BLOCK", 128)
    with open_slide(pyramid(tmp_path / "a.tif", pixels, 1)) as slide:
        assert np.abs(slide.overview(5.0).astype(int) - whole).max() <= 1


def test_tissue_by_hand(tmp_path: Path) -> None:
    """A stained square, a stained speck and a hole: the speck goes, the hole is filled; glass alone is no tissue."""
    glass = np.full((2000, 3000, 3), 240, dtype=np.uint8)
    glass += RNG.integers(0, 4, glass.shape, dtype=np.uint8)
    with open_slide(pyramid(tmp_path / "glass.tif", glass, 1, 2.0)) as slide:
        assert not tissue_of(slide)[0].any()
    stained = glass.copy()
    stained[400:1600, 800:2000] = 190, 110, 170
    stained[800:840, 1000:1040] = 240  # 80 x 80 micrometers
    stained[100:140, 100:140] = 190, 110, 170
    with open_slide(pyramid(tmp_path / "stained.tif", stained, 1, 2.0)) as slide:
        mask, drawn = tissue_of(slide)
        assert mask.shape == drawn.shape[:2] == (500, 750)
        assert mask.sum() == 300 * 300 and mask[100:400, 200:500].all()
        assert tissue_of(slide, specks=0.0, holes=0.0)[0].sum() == 300 * 300 - 10 * 10 + 10 * 10


def test_black_around_the_scan_is_no_tissue() -> None:
    drawn = np.zeros((20, 20, 3), dtype=np.uint8)
    drawn[5:15, 5:15] = 240
    drawn[8:12, 8:12] = 190, 110, 170
    assert tissue_in(drawn).sum() == 16


def test_tiles_by_hand(tmp_path: Path) -> None:
    """Squares of 100 px at twice the slide's micrometers are 200 px of it; 50 px of overlap are steps of 100."""
    with open_slide(pyramid(tmp_path / "a.tif", picture(), 1)) as slide:
        everywhere = np.ones((4, 6), dtype=bool)
        tiles = tiles_of(slide, everywhere, size=100, mpp=1.0)
        assert tiles.extent == 200
        assert tiles.corners.tolist() == [[0, 0], [200, 0], [400, 0], [0, 200], [200, 200], [400, 200]]
        assert tiles.places.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
        assert tiles.tissue.tolist() == [1.0] * 6 and tiles.box(4) == (200, 200, 400, 400)
        assert len(tiles_of(slide, everywhere, size=100, mpp=1.0, overlap=50)) == 3 * 5
        half = np.zeros((4, 6), dtype=bool)
        half[:, :3] = True
        shares = tiles_of(slide, half, size=100, mpp=1.0, least=0.0)
        assert shares.tissue.tolist() == [1.0, 0.5, 1.0, 0.5]
        assert len(tiles_of(slide, half, size=100, mpp=1.0, least=0.6)) == 2
        assert len(tiles_of(slide, everywhere, size=1000, mpp=1.0)) == 0
        with pytest.raises(ValueError, match=r"expected tiles of 0.5 micrometers per pixel or more"):
            tiles_of(slide, everywhere, mpp=0.25)
        with pytest.raises(ValueError, match=r"overlap from 0 to below the tile's 100 pixels, got 100"):
            tiles_of(slide, everywhere, size=100, overlap=100)


def test_shares_are_exact_between_mask_pixels(tmp_path: Path) -> None:
    """Against a mask enlarged until tiles end on its pixels."""
    mask = RNG.random((8, 12)) < 0.5
    with open_slide(pyramid(tmp_path / "a.tif", picture(), 1)) as slide:
        tiles = tiles_of(slide, mask, size=70, mpp=0.5, overlap=13, least=0.0)
    large = np.repeat(np.repeat(mask, 50, 0), 50, 1)
    for index in range(len(tiles)):
        left, top, right, bottom = map(int, tiles.box(index))
        assert tiles.tissue[index] == pytest.approx(large[top:bottom, left:right].mean())


def test_blur_lowers_sharpness() -> None:
    pixels = picture(200, 200)
    blurred = np.asarray(Image.fromarray(pixels).resize((20, 20)).resize((200, 200), Image.Resampling.BICUBIC))
    edge = np.zeros((3, 3, 3), dtype=np.uint8)
    edge[1, 1] = 255
    assert sharpness(edge) == 0.0  # one value has no variance
    assert sharpness(blurred) < sharpness(pixels)


def test_places_count_from_the_scanned_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a slide with bounds, as QuPath has it; levels, tiles and pixels are those of the part."""
    pixels = picture()
    file = pyramid(tmp_path / "a.tif", pixels)

    class Bounded(openslide.OpenSlide):
        @property
        def properties(self) -> dict[str, str]:
            bounds = {"x": "120", "y": "40", "width": "400", "height": "320"}
            return dict(super().properties) | {f"openslide.bounds-{name}": value for name, value in bounds.items()}

    monkeypatch.setattr(openslide, "OpenSlide", Bounded)
    with open_slide(file) as slide:
        assert slide.size == (320, 400)
        assert [(level.height, level.width) for level in slide.levels] == [(320, 400), (160, 200), (80, 100)]
        np.testing.assert_array_equal(slide.region(box(10, 20, 110, 120), (100, 100)), pixels[60:160, 130:230])
        part = halved(pixels, 1)[20:180, 60:260]
        np.testing.assert_array_equal(slide.region(box(0, 0, 400, 320), (160, 200)), part)


def test_the_file_is_believed_where_it_tells_a_resolution(tmp_path: Path) -> None:
    """Slides with and without are read by one call, so what is given must not change those that tell it."""
    pixels = picture(100, 100)
    with open_slide(ome(tmp_path / "a.ome.tif", pixels, 1, 0.25), mpp=0.5) as slide:
        assert slide.mpp == pytest.approx(0.25)
    with open_slide(pyramid(tmp_path / "b.tif", pixels, 1, 352.8), mpp=0.7) as slide:
        assert slide.mpp == 0.7


def test_resolution_of_the_image_that_is_read(tmp_path: Path) -> None:
    """Not of a label in front of it; the mean, where the sides differ."""
    file = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(file, ome=True) as tiff:
        for side, x, y in [(64, 9.0, 9.0), (256, 0.4, 0.6)]:
            size = {"PhysicalSizeX": x, "PhysicalSizeY": y}
            tiff.write(picture(side, side), photometric="rgb", metadata={"axes": "YXS", **size})
    with open_slide(file) as slide:
        assert slide.size == (256, 256) and slide.mpp == pytest.approx(0.5)


def test_damaged_headers_are_told(tmp_path: Path) -> None:
    """Whatever byte of the tags is wrong, the slide is read or refused."""
    rng, pixels = np.random.default_rng(0), picture(200, 200)
    refused = 0
    for file in (
        pyramid(tmp_path / "a.tif", pixels, 1, tile=None, rowsperstrip=50),
        ome(tmp_path / "b.ome.tif", pixels, 2),
    ):
        whole = file.read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            data[rng.integers(0, 400)] = rng.integers(0, 256)
            data[rng.integers(len(data) - 3000, len(data))] = rng.integers(0, 256)
            file.write_bytes(data)
            try:
                with open_slide(file, 0.5) as slide:
                    slide.region(box(0, 0, 100, 100), (50, 50))
            except UnreadableSlide:
                refused += 1
    assert 20 < refused < 120


def test_a_picture_in_one_piece_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have to be decoded as a whole for each tile; a coarse level of this kind is left out."""
    pixels = picture()
    whole = pyramid(tmp_path / "a.tif", pixels, 1, tile=None, rowsperstrip=400)
    with open_slide(whole) as slide:
        assert slide.size == (400, 600)
    monkeypatch.setattr("sightline.data.slides._PART", 2**18)
    with pytest.raises(UnreadableSlide, match=r"strips of up to 0 MB are read, the file has one of 0 MB; write tiles"):
        open_slide(whole)
    with open_slide(ome(tmp_path / "b.ome.tif", pixels)) as slide:
        assert len(slide.levels) == 3


def test_noise_in_the_black_around_the_scan_is_no_tissue() -> None:
    drawn = RNG.integers(0, 12, (40, 40, 3), dtype=np.uint8)
    drawn[10:30, 10:30] = 240
    drawn[16:24, 16:24] = 190, 110, 170
    assert tissue_in(drawn).sum() == 64
