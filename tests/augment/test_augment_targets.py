"""Masks and boxes follow their image through a plan."""

from typing import Any

import albumentations
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tv

from refract.augment import Augmenter, Plan, Step
from refract.augment.passes import OpPass, WarpPass
from refract.augment.registry import OPS
from refract.augment.targets import _movements, _reflect

HEIGHT, WIDTH = 60, 84
MASK = np.random.default_rng(0).integers(0, 5, (HEIGHT, WIDTH), dtype=np.uint8)
GEOMETRIC: list[dict[str, dict[str, Any]]] = [
    {"Rotate": {"degrees": [20, 160]}},
    {"Rotate": {"degrees": 45, "border": "reflect"}},
    {"Affine": {"degrees": 30, "translate": 0.2, "scale": [0.6, 1.6], "shear": 20, "border": "edge"}},
    {"Shear": {"x": 25, "y": 10}},
    {"Perspective": {"distortion": 0.5}},
    {"RandomResizedCrop": {"size": [50, 70], "scale": [0.3, 1.0]}},
    {"RandomCrop": {"size": [80, 40]}},
    {"PadAndCrop": {"padding": 9, "border": "reflect"}},
    {"PadAndCrop": {"padding": 70, "border": "reflect101"}},
    {"Rotate": {"degrees": 45, "border": "reflect101"}},
    {"Rot90": {"turns": 1}},
    {"Rot90": {"turns": 3}},
    {"Transpose": {}},
    {"RandomScale": {"scale": [1.5, 2.5]}},
    {"ElasticDeform": {"alpha": 3.0}},
    {"GridDistortion": {}},
]


def certain(entry: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {**parameters, "p": 1.0} for name, parameters in entry.items()}


def plan_of(*entries: Any, epoch: int = 0, exact: bool = False, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Plan:
    policy = {"exact": exact, "ops": [certain(entry) if isinstance(entry, dict) else entry for entry in entries]}
    return Augmenter(policy, seed=1).draw(size, epoch=epoch, index=0)


NONE = Augmenter("none")


def test_flips_rotations_and_crops_equal_numpys() -> None:
    flipped = Plan((HEIGHT, WIDTH), (Step("HorizontalFlip"), Step("VerticalFlip")))
    np.testing.assert_array_equal(NONE.apply_mask(flipped, MASK), MASK[::-1, ::-1])
    turned = Plan((HEIGHT, WIDTH), (Step("Rot90", {"turns": 1}),))
    np.testing.assert_array_equal(NONE.apply_mask(turned, MASK), np.rot90(MASK))
    box = Plan((HEIGHT, WIDTH), (Step("RandomCrop", {"box": [10, -5, 30, 40], "size": [30, 40]}),))
    expected = np.full((30, 40), 255, np.uint8)
    expected[:, 5:] = MASK[10:40, :35]
    np.testing.assert_array_equal(NONE.apply_mask(box, MASK, fill=255), expected)


def test_masks_and_boxes_agree_with_torchvision_and_albumentations() -> None:
    crop = Plan(
        (HEIGHT, WIDTH), (Step("HorizontalFlip"), Step("RandomCrop", {"box": [7, 9, 40, 50], "size": [40, 50]}))
    )
    boxes = np.array([[20.0, 20, 20, 30], [0, 0, 12, 30]])
    theirs = tv.crop(tv.horizontal_flip(tv_tensors.Mask(torch.from_numpy(MASK))), 7, 9, 40, 50)
    np.testing.assert_array_equal(NONE.apply_mask(crop, MASK), theirs.numpy())
    transform = albumentations.Compose([albumentations.HorizontalFlip(p=1), albumentations.Crop(9, 7, 59, 47)])
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    np.testing.assert_array_equal(NONE.apply_mask(crop, MASK), transform(image=image, mask=MASK)["mask"])
    xyxy = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]], 1)
    moved = tv_tensors.BoundingBoxes(torch.from_numpy(xyxy), format="XYXY", canvas_size=(HEIGHT, WIDTH))
    left, top, right, bottom = tv.crop(tv.horizontal_flip(moved), 7, 9, 40, 50).numpy().T
    np.testing.assert_allclose(NONE.apply_boxes(crop, boxes)[0], np.stack([top, left, bottom - top, right - left], 1))

    turn = Plan((64, 64), (Step("Rotate", {"angle": 30.0}),))
    square = np.zeros((64, 64), np.uint8)
    square[20:40, 10:50] = 1
    theirs = tv.rotate(tv_tensors.Mask(torch.from_numpy(square)), 30.0)
    assert (NONE.apply_mask(turn, square) != theirs.numpy()).mean() < 0.01  # theirs rounds pixel centres in float32


@pytest.mark.parametrize("entry", GEOMETRIC, ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_a_mask_of_the_images_colours_follows_the_image(entry, exact: bool) -> None:
    """Compares pixels away from the regions' edges, where the image blends two colours."""
    mask = np.add.outer(np.arange(HEIGHT) // 15, np.arange(WIDTH) // 21).astype(np.int32) % 3 + 1
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    for epoch in range(3):
        plan = plan_of(entry, {"HorizontalFlip": {}}, epoch=epoch, exact=exact)
        moved = NONE.apply_mask(plan, mask)
        shown = NONE.apply(plan, colours[mask])
        assert moved.dtype == np.int32 and moved.shape == shown.shape[:2]
        pure = (shown == 255).sum(-1) + (shown == 0).sum(-1) == 3
        assert pure.mean() > 0.6
        assert (colours[moved[pure]] != shown[pure]).any(-1).mean() < 0.002


def shown_after_deformation(plan: Plan, box: tuple[int, int, int, int]) -> np.ndarray | None:
    """Return the output pixels whose centre shows a point of the box, for a warp and then a deformation; None for other plans.

    A moved mask is no reference for them: the warp rounds it to whole pixels. Along a slanted edge, half a pixel of rounding moves its
    end by some pixels, and the deformation shows that.
    """
    match list(_movements(plan)):
        case [WarpPass() as warp, OpPass() as deformation]:
            x, y = deformation.op.maps(deformation.args, warp.size)
            points = np.stack([_reflect(x + 0.5, warp.size[1]), _reflect(y + 0.5, warp.size[0]), np.ones(x.shape)])
            u, v, depth = np.einsum("ij,jhw->ihw", np.reshape(warp.matrix, (3, 3)), points)
            top, left, height, width = box
            inside = (
                (u >= left * depth) & (u <= (left + width) * depth) & (v >= top * depth) & (v <= (top + height) * depth)
            )
            return inside & (depth > 0)
    return None


@settings(max_examples=40, deadline=None)
@example({"Shear": {"x": 25, "y": 10}}, {"ElasticDeform": {"alpha": 3.0}}, 24, (23, 42, 20, 8))
@given(
    st.sampled_from(GEOMETRIC),
    st.sampled_from(GEOMETRIC),
    st.integers(0, 1000),
    st.tuples(st.integers(0, 40), st.integers(0, 60), st.integers(8, 20), st.integers(8, 24)),
)
def test_a_moved_box_encloses_the_moved_rectangle_tightly(first, second, epoch: int, box) -> None:
    top, left, height, width = box
    if any(entry.get("border") in ("reflect", "reflect101") for op in (first, second) for entry in op.values()):
        first = second = {"Transpose": {}}  # reflected copies of the rectangle have no single box
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + height, left : left + width] = True
    plan = plan_of(first, second, epoch=epoch)
    if any(step.args.get("border") in ("reflect", "reflect101", "edge") for step in plan.steps):
        return
    exact = shown_after_deformation(plan, box)
    moved = NONE.apply_mask(plan, mask) if exact is None else exact
    (result,), (visible,) = NONE.apply_boxes(plan, [box])
    rows, columns = np.flatnonzero(moved.any(1)), np.flatnonzero(moved.any(0))
    if not rows.size:
        assert visible < 0.1
        return
    edges = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])
    moved_edges = np.array([result[0], result[1], result[0] + result[2], result[1] + result[3]])
    outwards = np.array([1, 1, -1, -1]) * (edges - moved_edges)
    deforms = any(OPS[step.op].kind == "pixel" for step in plan.steps)
    if exact is not None:  # whole pixels, and the box of just these
        np.testing.assert_allclose(outwards, 0, atol=0.01)
    # A pixel's centre is half a pixel inside its edges. A deformation moves the mask's whole pixels, which end half a pixel later.
    assert visible > 0 and (outwards > (-1.01 if deforms else -0.51)).all()
    assert deforms or (outwards < 8).all(), "the sharp corner of a thin part may show no pixel's centre"


def test_the_visible_fraction_is_that_of_the_area() -> None:
    crop = Plan((100, 100), (Step("RandomCrop", {"box": [0, 0, 50, 50], "size": [50, 50]}),))
    boxes, visible = NONE.apply_boxes(crop, [[40, 0, 20, 20], [60, 60, 10, 10], [0, -10, 10, 20], [5, 5, 0, 5]])
    np.testing.assert_allclose(visible, [0.5, 0, 1, 0])
    np.testing.assert_allclose(boxes, [[40, 0, 10, 20], [0, 0, 0, 0], [0, 0, 10, 10], [0, 0, 0, 0]])
    assert boxes.dtype == visible.dtype == np.float32
    for no_boxes in (np.empty((0, 4)), []):
        empty, none = NONE.apply_boxes(crop, no_boxes)
        assert empty.shape == (0, 4) and none.shape == (0,)
    turn = Plan((100, 100), (Step("Rotate", {"angle": 45.0}),))
    _, (visible,) = NONE.apply_boxes(turn, [[0, 0, 100, 100]])
    assert visible == pytest.approx(2 * np.sqrt(2) - 2, abs=1e-6), (
        "the intersection of the square and its copy rotated by 45° is an octagon"
    )


def test_inputs_are_not_changed_and_results_are_new() -> None:
    before = MASK.copy()
    same = NONE.apply_mask(Plan((HEIGHT, WIDTH), ()), MASK)
    assert not np.shares_memory(same, MASK)
    np.testing.assert_array_equal(same, before)
    NONE.apply_mask(plan_of({"Rotate": {"degrees": [20, 30]}}), MASK, fill=9)
    np.testing.assert_array_equal(MASK, before)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.float32, np.uint16])
def test_any_dtype_and_a_channel_axis(dtype) -> None:
    mask = np.stack([MASK, MASK + 1], -1).astype(dtype)
    plan = plan_of({"Rotate": {"degrees": [20, 30]}}, {"Resize": {"size": [30, 31]}})
    moved = NONE.apply_mask(plan, mask, fill=1)
    assert moved.shape == (30, 31, 2) and moved.dtype == dtype
    np.testing.assert_array_equal(moved[..., 0], NONE.apply_mask(plan, MASK.astype(dtype), fill=1))


def test_color_and_erasing_ops_do_not_change_masks_and_boxes() -> None:
    plan = plan_of(
        {"ColorJitter": {"brightness": 0.4}},
        {"RandomErasing": {}},
        {"GaussianNoise": {}},
        {"albumentations.RandomFog": {}},
    )
    assert len(plan.steps) == 4
    np.testing.assert_array_equal(NONE.apply_mask(plan, MASK), MASK)
    np.testing.assert_array_equal(NONE.apply_boxes(plan, [[1, 2, 3, 4]])[0], [[1, 2, 3, 4]])


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ({"AugMix": {"severity": 10, "depth": 3}}, "AugMix"),
        ({"Corruption": {"names": "elastic_transform"}}, "elastic_transform"),
        ({"albumentations.GridDistortion": {}}, "albumentations.GridDistortion"),
        ({"torchvision.RandomRotation": {"degrees": 20}}, "torchvision.RandomRotation"),
        ({"imgaug.Affine": {"rotate": 20}}, "imgaug.Affine"),
    ],
)
def test_ops_that_move_pixels_in_an_unknown_way_are_refused_by_name(entry, name: str) -> None:
    plan = plan_of(entry)
    for apply in (lambda: NONE.apply_mask(plan, MASK), lambda: NONE.apply_boxes(plan, [[0, 0, 5, 5]])):
        with pytest.raises(
            ValueError, match=f"masks and boxes cannot follow {name}: it moves pixels in an unknown way"
        ):
            apply()


def test_errors_name_the_argument() -> None:
    plan = plan_of({"Rotate": {}})
    with pytest.raises(ValueError, match="mask: the plan was drawn for 60×84 pixels, the mask has 84×60"):
        NONE.apply_mask(plan, MASK.T)
    with pytest.raises(ValueError, match="fill: 300 is not a value of the mask's dtype uint8"):
        NONE.apply_mask(plan, MASK, fill=300)
    for boxes, message in (
        ([[1, 2, 3]], "got an array 1×3"),
        ([[0, 0, -1, 2]], r"got \[\[0, 0, -1, 2\]\]"),
        ([1, 2, 3, 4], "array 4"),
    ):
        with pytest.raises(ValueError, match=f"expected N×4 finite numbers .*{message}"):
            NONE.apply_boxes(plan, boxes)
