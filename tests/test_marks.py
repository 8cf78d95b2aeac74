"""Boxes and masks in the conventions that people have: read right, refused, or said."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image
from tests.test_data_sources import make_parquet, offline  # noqa: F401  (a fixture)

from sightline.data import load, load_stream, load_whole
from sightline.data.images import open_mask, read_mask
from sightline.data.marks import Record, settle
from sightline.recipe import Data
from sightline.recipe import load as load_recipe

WIDTH, HEIGHT = 60, 40
FLOATS = datasets.List(datasets.Value("float64"))
PLAIN = Data(source="cells")


def picture(size=(WIDTH, HEIGHT), seed=0) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


IMAGE = picture()


def records(*boxes) -> list[Record]:
    return [Record(IMAGE, None, box) for box in boxes]


def boxes_of(data: Data, tmp_path, boxes) -> dict[str, list[float]]:
    """Boxes of all images that could be read, by the number of the row, in pixels of the stored image."""
    file = make_parquet(tmp_path / "a.parquet", len(boxes), bbox=(boxes, FLOATS))  # images of 12 x 10 pixels
    images = load_whole(Data(source=str(file), size=120, boxes=data.boxes))["test"]
    batch = images.batch(range(len(images)))
    scale = np.array([12, 10, 12, 10]) / 120
    return {
        name[-6:].lstrip("0") or "0": (box[0].numpy() * scale).round(4).tolist()
        for name, box in zip(images.names, batch.boxes, strict=True)
    }


@pytest.mark.parametrize(
    ("form", "box"),
    [
        ("xyxy", [3, 1, 9, 5]),
        ("xywh", [3, 1, 6, 4]),
        ("relative", [0.25, 0.1, 0.75, 0.5]),
        ("relative_xywh", [0.25, 0.1, 0.5, 0.4]),
        ("cxcywh", [0.5, 0.3, 0.5, 0.4]),
    ],
)
def test_every_form_of_a_box_is_the_same_box(form, box, tmp_path):
    assert boxes_of(Data(boxes=form), tmp_path, [box] * 12)["0"] == [3, 1, 9, 5]


def test_boxes_are_cut_off_at_the_edges(tmp_path):
    assert boxes_of(Data(), tmp_path, [[-2, -3, 6, 50]] + [[0, 0, 6, 5]] * 11)["0"] == [0, 0, 6, 10]


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([float("nan")] * 4, "expected finite numbers in its boxes, got [nan, nan, nan, nan]; leave the cell empty"),
        ([0, 0, float("inf"), 5], "expected finite numbers in its boxes"),
        ([9, 5, 3, 1], "expected a box with some area, got [9, 5, 3, 1] (xyxy); correct it"),
        ([3, 1, 3, 5], "expected a box with some area, got [3, 1, 3, 5] (xyxy); correct it"),
        (
            [30, 1, 33, 5],
            "expected a box on the image of 12 x 10 pixels, got [30, 1, 33, 5] (xyxy), which lies outside",
        ),
        ([-9, 1, -3, 5], "expected a box on the image of 12 x 10 pixels"),
        ([1, 2, 3], "expected boxes [x0, y0, x1, y1], got [1.0, 2.0, 3.0]"),
    ],
)
def test_impossible_boxes_are_listed(box, reason, tmp_path):
    file = make_parquet(tmp_path / "a.parquet", 20, bbox=([box] + [[4, 3, 11, 9]] * 19, FLOATS))
    images = load_whole(Data(source=str(file)))["test"]
    assert len(images) == 19
    ((name, said),) = images.skipped
    assert name == "000000" and said.startswith(reason)
    with pytest.raises(ValueError, match="000000: expected"):
        load_whole(Data(source=str(file), strict=True))


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([[10, 10, 20, 10]] * 3, "3 of 3 boxes of cells do not fit their images as xyxy, 0 as xywh; write --data.box"),
        ([[5, 5, 40, 30]] * 9 + [[40, 20, 10, 10]], "1 of 10 boxes of cells do not fit their images as xyxy, 0 as xy"),
        ([[0.4, 0.45, 0.5, 0.6]] * 3, "numbers are between 0 and 1; write --data.boxes relative or --data.boxes cxcyw"),
        ([[0.5, 0.5, 0.3, 0.9]] * 3, "numbers are between 0 and 1; write --data.boxes cxcywh"),
        ([[0.6, 0.1, 0.4, 0.9]] * 3, "between 0 and 1; write --data.boxes relative_xywh "),
    ],
)
def test_boxes_that_look_like_another_form_are_refused(boxes, said):
    with pytest.raises(ValueError, match=said):
        settle(PLAIN, "cells", records(*boxes))


def test_one_wrong_box_among_right_ones_refuses_nothing():
    right = [[30, 10, 50, 30], [40, 20, 55, 38], [20, 25, 59, 39]]
    marks, (notice,) = settle(PLAIN, "cells", records(*right, [50, 30, 40, 35]))
    assert marks.boxes == "xyxy" and notice.startswith("boxes are read as xyxy and cover ")


def test_a_form_that_is_named_is_taken_and_doubted():
    boxes = records(*[[30, 10, 50, 30]] * 4)
    marks, (notice,) = settle(Data(boxes="xywh"), "cells", boxes)
    assert marks.boxes == "xywh" and "; 4 of 4 boxes of cells do not fit their images as xywh, 0 as xyxy; " in notice
    marks, _ = settle(Data(boxes="xyxy"), "cells", records(*[[10, 10, 20, 10]] * 4))
    assert marks.boxes == "xyxy"


def test_the_share_of_the_image_is_said():
    # 30 x 20 of 60 x 40, and two that together cover three quarters
    boxes = records([0, 0, 30, 20], [[0, 0, 60, 20], [0, 20, 30, 40]], None, [])
    _, (notice,) = settle(PLAIN, "cells", boxes)
    assert notice == (
        "boxes are read as xyxy and cover 50.0% of an image on average (2 looked at); if that is wrong, set data.boxes"
    )


def test_objects_as_detection_sets_write_them(tmp_path):
    objects = [{"bbox": [[3.0, 0.0, 6.0, 5.0], [0.0, 0.0, 3.0, 5.0]], "categories": [0, 1]}] * 12
    feature = {"bbox": datasets.List(FLOATS), "categories": datasets.List(datasets.Value("int64"))}
    file = make_parquet(tmp_path / "a.parquet", 12, objects=(objects, feature))
    images = load_whole(Data(source=str(file), size=12, box="objects", boxes="xywh"))["test"]
    assert images.batch([0]).boxes[0].tolist() == [[3, 0, 9, 6], [0, 0, 3, 6]]


def test_a_stream_reads_boxes_in_their_form(tmp_path):
    for part, n in (("train", 40), ("test", 10)):
        make_parquet(tmp_path / f"{part}.parquet", n, bbox=([[6, 5, 6, 5]] * n, FLOATS))
    data = Data(source=str(tmp_path), streaming=True, val=0.2, boxes="xywh")
    stream, sets = load_stream(data)
    for batch in (next(stream.read(4, None, None, False, 0, (0, 1), None)), sets["test"].batch([0])):
        assert batch.boxes[0].tolist() == [[6, 6, 12, 12]]  # 12 x 10 pixels become 12 x 12
    with pytest.raises(ValueError, match="do not fit their images as xyxy"):
        load_stream(Data(source=str(tmp_path), streaming=True, val=0.2))


def test_the_form_of_boxes_is_part_of_the_cache(tmp_path):
    def first(form):
        return boxes_of(Data(boxes=form), tmp_path, [[3, 1, 9, 5]] * 4)["0"]

    assert (first("xyxy"), first("xywh"), first("xyxy")) == ([3, 1, 9, 5], [3, 1, 12, 6], [3, 1, 9, 5])


def test_options_for_marks_that_are_not_there(tmp_path):
    file = make_parquet(tmp_path / "a.parquet", 20)
    for source, why in ((str(file), "has none"), ("clutter", "is composed")):
        with pytest.raises(ValueError, match=rf"data\.boxes .*{why}; leave it out"):
            load(Data(source=source, boxes="xywh"))
        with pytest.raises(ValueError, match=rf"data\.mask_values .*{why}; leave it out"):
            load(Data(source=source, mask_values=(1,)))
    boxed = make_parquet(tmp_path / "b.parquet", 20, bbox=([[0, 0, 6, 5]] * 20, FLOATS))
    wrong = Data(source=str(boxed))
    object.__setattr__(wrong, "boxes", "yxyx")  # the tests check types, users need not
    with pytest.raises(TypeError, match=r"data\.boxes: expected one of xyxy, xywh, .*, got 'yxyx'"):
        load(wrong)


def test_marks_in_a_recipe():
    data = load_recipe({"data": {"boxes": "xywh", "mask_values": [1, "3-5"]}}).data
    assert data.boxes == "xywh" and data.mask_values == (1, 3, 4, 5)
    assert load_recipe({}, {"data.mask_values": "8"}).data.mask_values == (8,)
    assert load_recipe({}, {"data.mask_values": "128-255"}).data.mask_values == tuple(range(128, 256))
    assert load_recipe({}, {"data.boxes": "null"}).data.boxes is None
    with pytest.raises(TypeError, match=r"data\.boxes: expected one of xyxy, .* or null, got 'xyhw'; did you mean"):
        load_recipe({}, {"data.boxes": "xyhw"})
    for wrong in ("5-3", "0-99999999", "x"):
        with pytest.raises(TypeError, match=r"data\.mask_values: expected a list of whole numbers"):
            load_recipe({}, {"data.mask_values": wrong})


# masks

OBJECT = np.zeros((HEIGHT, WIDTH), bool)
OBJECT[10:20, 10:30] = True
TRIMAP = np.where(OBJECT, 1, 2).astype(np.uint8)
TRIMAP[9, 9:31] = 3
VOC = np.where(OBJECT, 8, 0).astype(np.uint8)
VOC[30:] = 255
GRAY = np.where(OBJECT, 255, 0).astype(np.uint8)
SOFT = np.clip(np.hypot(*np.mgrid[-20:20, -30:30]) * -8 + 200, 0, 255).astype(np.uint8)


def encoded(mask: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, kind, **options)
    return file.getvalue()


def with_alpha(shades: int, alpha: np.ndarray) -> np.ndarray:
    return np.dstack([np.full((HEIGHT, WIDTH, 3), shades, np.uint8), alpha])


def read(mask: bytes, chosen=None) -> np.ndarray:
    return open_mask(mask, (HEIGHT, WIDTH), (HEIGHT, WIDTH), chosen)


@pytest.mark.parametrize(
    ("mask", "chosen"),
    [
        (encoded(GRAY), None),
        (encoded(GRAY // 255), None),
        (encoded(OBJECT), None),
        (encoded(GRAY, "JPEG", quality=75), None),
        (encoded(GRAY, "JPEG", quality=30), None),
        (encoded(GRAY // 2, "JPEG", quality=75), None),
        (encoded(np.dstack([GRAY, 0 * GRAY, 0 * GRAY]), "JPEG", quality=90, subsampling=0), None),
        (encoded(GRAY, "WEBP", quality=50), None),
        (encoded(GRAY, "WEBP", lossless=True), None),
        (encoded(VOC // 8 * (VOC < 255), "WEBP", lossless=True), None),
        (encoded(with_alpha(255, GRAY)), None),
        (encoded(with_alpha(0, GRAY)), None),
        (encoded(np.dstack([GRAY, np.full_like(GRAY, 255)])), None),
        (encoded(np.dstack([GRAY, np.zeros_like(GRAY)])), None),
        (encoded(TRIMAP), [1]),
        (encoded(VOC), [8]),
        (encoded(255 - GRAY), [0]),
        (encoded(with_alpha(255, GRAY)), range(128, 256)),
    ],
)
def test_the_object_in_many_masks(mask, chosen):
    """JPEG's blur may move a corner of the 200 pixels."""
    differ = (read(mask, chosen) != OBJECT).sum()
    assert differ <= (4 if mask[:3] == b"\xff\xd8\xff" or mask[8:12] == b"WEBP" else 0)


def test_masks_without_an_object_mark_nothing():
    nothing = np.zeros((HEIGHT, WIDTH), np.uint8)
    for mask in (encoded(nothing), encoded(nothing, "JPEG"), encoded(with_alpha(255, nothing))):
        assert not read(mask).any()


def test_rows_of_numbers_that_are_no_mask():
    with pytest.raises(ValueError, match="its mask cannot be read: expected rows of numbers of one length"):
        read_mask([[1, 0], [1]])
    assert read_mask([[1, 0], [0, 2]]).inside().tolist() == [[True, False], [False, True]]


def said_of(*masks: bytes, **options) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    marks, notices = settle(Data(**options), "cells", [Record(IMAGE, mask) for mask in masks])
    return marks.mask_values, notices


SHARE = OBJECT.mean()  # 8.3 %


@pytest.mark.parametrize("mask", [encoded(GRAY), encoded(GRAY // 255), encoded(OBJECT), encoded(OBJECT * np.uint8(8))])
def test_plain_masks_are_not_talked_about(mask):
    assert said_of(mask, mask) == (None, ())


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (TRIMAP, "every mask of cells covers its whole image, the values are 1, 2, 3 and none is 0; set "
         "data.mask_values to the values of the object (a trimap has 1 for the object)"),
        (255 - GRAY, "masks of cells look inverted: the object covers 91.7% of an image on average (2 masks looked at) "
         "and lies in all four corners; if 0 is the object, set data.mask_values to 0"),
        (VOC // 8 + OBJECT, "masks of cells hold 0, 2, 31; all but 0 is the object, which covers 33.3% of an image on "
         "average (2 masks looked at); to change that, set data.mask_values to the values of the object"),
        (SOFT, f"all but 0 is the object, which covers {(SOFT > 0).mean():.1%} of an image"),
        (with_alpha(255, GRAY), "masks of cells lie in the alpha channel; opaque is the object; the object covers 8"),
    ],
)  # fmt: skip
def test_what_is_said_of_other_masks(mask, said):
    values, (notice, *_) = said_of(*[encoded(mask)] * 2)
    assert values is None and said in notice


def test_jpeg_masks_are_said():
    _, (notice,) = said_of(encoded(GRAY, "JPEG"))
    assert notice.startswith("masks of cells are stored in a format that blurs their edges (JPEG); from half of the")


def test_jpeg_masks_that_are_inverted_are_said_to_be():
    _, (blurred, inverted) = said_of(encoded(255 - GRAY, "JPEG"))
    assert "blurs their edges" in blurred and "look inverted: the object covers 91.7%" in inverted


def test_255_beside_class_numbers_is_void():
    values, (notice,) = said_of(encoded(VOC), encoded(OBJECT * np.uint8(8)))
    assert values == tuple(range(1, 255)) and (read(encoded(VOC), values) == OBJECT).all()
    assert "hold 0, 8, 255; 255 beside class numbers is taken as void" in notice and "covers 8.3%" in notice
    assert said_of(encoded(GRAY), encoded(GRAY // 255))[0] is None  # never in the same mask


def test_values_that_are_named():
    values, (notice,) = said_of(encoded(TRIMAP), mask_values=(1,))
    assert values == (1,) and notice.startswith("masks of cells hold 1, 2, 3; 1 is the object; the object covers 8.3%")
    _, (notice,) = said_of(encoded(GRAY), mask_values=(7,))
    assert "7 is the object, so none of them marks anything" in notice


def test_mask_values_reach_the_images(tmp_path):
    mask = Image.fromarray(np.array([[1, 2, 3] * 4] * 10, np.uint8))
    file = make_parquet(tmp_path / "a.parquet", 20, mask=([mask] * 20, datasets.Image()))
    shares = {
        values: load(Data(source=str(file), size=12, mask_values=values))["test"].batch([0]).masks.float().mean().item()
        for values in (None, (1,), (1, 3))
    }
    assert shares == {None: 1, (1,): pytest.approx(1 / 3), (1, 3): pytest.approx(2 / 3)}
