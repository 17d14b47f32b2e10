"""The 19 corruptions of robustness tests, at severities 1 to 5.

Source: Hendrycks & Dietterich 2019, "Benchmarking neural network robustness to common corruptions and perturbations", arXiv:1903.12261,
section 4, with its published constants for 224 × 224. `tests/augment/test_augment_corruption.py` states the effect of each. Deviations:

- Lengths in pixels scale with the shorter side, so that a severity is equally hard at other sizes.
- Glass blur gathers from random neighbours instead of swapping pixels one by one.
- Frost is synthetic (ridges of smooth noise), with the brightness and contrast of the frost photos that the authors overlay.
- Fog repeats beyond a square of 256/224 of the shorter side.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import simplejpeg

from refract.augment.ops.base import Args, Op, Size, interval, whole
from refract.augment.ops.color import LUMA
from refract.augment.ops.filters import motion_kernel
from refract.augment.ops.pixel import PixelOp

# pixels: float32 H×W×3 in 0…1; level: severity − 1, 0…4; unit: shorter side / 224.
# Returns float32 H×W×3; `corrupt` clips values outside 0…1.
Corrupt = Callable[[np.ndarray, int, np.random.Generator, float], np.ndarray]


def _gaussian_noise(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    return pixels + (0.08, 0.12, 0.18, 0.26, 0.38)[level] * rng.standard_normal(pixels.shape, np.float32)


def _shot_noise(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    photons = (60, 25, 12, 5, 3)[level]
    return rng.poisson(pixels * photons).astype(np.float32) / photons


def _impulse_noise(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    draws = rng.random(pixels.shape, np.float32)
    return np.where(draws < amount / 2, 0.0, np.where(draws < amount, 1.0, pixels))


def _speckle_noise(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    return pixels * (1 + (0.15, 0.2, 0.35, 0.45, 0.6)[level] * rng.standard_normal(pixels.shape, np.float32))


def _gaussian_blur(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    return _blurred(pixels, (1, 2, 3, 4, 6)[level] * unit)


def _glass_blur(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    reach = max(1, round(reach * unit))
    pixels = _blurred(pixels, sigma * unit)
    height, width = pixels.shape[:2]
    for _ in range(rounds):
        rows = np.clip(np.arange(height)[:, None] + rng.integers(-reach, reach + 1, (height, width)), 0, height - 1)
        columns = np.clip(np.arange(width) + rng.integers(-reach, reach + 1, (height, width)), 0, width - 1)
        pixels = pixels[rows, columns]
    return _blurred(pixels, sigma * unit)


def _defocus_blur(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    blocks, soft = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    radius = blocks * unit
    reach = max(1, math.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = _blurred((x**2 + y**2 <= max(radius, 0.5) ** 2).astype(np.float32), soft * unit)
    return cv2.filter2D(pixels, -1, disk / disk.sum(), borderType=cv2.BORDER_REFLECT_101)


def _motion_blur(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return _moved(pixels, radius * unit, sigma * unit, rng.uniform(-45, 45))


def _zoom_blur(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    most, step = ((1.1, 0.01), (1.15, 0.01), (1.2, 0.02), (1.25, 0.02), (1.3, 0.03))[level]
    factors = np.arange(1, most + step / 2, step)
    return (pixels + sum(_zoomed(pixels, factor) for factor in factors)) / (len(factors) + 1)


def _snow(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    mean, spread, zoom, least, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    flakes = _zoomed(rng.normal(mean, spread, pixels.shape[:2]).astype(np.float32), zoom)
    flakes[flakes < least] = 0
    flakes = _moved(np.clip(flakes, 0, 1), radius * unit, sigma * unit, rng.uniform(-135, -45))[..., None]
    grey = (pixels @ LUMA.astype(np.float32))[..., None]
    pixels = keep * pixels + (1 - keep) * np.maximum(pixels, grey * 1.5 + 0.5)
    return pixels + flakes + flakes[::-1, ::-1]


def _frost(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    keep, amount = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    return keep * pixels + amount * _ice(pixels.shape[:2], rng, unit)


# Mean colour and contrast (standard deviation inside a crop of 224 × 224) of the five frost photos that the authors overlay.
_PANES = (
    ((0.305, 0.585, 0.650), 0.062),
    ((0.787, 0.805, 0.841), 0.080),
    ((0.787, 0.805, 0.841), 0.080),
    ((0.540, 0.599, 0.648), 0.104),
    ((0.441, 0.484, 0.528), 0.140),
)


def _ice(size: Size, rng: np.random.Generator, unit: float) -> np.ndarray:
    """Return a frost texture, float32 H×W×3 in 0…1: needles on clouds, with the brightness and contrast of a frost photo."""
    color, contrast = _PANES[int(rng.integers(len(_PANES)))]
    brightness = 0.03 * rng.standard_normal()
    # Needles: ridges at the zero crossings of directional noise. Their widths match the spectrum of the photos.
    ridges = np.zeros(size, np.float32)
    for _ in range(4):
        noise = rng.standard_normal(size, np.float32)
        kernel = motion_kernel(max(3.0, 40 * unit), rng.uniform(-180, 180))
        smooth = cv2.filter2D(_blurred(noise, 1.6 * unit), -1, kernel, borderType=cv2.BORDER_REFLECT_101)
        ridges = np.maximum(ridges, 1 - np.abs(smooth) / (0.6 * smooth.std() + 1e-6))
    texture = _standardized(0.7 * _standardized(ridges) + 0.7 * _standardized(_plasma(size, 1.6, rng, unit)))
    return np.clip(np.array(color, np.float32) + np.float32(brightness) + contrast * texture[..., None], 0, 1)


def _fog(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    high = float(pixels.max())
    return (pixels + amount * _plasma(pixels.shape[:2], decay, rng, unit)[..., None]) * high / (high + amount)


def _brightness(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv[..., 2] = np.clip(hsv[..., 2] + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 0, 1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _spatter(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    mean, spread, sigma, least, amount, mud = (
        (0.65, 0.3, 4, 0.69, 0.6, False),
        (0.65, 0.3, 3, 0.68, 0.6, False),
        (0.65, 0.3, 2, 0.68, 0.5, False),
        (0.65, 0.3, 1, 0.65, 1.5, True),
        (0.67, 0.4, 1, 0.65, 1.5, True),
    )[level]
    liquid = _blurred(rng.normal(mean, spread, pixels.shape[:2]).astype(np.float32), sigma * unit)
    liquid[liquid < least] = 0
    if mud:
        cover = _blurred((liquid > least).astype(np.float32), amount * unit)
        cover[cover < 0.8] = 0
        return pixels * (1 - cover[..., None]) + cover[..., None] * np.array([63, 42, 20], np.float32) / 255
    drops = np.clip(liquid * 255, 0, 255).astype(np.uint8)
    distance = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.equalizeHist(cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8))
    light = cv2.filter2D(distance, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32))
    shine = drops.astype(np.float32) * cv2.blur(light, (3, 3))
    shine *= amount / max(float(shine.max()), 1e-6)
    return pixels + shine[..., None] * np.array([175, 238, 238], np.float32) / 255


def _contrast(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    mean = pixels.mean((0, 1), keepdims=True)
    return (pixels - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def _elastic_transform(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    alpha, sigma, bend = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))[
        level
    ]
    height, width = pixels.shape[:2]
    side = 244 * unit  # the authors' constants are fractions of 244
    centre, third = np.array([width, height], np.float32) / 2, min(height, width) / 3
    points = centre + third * np.array([[1, 1], [1, -1], [-1, -1]], np.float32)
    moved = points + rng.uniform(-bend * side, bend * side, (3, 2)).astype(np.float32)
    matrix = cv2.getAffineTransform(points, moved.astype(np.float32))
    bent = cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    fields = [
        _blurred(rng.uniform(-1, 1, (height, width)).astype(np.float32), sigma * side) * np.float32(alpha * side)
        for _ in range(2)
    ]
    x, y = fields[0] + np.arange(width, dtype=np.float32), fields[1] + np.arange(height, dtype=np.float32)[:, None]
    return cv2.remap(bent, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _pixelate(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    fraction = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    height, width = pixels.shape[:2]
    small = cv2.resize(
        pixels, (max(1, int(width * fraction)), max(1, int(height * fraction))), interpolation=cv2.INTER_AREA
    )
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _jpeg_compression(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    coded = simplejpeg.encode_jpeg(np.rint(255 * pixels).astype(np.uint8), (25, 18, 15, 10, 7)[level], "RGB", "420")
    return simplejpeg.decode_jpeg(coded, "RGB").astype(np.float32) / 255


def _saturate(pixels: np.ndarray, level: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    factor, offset = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[level]
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = np.clip(hsv[..., 1] * factor + offset, 0, 1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    if sigma < 0.05:
        return pixels
    # The kernel covers three sigma on each side.
    side = 2 * math.ceil(3 * sigma) + 1
    return cv2.GaussianBlur(pixels, (side, side), sigma, borderType=cv2.BORDER_REFLECT)


def _moved(pixels: np.ndarray, radius: float, sigma: float, degrees: float) -> np.ndarray:
    """Blur along a line with a one-sided Gaussian, as ImageMagick's motion blur does."""
    reach = max(1, math.ceil(radius))
    weights = np.exp(-0.5 * (np.arange(reach + 1) / max(sigma, 1e-3)) ** 2)
    kernel = np.zeros((2 * reach + 3, 2 * reach + 3), np.float32)
    for step, weight in enumerate(weights / weights.sum()):
        x, y = reach + 1 + step * math.cos(math.radians(degrees)), reach + 1 - step * math.sin(math.radians(degrees))
        kernel[round(y), round(x)] += weight
    return cv2.filter2D(pixels, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def _zoomed(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Enlarge the centre by a factor of at least 1."""
    height, width = pixels.shape[:2]
    matrix = np.array(
        [[1 / factor, 0, (width - 1) / 2 * (1 - 1 / factor)], [0, 1 / factor, (height - 1) / 2 * (1 - 1 / factor)]]
    )
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, matrix, (width, height), None, how, cv2.BORDER_REPLICATE)


_PLASMA_SIDE = 256


def _plasma(size: Size, decay: float, rng: np.random.Generator, unit: float) -> np.ndarray:
    """Return a plasma fractal, float32 of `size`; its map of 256 × 256 spans 0…1.

    Midpoint displacement on a torus: each round halves the spacing of the points, and each new point is the mean of its four
    neighbours plus uniform noise. The noise shrinks by decay² per round, as in the authors' code. The map covers 256 pixels of an image
    with a side of 224; pixels beyond it repeat it without a seam.
    Source: Fournier, Fussell & Carpenter 1982, "Computer rendering of stochastic
    models", section 3.
    """
    points: np.ndarray = np.zeros((1, 1), np.float32)
    amplitude = 1.0
    while len(points) < _PLASMA_SIDE:
        points = _displaced(points, amplitude, rng)
        amplitude /= decay**2
    points -= points.min()
    points /= max(float(points.max()), 1e-6)
    side = max(1, round(_PLASMA_SIDE * unit))
    if side != _PLASMA_SIDE:
        how = cv2.INTER_AREA if side < _PLASMA_SIDE else cv2.INTER_LINEAR
        points = cv2.resize(points, (side, side), interpolation=how)
    return points[np.arange(size[0])[:, None] % side, np.arange(size[1]) % side]


def _displaced(points: np.ndarray, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Halve the spacing of a periodic height map: (N, N) to (2N, 2N)."""

    def noise() -> np.ndarray:
        return rng.uniform(-amplitude, amplitude, points.shape).astype(np.float32)

    down, across = points + np.roll(points, -1, 0), points + np.roll(points, -1, 1)
    centres = (down + np.roll(down, -1, 1)) / 4 + noise()
    result = np.empty((2 * len(points), 2 * len(points)), np.float32)
    result[::2, ::2], result[1::2, 1::2] = points, centres
    result[::2, 1::2] = (across + centres + np.roll(centres, 1, 0)) / 4 + noise()
    result[1::2, ::2] = (down + centres + np.roll(centres, 1, 1)) / 4 + noise()
    return result


def _standardized(values: np.ndarray) -> np.ndarray:
    """Scale the values to mean 0 and standard deviation 1; zeros if all values are equal."""
    return (values - values.mean()) / max(float(values.std()), 1e-6)


CORRUPTIONS: Mapping[str, Corrupt] = MappingProxyType(
    {
        "gaussian_noise": _gaussian_noise,
        "shot_noise": _shot_noise,
        "impulse_noise": _impulse_noise,
        "speckle_noise": _speckle_noise,
        "defocus_blur": _defocus_blur,
        "glass_blur": _glass_blur,
        "motion_blur": _motion_blur,
        "zoom_blur": _zoom_blur,
        "gaussian_blur": _gaussian_blur,
        "snow": _snow,
        "frost": _frost,
        "fog": _fog,
        "brightness": _brightness,
        "spatter": _spatter,
        "contrast": _contrast,
        "elastic_transform": _elastic_transform,
        "pixelate": _pixelate,
        "jpeg_compression": _jpeg_compression,
        "saturate": _saturate,
    }
)


@dataclass(frozen=True, kw_only=True)
class Corruption(PixelOp):
    """Apply one of the 19 corruptions of ImageNet-C, for robustness tests rather than training.

    names: `all`, one name or a list; the op draws one uniformly. severity: in [1, 5], drawn uniformly among the whole numbers.
    Source: Hendrycks & Dietterich 2019, arXiv:1903.12261; deviations in `refract.augment.ops.corruption`.
    """

    names: str | tuple[str, ...] = "all"
    severity: int | tuple[int, int] = (1, 5)

    def __post_init__(self) -> None:
        super().__post_init__()
        names: Any = CORRUPTIONS if self.names == "all" else [self.names] if isinstance(self.names, str) else self.names
        for name in names:
            if name not in CORRUPTIONS:
                raise ValueError(f"names: no corruption is called {name!r}; known: all, {', '.join(CORRUPTIONS)}")
        if not names:
            raise ValueError("names: the list is empty; add at least one corruption, or use all")
        self._set("names", tuple(names))
        low, high = interval("severity", self.severity, 1, 5)
        self._set("severity", (whole("severity", low, 1), whole("severity", high, 1)))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        name = self.names[int(rng.integers(len(self.names)))]
        severity = int(rng.integers(self.severity[0], self.severity[1] + 1))  # type: ignore[index]
        return {"name": name, "severity": severity, "seed": int(rng.integers(1 << 62))}

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        return corrupt(image, args["name"], args["severity"], seed=args["seed"])

    @staticmethod
    def moves_pixels(args: Args) -> bool:
        return args["name"] == "elastic_transform"


def corrupt(image: np.ndarray, name: str, severity: int, *, seed: int) -> np.ndarray:
    """Return a corrupted copy of `image`, uint8 H×W×3.

    name: a key of `CORRUPTIONS`; severity: 1…5; the same seed gives the same pixels. Raises ValueError for another name or severity.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"no corruption is called {name!r}; known: {', '.join(CORRUPTIONS)}")
    if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity: {severity!r} is not a whole number in 1…5")
    rng = np.random.Generator(np.random.Philox(seed))
    pixels = np.ascontiguousarray(image, np.float32) / 255
    result = CORRUPTIONS[name](pixels, severity - 1, rng, min(image.shape[:2]) / 224)
    return np.clip(np.rint(255 * result), 0, 255).astype(np.uint8)


CORRUPTION: Mapping[str, type[Op]] = MappingProxyType({"Corruption": Corruption})
