"""Errors of a policy name the position, the op, the parameter and the accepted values."""

from pathlib import Path

import numpy as np
import pytest

from refract.augment import Augmenter, Plan, PolicyError, load_policy
from refract.augment.policy import presets
from refract.augment.registry import OPS


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([{"HorizontalFilp": {}}], r"op 1: no op is called 'HorizontalFilp'; did you mean HorizontalFlip\?"),
        (["HorizontalFlip", {"Rotate": {"degree": 3}}], r"op 2, Rotate: no parameter 'degree'; did you mean degrees\?"),
        ([{"Rotate": {"degrees": "ten"}}], r"Rotate: degrees: 'ten' is not a number in \[0, 360\]"),
        ([{"HorizontalFlip": {"p": 1.5}}], r"p: 1.5 is not a number in \[0, 1\]"),
        ([{"HorizontalFlip": {"p": True}}], "p: True is not a number"),
        ([{"Affine": {"scale": [2, 1]}}], "lower bound above its upper bound"),
        ([{"RandomCrop": {}}], r"RandomCrop: .*size"),
        ([{"Resize": {"size": 0}}], "size: 0 is not a side in pixels"),
        ([{"Cutout": {"fill": 300}}], "fill: 300 is not a grey level"),
        ([{"Rotate": {"interpolation": "nearest"}}], "interpolation: 'nearest' is not one of bilinear, bicubic"),
        ([{"PadAndCrop": {"border": "mirror"}}], "border: 'mirror' is not one of constant, edge, reflect, reflect101"),
        ([{"GaussianNoise": {"sigma": float("nan")}}], "sigma: nan is not a number"),
        ([{"MixUp": {"alpha": 0}}], "alpha: 0 is not positive"),
        ([{"ColorJitter": {"brightness": float("inf")}}], "brightness: inf is not a number"),
        ([{"ColorJitter": {"contrast": [0, 10**400]}}], "is not a number"),
        ([{"RandomErasing": {"value": "noise"}}], "value: 'noise' is not a paint"),
        ([{"Rotate": {}, "Resize": {"size": 3}}], "one op's name"),
        ([{"Rotate": 5}], "parameters are a mapping"),
        ([3], "one op's name"),
        ({"Rotate": {}}, "a policy is a list of ops"),
        ("imagnet", r"neither a file nor a preset .*did you mean imagenet\?"),
    ],
)
def test_errors_name_the_op_and_the_parameter(spec, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        load_policy(spec)


def test_former_names_are_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    former = [
        {"WordDelete": {"share": 0.3}},
        {"Translate": {"share": 0.2}},
        {"OneOf": {"ops": [{"Guest": {"transform": "torchvision.RandomInvert"}}]}},
    ]
    policy = load_policy(former)
    assert policy == load_policy(
        [
            {"WordDelete": {"fraction": 0.3}},
            {"Translate": {"fraction": 0.2}},
            {"OneOf": {"ops": [{"ThirdPartyTransform": {"transform": "torchvision.RandomInvert"}}]}},
        ]
    )
    assert caplog.messages[:2] == [
        "policy, op 1, WordDelete: share is deprecated; write fraction",
        "policy, op 2, Translate: share is deprecated; write fraction",
    ]
    assert (
        caplog.messages[2].endswith("op 1: Guest is deprecated; write ThirdPartyTransform")
        and len(caplog.messages) == 3
    )
    with pytest.raises(PolicyError, match="share is the former name of fraction; remove share"):
        load_policy([{"WordDelete": {"share": 0.3, "fraction": 0.3}}])


def test_plans_of_an_earlier_version_are_read() -> None:
    plan = Plan.from_json(
        '{"version": 1, "size": [9, 9], "steps": ['
        '{"op": "Guest", "transform": "torchvision.RandomInvert", "parameters": {}, "seed": 1},'
        '{"op": "AugMix", "share": 0.5, "weights": [1.0], "chains": [[]]}]}'
    )
    assert [step.op for step in plan.steps] == ["ThirdPartyTransform", "AugMix"]
    image = Augmenter("none").apply(plan, np.full((9, 9, 3), 55, np.uint8))
    assert (image == 200).all()


def test_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("- HorizontalFlip\n- Rotate: {degrees: [5, 10]}\n")
    assert load_policy(file) == load_policy(["HorizontalFlip", {"Rotate": {"degrees": [5, 10]}}])
    file.write_text("- Rotate: {degrees: [5, 10}\n")
    with pytest.raises(PolicyError, match="mine.yaml: not valid YAML"):
        load_policy(file)
    file.write_text("- Rotate: {degrees: 5, degrees: 10}\n")
    with pytest.raises(PolicyError, match="duplicate key 'degrees'"):
        load_policy(file)
    file.write_text("- Rotat: {}\n")
    with pytest.raises(PolicyError, match="mine.yaml, op 1: no op is called 'Rotat'"):
        load_policy(file)


def test_presets_exist_and_fit_their_use() -> None:
    expected = {"digits", "cifar", "imagenet", "imagenet-a1", "torchvision-v2", "fine-tune", "medical-safe", "none"}
    assert expected == set(presets())
    safe = load_policy("medical-safe").ops
    assert all(op.kind in ("geometric", "pixel") and "Flip" not in op.name for op in safe)
    assert not any(type(op).__name__.endswith("Flip") for op in load_policy("digits").ops), (
        "a flipped digit is not the same digit"
    )


def test_any_preset_accepts_a_size() -> None:
    for name in presets():
        assert Augmenter(name, size=(40, 30)).draw((97, 61), epoch=0, index=1).size == (97, 61)


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_documented(name: str) -> None:
    assert OPS[name].__name__ == name
    assert len((OPS[name].__doc__ or "").splitlines()[0]) > 20
