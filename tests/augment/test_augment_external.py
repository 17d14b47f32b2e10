"""Third-party transforms are seeded by the sample's key: their results do not depend on order, thread or process."""

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from refract.augment import Augmenter, Plan, PolicyError, load_policy

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
EXTERNAL: dict[str, list[Any]] = {
    "albumentations": [{"albumentations.GaussNoise": {"std_range": [0.1, 0.3], "p": 0.9}}, "albumentations.RandomFog"],
    "imgaug": [{"imgaug.AdditiveGaussianNoise": {"scale": [5, 30]}}, {"imgaug.Dropout": {"p": 0.1}}],
    "torchvision": [{"torchvision.RandomPosterize": {"bits": 3}}, {"torchvision.ColorJitter": {"brightness": 0.5}}],
}


@pytest.mark.parametrize("library", EXTERNAL)
def test_same_key_same_pixels_in_any_order_and_thread(library: str) -> None:
    augmenter = Augmenter(EXTERNAL[library], seed=5)
    forward = [augmenter(IMAGE, epoch=0, index=i) for i in range(12)]
    assert len({image.tobytes() for image in forward}) >= 11, "each sample has a separate draw"
    np.random.seed(1)
    torch.manual_seed(1)
    for i in reversed(range(12)):
        np.testing.assert_array_equal(Augmenter(EXTERNAL[library], seed=5)(IMAGE, epoch=0, index=i), forward[i])
    with ThreadPoolExecutor(4) as pool:
        threads = list(pool.map(lambda i: augmenter(IMAGE, epoch=0, index=i % 12), range(96)))
    for i, image in enumerate(threads):
        np.testing.assert_array_equal(image, forward[i % 12])


def test_global_generators_are_unchanged() -> None:
    augmenter = Augmenter([entry for entries in EXTERNAL.values() for entry in entries], seed=5)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = np.random.random(), torch.rand(()).item()
    np.random.seed(3)
    torch.manual_seed(3)
    augmenter(IMAGE, epoch=0, index=0)
    assert (np.random.random(), torch.rand(()).item()) == expected


@pytest.mark.parametrize("library", EXTERNAL)
def test_plan_replays_from_json(library: str) -> None:
    augmenter = Augmenter(EXTERNAL[library], seed=5)
    plan = augmenter.draw(IMAGE.shape[:2], epoch=2, index=7)
    replayed = Augmenter("none").apply(Plan.from_json(plan.to_json()), IMAGE)
    np.testing.assert_array_equal(replayed, augmenter(IMAGE, epoch=2, index=7))
    assert load_policy(augmenter.policy.to_spec()) == augmenter.policy


def test_p_belongs_to_the_op_except_for_imgaug_transforms_with_a_p() -> None:
    augmenter = Augmenter([{"albumentations.InvertImg": {"p": 0.25}}])
    draws = sum(bool(augmenter.draw((9, 9), epoch=0, index=i).steps) for i in range(2000))
    assert 430 < draws < 570
    inverted = Augmenter([{"albumentations.InvertImg": {"p": 1.0}}])(IMAGE, epoch=0, index=0)
    np.testing.assert_array_equal(inverted, 255 - IMAGE)
    dropped = Augmenter([{"imgaug.Dropout": {"p": 0.5}}])(np.full((200, 200, 3), 9, np.uint8), epoch=0, index=0)
    assert (dropped == 0).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("albumentations.RandomFogg", r"albumentations has no transform 'RandomFogg'; did you mean RandomFog\?"),
        ({"albumentations.RandomFog": {"alpha": 1}}, "has no parameter 'alpha'; did you mean alpha_coef"),
        ({"albumentations.RandomFog": {"alpha_coef": "much"}}, "albumentations.RandomFog rejected its parameters"),
        ({"albumentations.RandomFog": {"p": 2}}, r"p: 2 is not a number in \[0, 1\]"),
        ({"albumentations.Resize": {"height": 9, "width": 9}}, "must keep dtype and shape"),
        ({"torchvision.RandomCrop": {"size": 9}}, "must keep dtype and shape"),
        ("albumentations.D4", "must keep dtype and shape"),  # in every second draw
        ("imgaug.Fgo", "imgaug has no transform 'Fgo'"),
        ("torchvision.functional", "torchvision has no transform"),
        ("kornia.RandomFog", "no op is called 'kornia.RandomFog'"),
        (
            {"ThirdPartyTransform": {"transform": "RandomFog"}},
            "does not start with one of albumentations, imgaug, torchvision",
        ),
    ],
)
def test_invalid_transforms_are_rejected(spec, message: str) -> None:
    with pytest.raises(PolicyError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_policy([spec])


def test_libraries_are_imported_only_when_a_policy_names_them() -> None:
    code = (
        "import sys; from refract.augment import Augmenter; Augmenter('imagenet').draw((9, 9), epoch=0, index=0); "
        "print([name for name in ('albumentations', 'imgaug', 'torchvision') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_imgaug_transform_with_global_draws_depends_only_on_the_key() -> None:
    augmenter = Augmenter(["imgaug.MultiplyAndAddToBrightness"])
    for index in range(20):
        first, second = (augmenter(IMAGE, epoch=0, index=index) for _ in range(2))
        np.testing.assert_array_equal(first, second)


def test_torchvision_transform_does_not_seed_the_gpu_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU generator was seeded"))
    Augmenter(["torchvision.GaussianNoise"])
