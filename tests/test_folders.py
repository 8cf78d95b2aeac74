"""Folders as people have them: hidden folders, splits, masks beside images, formats, links, large images."""

import os
import struct
import sys
import threading
import types
import unicodedata
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from tests.test_data_images import bomb, encoded

from sightline.data import Preprocess, images, load, load_whole, read_images
from sightline.data.hugging_face import parquet_files
from sightline.data.images import UnreadableImage, open_image, open_mask, quiet, read_mask
from sightline.recipe import Data

GRAY = Preprocess(size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
TURNS = (2, 3, 4, 5, 6, 7, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path_factory.mktemp("cache")))


def noise(number: int, size: tuple[int, int] = (16, 12)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8))


numbers = iter(range(10**6))


def fill(folder: Path, *classes: str, n: int = 5, suffix: str = ".png") -> Path:
    """Class folders, each with images that occur nowhere else."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            noise(next(numbers)).save(folder / name / f"{i}{suffix}")
    return folder


def loaded(folder: Path, **options):
    sets = load(Data(source=str(folder), **options))
    return sets, {split: len(images) for split, images in sets.items()}, sets["train"].notices


# the camera's orientation


def corner(orientation: int, kind: str) -> tuple[bytes, np.ndarray]:
    """A stored 64 x 32 image with a white and a green corner, and its upright pixels, turned by hand."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :16], pixels[:16, 16:32] = 255, (0, 255, 0)
    upright = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    options = {"quality": 100} if kind == "AVIF" else {"lossless": True} if kind == "WEBP" else {}
    return encoded(Image.fromarray(pixels), kind, exif=exif, **options), upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_every_orientation_of_every_format_is_applied_once(kind, orientation):
    file, upright = corner(orientation, kind)
    height, width = upright.shape[:2]
    pixels, size = open_image(file, (height, width))
    assert size == (height, width)
    assert np.abs(pixels.astype(int) - upright).mean() < 6
    assert open_image(file, 512)[0].shape == (height, width, 3)
    if kind in ("PNG", "TIFF"):
        assert (open_mask(file, (height, width), (height, width)) == upright.any(-1)).all()


def test_a_broken_orientation_tag_does_not_spoil_the_image():
    file = encoded(noise(0), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert open_image(file, 99)[0].shape == (12, 16, 3)


# values


def white_is_zero(bits: int, content: bytes) -> bytes:
    """A TIFF of 8 x 8 pixels whose white is 0, or of 12 bits whose black is."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: int(bits == 12), 273: 8, 277: 1, 278: 8, 279: len(content)}
    directory = b"".join(
        key.to_bytes(2, "little") + b"\3\0\1\0\0\0" + v.to_bytes(4, "little") for key, v in tags.items()
    )
    start = (8 + len(content)).to_bytes(4, "little")
    return b"II*\0" + start + content + len(tags).to_bytes(2, "little") + directory + bytes(4)


def test_gray_of_twelve_and_sixteen_bits():
    def middle(file: bytes) -> int:
        return int(open_image(file, (8, 8))[0][4, 4, 0])

    assert middle(white_is_zero(8, bytes(64))) == middle(white_is_zero(16, bytes(128))) == 255
    assert middle(white_is_zero(16, b"\xff\xff" * 64)) == 0
    assert middle(white_is_zero(12, bytes([0x80, 0x08, 0x00]) * 32)) == 128  # 2056 of 4095, and 0


# hidden folders


def test_hidden_folders_are_never_read(tmp_path):
    fill(tmp_path, "cat", "dog", n=6)
    for hidden in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "__pycache__"):
        fill(tmp_path, f"cat/{hidden}", hidden, n=2)
    sets, sizes, notices = loaded(tmp_path)
    assert sizes == {"train": 9, "val": 1, "test": 2} and sets["train"].classes == ("cat", "dog") and notices == ()
    assert all(name.count("/") == 1 for images in sets.values() for name in images.names)
    assert len(read_images([tmp_path], GRAY)) == 12


def test_hidden_parquet_files_are_not_read(tmp_path):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("a.parquet", "._a.parquet", ".ipynb_checkpoints/a-checkpoint.parquet"):
        (tmp_path / name).write_bytes(b"")
    assert parquet_files(str(tmp_path)) == [tmp_path / "a.parquet"]


# folders of splits


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train_images", "test_images"),
        ("Training", "Testing"),
        ("TrainSet", "TestSet"),
        ("train_v1", "test_v2"),
        ("train2017", "test2017"),
        ("images-train", "images-test"),
        ("train/images", "test/images"),
        ("train/train", "test"),
        ("archive/train", "archive/test"),
        ("archive/chest_xray/train", "archive/chest_xray/test"),
    ],
)
def test_folders_of_splits_are_no_classes(train, test, tmp_path):
    fill(tmp_path / train, "a", "b", n=10)
    fill(tmp_path / test, "a", "b", n=3)
    sets, sizes, notices = loaded(tmp_path)
    assert sets["train"].classes == ("a", "b") and sizes == {"train": 18, "val": 2, "test": 6}
    assert all(name.startswith(test.split("/")[0]) for name in sets["test"].names)
    is_plain = train.split("/")[0].lower() in ("train", "training")
    assert is_plain != any("taken as splits" in n or "the only folder in" in n for n in notices)


def test_folders_beside_the_splits_are_named(tmp_path):
    fill(tmp_path / "seg_train" / "seg_train", "a", "b")
    fill(tmp_path / "seg_test" / "seg_test", "a", "b")
    fill(tmp_path / "seg_pred", "seg_pred")
    assert loaded(tmp_path)[2] == (
        "these folders were taken as splits: seg_test (test), seg_train (train)",
        "folders beside the splits were not read, though they hold images: seg_pred",
    )


def test_splits_without_classes_are_refused(tmp_path):
    fill(tmp_path / "loose", "train_images", "test_images")
    with pytest.raises(
        ValueError, match=r"got test_images and train_images, which are splits and hold no class folders"
    ):
        load(Data(source=str(tmp_path / "loose")))
    fill(tmp_path / "kaggle", "train", "test1")
    with pytest.raises(ValueError, match="got test1 and train, which are splits and hold no class folders; sort"):
        load(Data(source=str(tmp_path / "kaggle")))
    for name in ("train_x", "test_x", "train_y", "test_y"):
        fill(tmp_path / "twice" / name, "a", "b")
    with pytest.raises(
        ValueError, match=r"expected one set of splits in .*, got test_x, train_x and test_y, train_y; move"
    ):
        load(Data(source=str(tmp_path / "twice")))


def test_the_only_folder_is_looked_into(tmp_path):
    fill(tmp_path / "PetImages", "cat", "dog")
    sets, sizes, notices = loaded(tmp_path)
    assert sets["train"].classes == ("cat", "dog") and sum(sizes.values()) == 10
    assert notices == (f"the images were looked for in PetImages, the only folder in {tmp_path}",)
    assert sets["test"].names[0].startswith("PetImages/")


def test_classes_that_sound_like_splits_stay_classes(tmp_path):
    sets, _, notices = loaded(fill(tmp_path, "bus", "train", "test_tube"))
    assert sets["train"].classes == ("bus", "test_tube", "train") and notices == ()


def test_two_forms_of_one_name_are_one_class(tmp_path):
    for split, form in (("train", "NFC"), ("test", "NFD")):
        fill(tmp_path / split, unicodedata.normalize(form, "Äpfel"), unicodedata.normalize(form, "Ñandú"))
    sets, sizes, _ = loaded(tmp_path)
    assert sets["train"].classes == ("Äpfel", "Ñandú") and sizes["test"] == 10
    assert sets["test"].labels.tolist() == [0] * 5 + [1] * 5


# formats


def test_whatever_pillow_reads_is_read_and_the_rest_is_listed(tmp_path):
    for kind in ("cat", "dog"):
        fill(tmp_path, kind, suffix=".png", n=4)
        for suffix, name in ((".jfif", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000"), ("", "PNG"), (".5", "BMP")):
            (tmp_path / kind / f"x{suffix}").write_bytes(encoded(noise(next(numbers)), name))
        (tmp_path / kind / "y.heic").write_bytes(b"ftypheic")
        (tmp_path / kind / "y.dcm").write_bytes(bytes(200))
        (tmp_path / kind / "LICENSE").write_text("no image")
        for other in ("notes.txt", "boxes.xml", "Thumbs.db", ".DS_Store"):
            (tmp_path / kind / other).write_text("x")
    sets, sizes, notices = loaded(tmp_path)
    assert sum(sizes.values()) == 18
    assert dict(sets["train"].skipped) == {
        f"{kind}/y{suffix}": reason
        for kind in ("cat", "dog")
        for suffix, reason in (
            (".dcm", "Pillow does not read .dcm; convert it to PNG or TIFF"),
            (".heic", "needs the package pillow-heif; pip install pillow-heif"),
        )
    }
    assert len(notices) == 1 and notices[0].startswith("8 files are no images and were not read: ")
    assert all(f"{suffix} (2)" in notices[0] for suffix in (".txt", ".xml", ".db", "no suffix"))
    alone = read_images([tmp_path / "cat"], GRAY)
    assert len(alone) == 9 and [reason for _, reason in alone.skipped] == [*dict(sets["train"].skipped).values()][:2]
    with pytest.raises(ValueError, match="Pillow does not read"):
        read_images([tmp_path / "cat"], GRAY, strict=True)


def test_heic_is_read_where_its_package_is(monkeypatch):
    def register() -> None:
        Image.register_extension("BMP", ".heic")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "EXTENSION", {**Image.registered_extensions()})
    images.formats.cache_clear()
    assert images.formats()[".heic"] == "BMP"
    images.formats.cache_clear()


def test_what_holds_heic_says_so_whatever_its_name():
    with pytest.raises(UnreadableImage, match="needs the package pillow-heif"):
        open_image(bytes(4) + b"ftypheic" + bytes(20), 9)


def test_a_class_of_unreadable_formats_says_why(tmp_path):
    fill(tmp_path, "cat")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"dog holds no image; .*; its 1\.heic: needs the package pillow-heif"):
        load(Data(source=str(tmp_path)))


def test_no_file_starts_another_program(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded(noise(0), "EPS"))
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        open_image(tmp_path / "x.jpg", 9)


# links


def test_linked_folders_are_read_once_and_loops_are_named(tmp_path):
    fill(tmp_path / "elsewhere", "more", n=3)
    fill(tmp_path / "data", "cat", "dog")
    for name, target in (("more", tmp_path / "elsewhere" / "more"), ("self", "."), ("up", ".."), ("gone", "nowhere")):
        os.symlink(target, tmp_path / "data" / "cat" / name)
    sets, sizes, _ = loaded(tmp_path / "data")
    assert sum(sizes.values()) == 13
    back = "a link back to a folder above it, or to one that was read already"
    assert dict(sets["train"].skipped) == {
        "cat/self": back,
        "cat/up": back,
        "cat/gone": "a link to a file that does not exist",
    }


# masks beside images


def disk(number: int, size: tuple[int, int] = (16, 12)) -> Image.Image:
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[number:, :8] = 255
    return Image.fromarray(mask)


@pytest.mark.parametrize("name", ["{} (1)_mask.png", "{} (1)_segmentation.png", "{} (1)_gt.bmp", "{} (1)_anno_1.tif"])
def test_masks_beside_images_are_no_images(name, tmp_path):
    for kind in ("benign", "malignant"):
        (tmp_path / kind).mkdir()
        for i in range(6):
            noise(next(numbers)).save(tmp_path / kind / f"{i} (1).png")
            disk(i).save(tmp_path / kind / name.format(i))
    sets, sizes, notices = loaded(tmp_path)
    assert sizes == {"train": 9, "val": 1, "test": 2} and sets["train"].has_masks
    first = name.format(0)
    assert notices == (f"12 files such as {first} in benign are masks of images and were read as masks",)
    batch = sets["train"].batch(range(9))
    for mask, image in zip(batch.masks[:, 0], batch.names, strict=True):
        top = int(Path(image).name[0])
        assert mask[:, 8:].sum() == 0
        assert abs(mask[:, :8].float().mean().item() - (12 - top) / 12) < 0.1
    apart = read_images([tmp_path], GRAY)
    assert len(apart) == 12 and apart.notices == notices


def test_several_masks_of_an_image_are_united(tmp_path):
    fill(tmp_path, "a", "b")
    for kind in ("a", "b"):
        for i in range(5):
            for number, box in (("", (0, 0, 4, 12)), ("_1", (12, 0, 16, 12))):
                mask = Image.new("1", (16, 12))
                mask.paste(1, box)
                mask.save(tmp_path / kind / f"{i}_mask{number}.png")
    sets, sizes, _ = loaded(tmp_path, size=16)
    assert sum(sizes.values()) == 10
    assert sets["test"].batch([0]).masks[0, 0].any(0).tolist() == [True] * 4 + [False] * 8 + [True] * 4


@pytest.mark.parametrize(("image", "mask"), [("{}/images", "{}/masks"), ("images/{}", "masks/{}"), ("{}", "{}/mask")])
@pytest.mark.parametrize("same_size", [True, False])
def test_folders_of_masks(image, mask, same_size, tmp_path):
    for kind in ("a", "b"):
        fill(tmp_path, image.format(kind), n=6)
        (tmp_path / mask.format(kind)).mkdir(parents=True)
        for i in range(6):
            disk(i, (16, 12) if same_size else (8, 8)).save(tmp_path / mask.format(kind) / f"{i}.png")
    sets, sizes, notices = loaded(tmp_path)
    assert sum(sizes.values()) == 12 and sets["train"].classes == ("a", "b") and sets["train"].has_masks == same_size
    assert len(notices) == 1 and notices[0].startswith("12 files such as 0.png in ")
    assert notices[0].endswith("read as masks" if same_size else "their sizes differ from those of the images")


def test_a_folder_of_masks_is_no_class(tmp_path):
    fill(tmp_path, "train", "train_masks", n=0)
    for i in range(6):
        noise(next(numbers)).save(tmp_path / "train" / f"{i}.png")
        disk(i).save(tmp_path / "train_masks" / f"{i}_mask.gif")
    with pytest.raises(ValueError, match="expected at least two classes to tell apart, got only 'train'"):
        load(Data(source=str(tmp_path)))


def test_photographs_that_are_named_like_masks_stay_images(tmp_path):
    fill(tmp_path, "mask", "none", n=6)
    for i in range(6):
        noise(next(numbers)).save(tmp_path / "mask" / f"{i}_mask.png")  # no mask: many values
        disk(i).save(tmp_path / "none" / f"x{i}_mask.png")  # no partner
    sets, sizes, notices = loaded(tmp_path)
    assert sum(sizes.values()) == 24 and notices == () and not sets["train"].has_masks


# large images


def test_large_images_are_refused_by_pixels_to_decode(tmp_path):
    fill(tmp_path, "a", "b")
    noise(0, (400, 300)).save(tmp_path / "a" / "large.png")
    noise(0, (1600, 1200)).save(tmp_path / "a" / "large.jpg", quality=30)
    noise(0, (1600, 1200)).save(tmp_path / "a" / "whole.jpg", quality=30, progressive=True)
    sets, sizes, _ = loaded(tmp_path, max_pixels=100_000)
    reason = "expected at most 100,000 pixels to decode, got {}; scale it down or raise data.max_pixels"
    skipped = dict(s for images in sets.values() for s in images.skipped)
    assert skipped["a/large.png"] == reason.format("120,000") and sum(sizes.values()) == 12
    monkeypatched = read_images([tmp_path / "a"], GRAY, max_pixels=100_000)
    assert [Path(name).name for name, _ in monkeypatched.skipped] == ["large.png"]
    whole = load_whole(Data(source=str(tmp_path), max_pixels=100_000_000))
    assert len(whole["test"]) == 13


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_large_images_come_out_as_small_ones_do(kind, mode, monkeypatch):
    across = np.linspace(0, 255, 403, dtype=np.uint8)[None, :, None] * np.ones((301, 1, 4), np.uint8)
    across[..., 3] = 255
    across[:, :, 1] = np.linspace(0, 255, 301, dtype=np.uint8)[:, None]
    file = encoded(Image.fromarray(across).convert(mode), kind)
    plain, size = open_image(file, (20, 24))
    monkeypatch.setattr(images, "LARGE", 1000)
    bands, large_size = open_image(file, (20, 24))
    assert size == large_size == (301, 403)
    assert np.abs(plain.astype(int) - bands).max() <= 3


def test_a_large_tiff_is_read_from_its_smaller_copy(monkeypatch):
    large, small = Image.new("RGB", (400, 300), "red"), Image.new("RGB", (100, 75), "blue")
    small.encoderinfo = {"tiffinfo": {254: 1}}
    file = encoded(large, "TIFF", save_all=True, append_images=[small])
    assert open_image(file, (20, 24))[0][0, 0].tolist() == [255, 0, 0]
    monkeypatch.setattr(images, "LARGE", 1000)
    assert open_image(file, (20, 24))[1] == (300, 400)
    assert open_image(file, (20, 24))[0][0, 0].tolist() == [0, 0, 255]
    assert open_image(file, (60, 60))[0][0, 0].tolist() == [255, 0, 0]


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(images, "LARGE", 100)
    running, most = [], []
    plain = images._in_bands

    def slow(*args):
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.01)
        running.pop()
        return plain(*args)

    monkeypatch.setattr(images, "_in_bands", slow)
    file = encoded(noise(0))
    threads = [threading.Thread(target=open_image, args=(file, 8)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


def test_a_mask_that_is_a_bomb_is_refused():
    with quiet(), pytest.raises(UnreadableImage, match="expected at most 89,478,485 pixels to decode, got 100,000,000"):
        open_mask(bomb(10_000), (8, 8), (8, 8))


def progressive(image: Image.Image) -> bytes:
    return encoded(image, "JPEG", progressive=True)


def see_through(width: int, height: int) -> Image.Image:
    shades = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGBA", [shades] * 4)


def turned_tiff(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "TIFF", exif=exif)


@pytest.mark.parametrize(
    ("file", "each"),
    [
        (encoded(noise(0, (64, 48))), 4),
        (encoded(noise(0, (64, 48)), "WEBP"), 16),
        (encoded(noise(0, (64, 48)), "AVIF"), 10),
        (encoded(see_through(64, 48), "AVIF"), 14),
        (turned_tiff(noise(0, (64, 48))), 8),
        (encoded(noise(0, (64, 48)), "TIFF"), 8),
        (encoded(noise(0, (64, 48)), "TIFF", tiffinfo={278: 16}), 4),
        (progressive(noise(0, (64, 48))), 6 + 4),
        (progressive(noise(0, (64, 48)).convert("CMYK")), 8 + 4),
    ],
)
def test_memory_is_bounded_whatever_the_decoder_takes(file, each, monkeypatch):
    monkeypatch.setattr(images, "_MOST_BYTES", each * 64 * 48)
    assert open_image(file, 64)[0].size == 3 * 64 * 48
    assert read_mask(file).values.size == 64 * 48
    monkeypatch.setattr(images, "_MOST_BYTES", each * 64 * 48 - 1)
    reason = (
        rf"expected at most 3,071 pixels, since the \w+ decoder takes {each} bytes for each, got 3,072; scale it down"
    )
    with pytest.raises(UnreadableImage, match=reason):
        open_image(file, 64)
    with pytest.raises(UnreadableImage, match=f"its mask cannot be read: {reason}"):
        read_mask(file)


def test_a_draft_of_a_progressive_image_takes_less(monkeypatch):
    file = progressive(noise(0, (640, 480)))
    monkeypatch.setattr(images, "LARGE", 1000)
    monkeypatch.setattr(images, "_MOST_BYTES", int(6.3 * 640 * 480))
    assert open_image(file, 40)[0].shape == (30, 40, 3)
    with pytest.raises(UnreadableImage, match="the JPEG decoder takes 10 bytes for each"):
        open_image(file, 640)


@pytest.mark.parametrize(
    "file",
    [b"qoif" + struct.pack(">IIBB", 4000, 3000, 3, 0), b"P3 4000 3000 255 1 2 3", b"P2 4000 3000 255 1 2 3"],
    ids=["qoi", "plain color", "plain gray"],
)
def test_large_images_with_a_decoder_in_python_are_refused(file):
    with pytest.raises(
        UnreadableImage, match=r"expected at most 8,388,608 pixels, since the \w+ decoder is slow, got 12,0"
    ):
        open_image(file, 8)


def test_a_thin_jpeg_2000_that_cannot_be_halved_counts_three_times(monkeypatch):
    file = encoded(noise(0, (640, 20)), "JPEG2000")
    monkeypatch.setattr(images, "LARGE", 1000)
    with pytest.raises(UnreadableImage, match="expected at most 20,000 pixels to decode, got 38,400"):
        open_image(file, (16, 16), 20_000)
    assert open_image(file, (4, 4), 20_000)[0].shape == (4, 4, 3)
    with pytest.raises(
        UnreadableImage, match="mask cannot be read: expected at most 20,000 pixels to decode, got 38,4"
    ):
        read_mask(file, 20_000)


@pytest.mark.parametrize("is_cut", [False, True])
def test_memory_of_a_large_image_goes_back_to_the_system(is_cut, monkeypatch):
    """Pillow's blocks of 16 MB stay with the process when they are freed; those of 64 MB do not."""
    monkeypatch.setattr(images, "LARGE", 1000)
    sizes, usual = [], Image.core.get_block_size()
    plain = ImageFile.ImageFile.load

    def load(image):
        sizes.append(Image.core.get_block_size())
        return plain(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    file = encoded(noise(0, (64, 48)))
    with pytest.raises(UnreadableImage, match="truncated") if is_cut else nullcontext():
        open_image(file[: len(file) // 2] if is_cut else file, 8)
    assert min(sizes) >= 2**26 and Image.core.get_block_size() == usual
