"""The references in NumPy and JavaScript that an export contains return Refract's pixels, within the documented bounds."""

import importlib.util
import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from icc_profiles import icc
from PIL import Image, ImageCms

from refract.augment.preprocess import Preprocess
from refract.augment.resize_libraries import LIBRARIES

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "pipeline" / "export" / "reference"
VECTORS = ROOT / "docs" / "assets" / "preprocessing-vectors.json"

PIXEL_BOUND = 1
"""Grey levels between the references and Refract for the same pixels: docs/preprocessing.md."""

RUN_NODE = """
const { refractPreprocess } = require(process.argv[1]);
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(cases.map(({ image, settings }) => Array.from(refractPreprocess(image, settings)))));
"""


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """preprocess.py of an export."""
    spec = importlib.util.spec_from_file_location("exported_preprocess", REFERENCE / "preprocess.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_of(preprocess: Preprocess) -> dict:
    return {"preprocess": preprocess.to_dict()}


def in_node(images: list[np.ndarray], settings: list[dict]) -> list[list[int]]:
    if shutil.which("node") is None:
        pytest.skip("preprocess.js runs in Node.js, which is not installed (Debian: apt-get install nodejs)")
    cases = [
        {
            "image": {"data": image.ravel().tolist(), "width": image.shape[1], "height": image.shape[0]},
            "settings": setting,
        }
        for image, setting in zip(images, settings, strict=True)
    ]
    done = subprocess.run(
        ["node", "-e", RUN_NODE, str(REFERENCE / "preprocess.js")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def drawn() -> list[tuple[np.ndarray, Preprocess]]:
    """Noise, the hardest pixels, with sizes that enlarge, reduce, and hit whole pixels; and one side of a single pixel."""
    random = np.random.default_rng(0)
    sizes = [(1, 30, 7, 5), (64, 64, 32, 32), (32, 32, 32, 32), (48, 64, 42, 42), (90, 11, 8, 9)]
    sizes += [tuple(random.integers(1, 200, 2)) + tuple(random.integers(1, 50, 2)) for _ in range(35)]
    cases = []
    for number, (rows, columns, height, width) in enumerate(sizes):
        resize, ratio = ("crop", "squash")[number % 2], float(random.choice([1.0, 0.875, 0.5]))
        cases.append(
            (
                random.integers(0, 256, (rows, columns, 3), dtype=np.uint8),
                Preprocess(int(height), int(width), resize=resize, crop_ratio=ratio),
            )
        )
    return cases


def difference(got: object, expected: np.ndarray) -> int:
    return int(np.abs(np.reshape(got, expected.shape).astype(int) - expected).max())


def test_numpy_returns_refracts_pixels(reference: ModuleType) -> None:
    for image, preprocess in drawn():
        before = image.copy()
        got = reference.preprocess(image, settings_of(preprocess))
        assert got.dtype == np.uint8
        assert difference(got, preprocess(image)) <= PIXEL_BOUND, preprocess
        np.testing.assert_array_equal(image, before)


def test_javascript_returns_the_pixels_of_numpy(reference: ModuleType) -> None:
    cases = drawn()
    settings = [settings_of(preprocess) for _, preprocess in cases]
    for got, (image, _), setting in zip(in_node([image for image, _ in cases], settings), cases, settings, strict=True):
        assert difference(got, reference.preprocess(image, setting)) <= 1  # where a value lies between two levels


@pytest.mark.parametrize("library", LIBRARIES)
def test_both_references_resize_as_the_library(library: str, reference: ModuleType) -> None:
    cases = [(image, replace(preprocess, interpolation=library)) for image, preprocess in drawn()]
    settings = [settings_of(preprocess) for _, preprocess in cases]
    bound = 0 if library == "pillow" else PIXEL_BOUND
    for got, (image, preprocess), setting in zip(
        in_node([image for image, _ in cases], settings), cases, settings, strict=True
    ):
        expected = preprocess(image)
        assert difference(reference.preprocess(image, setting), expected) <= bound
        assert difference(got, expected) <= PIXEL_BOUND


def test_both_references_cut_the_centre_of_a_long_image(reference: ModuleType) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 30_000, 3), dtype=np.uint8)
    preprocess = Preprocess(64, 64, crop_ratio=0.875, interpolation="pillow")  # 73 × 730,000 pixels before the crop
    expected, setting = preprocess(image), settings_of(preprocess)
    np.testing.assert_array_equal(reference.preprocess(image, setting), expected)
    assert difference(in_node([image], [setting])[0], expected) <= PIXEL_BOUND


def test_javascript_lays_transparency_over_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (10, 20, 30, 0)
    setting = settings_of(Preprocess(2, 2, resize="squash"))
    got = np.reshape(in_node([pixels], [setting])[0], (2, 2, 3))
    assert got.tolist() == [[[10, 20, 30], [255, 255, 255]], [[255, 255, 255], [255, 255, 255]]]


def painted(rows: int, columns: int) -> np.ndarray:
    """The image of the test vectors, as docs/preprocessing.md defines it."""
    y, x, c = np.meshgrid(np.arange(rows), np.arange(columns), np.arange(3), indexing="ij")
    return ((7 * x + 13 * y + 57 * c + 17 * ((x * y) % 11)) % 256).astype(np.uint8)


def test_the_test_vectors_hold_for_refract_and_for_both_references(reference: ModuleType) -> None:
    vectors = json.loads(VECTORS.read_text())
    images = [painted(vector["rows"], vector["columns"]) for vector in vectors]
    for image, vector, got in zip(images, vectors, in_node(images, vectors), strict=True):
        pixels = Preprocess.from_dict(vector["preprocess"])(image)
        expected = np.reshape(vector["expected"], pixels.shape)
        assert difference(pixels, expected) <= PIXEL_BOUND
        assert difference(reference.preprocess(image, vector), expected) <= PIXEL_BOUND
        assert difference(got, expected) <= PIXEL_BOUND


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def scene(side: int = 160) -> np.ndarray:
    small = np.random.default_rng(3).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side + 41), Image.Resampling.BICUBIC))


def files() -> dict[str, bytes]:
    """Encoded images of the kinds that differ in decoding."""
    pixels = scene()
    image = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = Image.fromarray(
        np.dstack([pixels, np.linspace(0, 255, pixels.shape[0]).astype(np.uint8)[:, None].repeat(160, 1)])
    )
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    return {
        "a JPEG": encoded(image, "JPEG", quality=95),
        "a rotated JPEG": encoded(image, "JPEG", quality=95, exif=turned),
        "a PNG": encoded(image, "PNG"),
        "transparency": encoded(alpha, "PNG"),
        "a palette": encoded(image.quantize(64), "PNG"),
        "grey": encoded(image.convert("L"), "PNG"),
        "grey in 16 bits": encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
        "CMYK": encoded(image.convert("CMYK"), "JPEG", quality=95),
        "a profile of another space": encoded(image, "PNG", icc_profile=profile.tobytes()),
    }


@pytest.mark.parametrize("kind", files())
def test_numpy_decodes_a_file_as_refract_does(kind: str, reference: ModuleType) -> None:
    data = files()[kind]
    # No reduction by 2 or more, which Refract's JPEG decoder shares.
    for preprocess in (Preprocess(96, 100, color_profile="ignore"), Preprocess(120, 96, resize="squash")):
        got = reference.preprocess(io.BytesIO(data), settings_of(preprocess))
        assert difference(got, preprocess(data)) <= 2


UNUSABLE = {"CMYK with a profile for RGB", "RGB with a profile for grey", "a damaged profile", "no profile"}


def profiled() -> dict[str, bytes]:
    """Files with a colour profile, also damaged ones and such of another colour space."""
    image = Image.fromarray(scene())
    grey, opaque = image.convert("L"), image.copy()
    opaque.putalpha(Image.linear_gradient("L").resize(image.size))
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    rgb, one = icc(), icc(space=b"GRAY", gamma=1.2)
    return {
        "RGB": encoded(image, "PNG", icc_profile=rgb),
        "transparency": encoded(opaque, "PNG", icc_profile=rgb),
        "a palette": encoded(image.quantize(64), "PNG", icc_profile=rgb),
        "grey": encoded(grey, "JPEG", quality=95, icc_profile=one),
        "transparent grey": encoded(opaque.convert("LA"), "PNG", icc_profile=one),
        "grey in 16 bits": encoded(wide, "PNG", icc_profile=one),
        "grey with a profile for RGB": encoded(grey, "JPEG", quality=95, icc_profile=rgb),
        "CMYK with a profile for RGB": encoded(image.convert("CMYK"), "JPEG", quality=95, icc_profile=rgb),
        "RGB with a profile for grey": encoded(image, "PNG", icc_profile=one),
        "a damaged profile": encoded(image, "PNG", icc_profile=rgb[:200]),
        "no profile": encoded(image, "PNG", icc_profile=b"not a profile"),
    }


@pytest.mark.parametrize("kind", profiled())
def test_numpy_converts_a_colour_profile_as_refract_does(kind: str, reference: ModuleType) -> None:
    data, preprocess = profiled()[kind], Preprocess(96, 100, color_profile="convert")
    expected = preprocess(data)
    assert difference(reference.preprocess(io.BytesIO(data), settings_of(preprocess)), expected) <= 2
    changed = difference(expected, replace(preprocess, color_profile="ignore")(data)) > 2
    assert changed == (kind not in UNUSABLE)


def test_a_reduced_jpeg_differs_by_less_than_a_level_on_average(reference: ModuleType) -> None:
    """Refract's decoder reduces a JPEG by DCT; the references reduce the decoded pixels."""
    data = encoded(Image.fromarray(scene(600)), "JPEG", quality=90)
    for side in (224, 96, 32):
        preprocess = Preprocess(side, side)
        got = reference.preprocess(io.BytesIO(data), settings_of(preprocess))
        assert np.abs(got.astype(int) - preprocess(data)).mean() <= 1
