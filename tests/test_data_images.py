import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from sightline.data import Preprocess
from sightline.data.decoded import Decoder
from sightline.data.images import UnreadableImage, open_image, open_mask, open_picture, quiet, window
from sightline.data.marks import Record

PHOTOS = Path(__file__).parent.parent / "examples" / "photos"

RED = (200, 30, 10)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def middle(file: bytes | Path, size: int = 8) -> tuple[int, ...]:
    return tuple(int(v) for v in open_image(file, (size, size))[0][size // 2, size // 2])


def test_the_whole_image_is_resized_and_its_size_told():
    image = np.zeros((10, 20, 3), np.uint8)
    image[:, 10:] = 255
    pixels, stored = open_image(encoded(Image.fromarray(image)), (5, 4))
    assert stored == (10, 20) and pixels.shape == (5, 4, 3) and pixels.dtype == np.uint8
    assert pixels[:, 0].max() == 0 and pixels[:, 3].min() == 255


def test_resizing_is_antialiased():
    stripes = np.tile(np.array([0, 255], np.uint8), (32, 16))
    pixels, _ = open_image(encoded(Image.fromarray(stripes)), (4, 4))
    assert abs(pixels.astype(int) - 127).max() < 16


def test_orientation_of_the_camera_is_applied():
    image = Image.new("RGB", (8, 4), "black")
    image.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise: what was left is on top
    for kind in ("PNG", "JPEG"):
        pixels, stored = open_image(encoded(image, kind, exif=exif), (8, 4))
        assert stored == (8, 4)
        assert pixels[:3].min() > 240 and pixels[-3:].max() < 15
    mask = open_mask(encoded(image, exif=exif), (8, 4), (8, 4))
    assert mask[:4].all() and not mask[4:].any()


def test_gray_palette_one_bit_and_cmyk():
    assert middle(encoded(Image.new("L", (8, 8), 77))) == (77, 77, 77)
    assert middle(encoded(Image.new("RGB", (8, 8), RED).quantize(4))) == RED
    assert middle(encoded(Image.new("1", (8, 8), 1))) == (255, 255, 255)
    red, green, blue = middle(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 240 and green < 15 and blue < 15


def test_sixteen_bits_are_scaled_to_eight():
    for kind in ("PNG", "TIFF"):
        for value, expected in ((65535, 255), (32896, 128), (257, 1), (0, 0)):
            gray = Image.fromarray(np.full((8, 8), value, np.uint16))
            assert middle(encoded(gray, kind)) == (expected,) * 3


def test_floating_point_white_is_one_and_other_ranges_are_refused():
    assert middle(encoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF")) == (128, 128, 128)
    with pytest.raises(UnreadableImage, match="expected floating-point values in 0 to 1, got -3 to -3"):
        middle(encoded(Image.fromarray(np.full((8, 8), -3, np.float32)), "TIFF"))
    with pytest.raises(UnreadableImage, match="expected 16-bit values in 0 to 65535, got 70000 to 70000"):
        middle(encoded(Image.fromarray(np.full((8, 8), 70000, np.int32)), "TIFF"))


def test_what_is_transparent_lies_on_white():
    assert middle(encoded(Image.new("RGBA", (8, 8), (*RED, 0)))) == (255, 255, 255)
    assert middle(encoded(Image.new("LA", (8, 8), (0, 128)))) == (127, 127, 127)
    palette = Image.new("P", (8, 8), 0)
    assert middle(encoded(palette, transparency=0)) == (255, 255, 255)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        red, _, blue = middle(encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True))
        assert red > 240 and blue < 15


def test_one_pixel():
    pixels, stored = open_image(encoded(Image.new("RGB", (1, 1), RED)), (3, 3))
    assert stored == (1, 1) and (pixels == RED).all()


def test_a_large_jpeg_is_decoded_reduced_with_the_same_result():
    smooth = np.linspace(0, 255, 800, dtype=np.uint8)[None, :, None] * np.ones((600, 1, 3), np.uint8)
    file = encoded(Image.fromarray(smooth), "JPEG", quality=95)
    reduced, stored = open_image(file, (32, 32))
    with Image.open(io.BytesIO(file)) as image:
        whole = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert stored == (600, 800)
    assert abs(reduced.astype(int) - whole).max() <= 3


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text file", "not an image of a known format"),
        (encoded(Image.new("RGB", (64, 64), RED), "JPEG")[:-40], "truncated"),
        (encoded(Image.effect_noise((64, 64), 50))[:1000], "truncated|broken"),
        (bomb(30_000), "refused as a decompression bomb, more than 178,956,970 pixels; scale it down"),
    ],
    ids=["empty", "text", "jpeg", "png", "bomb"],
)
def test_unusable_files_are_refused_with_a_reason(file, reason, tmp_path):
    with pytest.raises(UnreadableImage, match=reason) as from_bytes:
        open_image(file, (8, 8))
    assert "\n" not in str(from_bytes.value) and "0x" not in str(from_bytes.value)
    (tmp_path / "image.jpg").write_bytes(file)
    with pytest.raises(UnreadableImage, match=reason):
        open_image(tmp_path / "image.jpg", (8, 8))


def test_a_missing_file():
    with pytest.raises(UnreadableImage, match="No such file"):
        open_image(Path("nowhere.jpg"), (8, 8))


def test_a_bomb_takes_no_memory():
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(UnreadableImage, match="bomb"):
        open_image(bomb(30_000), (8, 8))
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_large_images_short_of_a_bomb_do_not_warn():
    with pytest.raises(UnreadableImage, match="exceeds limit"):
        open_image(bomb(10_000), (8, 8))  # warnings are errors here
    with quiet(), pytest.raises(UnreadableImage, match=r"truncated|broken"):
        open_image(bomb(10_000), (8, 8), max_pixels=100_000_000)
    with quiet(), pytest.raises(UnreadableImage, match="expected at most 89,478,485 pixels to decode, got 100,000,000"):
        open_image(bomb(10_000), (8, 8))


def test_quiet_gives_the_filters_back():
    before = list(warnings.filters)
    with quiet():
        pass
    assert warnings.filters == before


def test_masks_keep_pixels_that_are_half_covered():
    mask = np.zeros((4, 8), np.uint8)
    mask[:, :3] = 2  # an index, not a gray value
    assert open_mask(encoded(Image.fromarray(mask)), (2, 4), (4, 8)).tolist() == [[True, True, False, False]] * 2
    assert open_mask(mask.tolist(), (2, 4), (4, 8)).tolist() == [[True, True, False, False]] * 2


def test_masks_in_color_and_with_alpha():
    for mode, black, white in (("RGB", (0, 0, 0), (0, 9, 0)), ("RGBA", (0, 0, 0, 255), (1, 1, 1, 255)), ("1", 0, 1)):
        mask = Image.new(mode, (4, 4), black)
        mask.paste(white, (0, 0, 2, 4))
        assert open_mask(encoded(mask), (4, 4), (4, 4)).tolist() == [[True, True, False, False]] * 4


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(UnreadableImage, match="expected a mask as large as its image, 8 x 6 pixels, got 4 x 4"):
        open_mask(encoded(Image.new("L", (4, 4))), (3, 3), (6, 8))


@pytest.mark.parametrize("shape", [(300, 451), (512, 200), (224, 224), (50, 40), (257, 1023)])
@pytest.mark.parametrize(
    ("size", "crop", "interpolation"),
    [(224, 0.875, "bicubic"), (224, 224 / 232, "bilinear"), (288, 0.9, "bicubic"), (64, 1.0, "bicubic")],
)
def test_the_middle_is_cut_out_as_timm_does(shape, size, crop, interpolation):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    pixels, whole = open_image(encoded(photo), (size, size), crop=crop, interpolation=interpolation)
    transform = timm.data.create_transform(
        (3, size, size), interpolation=interpolation, crop_pct=crop, use_prefetcher=True
    )
    assert whole == shape and np.array_equal(pixels, np.asarray(transform(photo)).transpose(1, 2, 0))


def test_the_middle_of_a_very_long_image_takes_no_more_memory_than_the_image():
    stripe = np.zeros((2, 200_000, 3), np.uint8)
    stripe[:, 99_999:100_001] = 255
    assert open_image(encoded(Image.fromarray(stripe)), (8, 8), crop=1.0)[0].shape == (8, 8, 3)
    assert window((8, 8), 1.0, (2, 200_000)) == (99_999.0, 0.0, 100_001.0, 2.0)


@pytest.mark.parametrize(("size", "reduced"), [((1600, 2400), (400, 600)), ((6000, 3000), (750, 375))])
def test_of_a_large_image_the_same_middle_is_cut_out(size, reduced):
    photo = Image.open(PHOTOS / "cat.jpg").resize((size[1], size[0]))
    large, small = encoded(photo, "JPEG", quality=95), encoded(photo.resize((reduced[1], reduced[0])))
    pixels = [open_image(file, (96, 96), crop=0.8)[0].astype(float) for file in (large, small)]
    shown = [open_picture(file, (96, 96), 96, crop=0.8)[1].astype(float) for file in (large, small)]
    for one, other in (pixels, shown):
        assert np.abs(one - other).mean() < 2


def test_masks_and_boxes_follow_the_middle():
    image = np.zeros((80, 120, 3), np.uint8)
    image[30:50, 50:90], image[0:10, 0:10] = 255, 255  # the second is cut away
    record = Record(
        encoded(Image.fromarray(image)), encoded(Image.fromarray(image[..., 0])), [[50, 30, 90, 50], [0, 0, 10, 10]]
    )
    sample = Decoder(size=(40, 50), has_masks=True, has_boxes=True, crop=0.5).decode(record)
    assert window((40, 50), 0.5, (80, 120)) == (35.0, 20.0, 85.0, 60.0)
    assert sample.boxes.tolist() == [[15.0, 10.0, 50.0, 30.0]]
    expected = np.zeros((40, 50), bool)
    expected[10:30, 15:] = True
    assert np.array_equal(sample.mask, expected) and np.array_equal(sample.image[0] > 127, expected)


def test_the_camera_turned_an_image_whose_middle_is_cut_out():
    upright = Image.open(PHOTOS / "cat.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    one, other = (open_image(file, (32, 32), crop=0.8)[0] for file in (turned, encoded(upright)))
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"crop": 0.0}, "expected crop as a fraction above 0 and up to 1, or None, got 0.0"),
        ({"crop": 1.5}, "expected crop as a fraction above 0 and up to 1, or None, got 1.5"),
    ],
)
def test_a_preprocessing_that_is_none(option, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **option)
