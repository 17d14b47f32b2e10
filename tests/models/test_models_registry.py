"""Networks by name: all of Refract's, and one of each family of the catalogues."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from refract.models.architectures.handcrafted_features import HoG
from refract.models.architectures.resnet import BasicBlock
from refract.models.registry import NETWORKS, build, head_of, weights_preprocess

SOME = [*NETWORKS, "resnet18", "timm/resnet10t", "timm/mobilenetv3_small_050"]
# One of each family whose head sits in another place, or whose input or output needs care.
FAMILIES = {
    "torchvision/alexnet": 64,
    "torchvision/squeezenet1_1": 64,
    "torchvision/mobilenet_v3_small": 64,
    "torchvision/shufflenet_v2_x0_5": 64,
    "torchvision/googlenet": 64,
    "torchvision/inception_v3": 75,
    "torchvision/vit_b_32": 64,
    "timm/vit_tiny_patch16_224": 64,
    "timm/deit_tiny_distilled_patch16_224": 64,
    "timm/resnet18.a1_in1k": 64,
}


def made(name: str, num_classes: int, size: tuple[int, int] = (32, 32)) -> nn.Module:
    """The network as training begins with it."""
    torch.manual_seed(0)
    network = build(name, num_classes, image_size=size, **({"centres": 8} if name == "rbf" else {}))
    if hasattr(network, "prepare"):
        network.prepare(torch.randn(64, 3, *size))
    return network


@pytest.mark.parametrize("name", SOME)
def test_forward_shape_and_a_gradient_for_every_parameter(name: str) -> None:
    network = made(name, 5)
    logits = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    without = [key for key, p in network.named_parameters() if p.grad is None and p.requires_grad]
    assert without == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, "timm/mobilenetv3_small_050"])
def test_overfits_one_batch(name: str) -> None:
    network = made(name, 4).train()
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    fixed = name in ("rbf", "linear")  # features that do not learn: the head is all there is
    if name == "rbf":
        network.prepare(images)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1 if fixed else 2e-3)
    for _ in range(200 if fixed else 20):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Chance is log 4 = 1.39; the worst of these ends below 0.1.
    assert loss.item() < 0.4


@pytest.mark.parametrize(("name", "size"), FAMILIES.items())
def test_every_family_gives_one_plain_tensor_in_training_too_and_has_a_head(name: str, size: int) -> None:
    network = build(name, 7, image_size=(size, size)).train()
    assert network(torch.randn(2, 3, size, size)).shape == (2, 7)
    rows = [p.shape[0] for p in head_of(network).parameters()]
    assert rows and set(rows) == {7}


def test_squeezenet_gives_logits_below_zero() -> None:
    torch.manual_seed(0)
    logits = build("squeezenet1_1", 50, image_size=(64, 64)).eval()(torch.randn(2, 3, 64, 64))
    assert (logits < 0).any()


@pytest.mark.parametrize("size", [(28, 28), (32, 48), (64, 64)])
@pytest.mark.parametrize("name", NETWORKS)
def test_own_networks_accept_other_sizes(name: str, size: tuple[int, int]) -> None:
    assert build(name, 3, image_size=size)(torch.randn(2, 3, *size)).shape == (2, 3)


def test_own_networks_have_the_papers_number_of_parameters() -> None:
    def count(name: str) -> int:
        return sum(p.numel() for p in build(name, 10, image_size=(32, 32)).parameters())

    # LeCun 1998 with three channels, all connections and plain pooling: 456 + 2416 + 48120 + 10164 + 850.
    assert count("lenet5") == 62006
    # He et al. 2016, table 6: 0.27 M.
    assert count("resnet20") == 269722


def test_resnet20s_shortcut_is_option_a() -> None:
    block = BasicBlock(2, 5, stride=2)
    nn.init.zeros_(block.bn2.weight)  # the residual is gone, the shortcut stays
    images = torch.rand(1, 2, 6, 6)
    result = block.eval()(images)
    assert torch.equal(result[:, :2], images[:, :, ::2, ::2])
    assert torch.equal(result[:, 2:], torch.zeros(1, 3, 3, 3))


@pytest.mark.parametrize(("name", "smallest"), [("lenet5", 16), ("resnet20", 8)])
def test_too_small_images_are_refused(name: str, smallest: int) -> None:
    build(name, 2, image_size=(smallest, smallest))
    with pytest.raises(ValueError, match=rf"image_size=\({smallest - 1}, 40\).*{smallest}"):
        build(name, 2, image_size=(smallest - 1, 40))


def test_the_prefix_forces_the_catalogue() -> None:
    assert type(build("resnet18", 2, image_size=(32, 32))).__module__.startswith("torchvision.")
    assert type(build("timm/resnet18", 2, image_size=(32, 32))).__module__.startswith("timm.")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet19", "torchvision/resnet18"),
        ("timm/resnet10tt", "timm/resnet10t"),
        ("lenet", "lenet5"),
        ("hf-hub:timm/resnet18", "lenet5, resnet20"),
        ("timm/hf-hub:timm/resnet18", "lenet5, resnet20"),
        ("timm/local-dir:/tmp", "lenet5, resnet20"),
    ],
)
def test_an_unknown_name_lists_own_networks_and_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=r"is unknown: expected one of lenet5, resnet20") as caught:
        build(name, 2, image_size=(32, 32))
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "timm/resnet10t"])
def test_arguments_that_the_network_rejects(name: str) -> None:
    with pytest.raises(ValueError, match=r"rejects its arguments.*depht"):
        build(name, 2, image_size=(32, 32), depht=3)


@pytest.mark.parametrize("key", ["pretrained", "pretrained_cfg", "checkpoint_path", "weights_backbone", "cache_dir"])
def test_arguments_that_could_load_a_file_are_reserved(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key!r} is reserved"):
        build("timm/resnet10t", 2, image_size=(32, 32), **{key: "/tmp/x.pth"})


def test_arguments_reach_the_network() -> None:
    network = build("timm/resnet10t", 2, image_size=(32, 32), drop_rate=0.25)
    assert network.drop_rate == 0.25


def test_own_networks_have_no_pretrained_weights() -> None:
    with pytest.raises(ValueError, match="weights='default': lenet5 has no pretrained weights"):
        build("lenet5", 2, image_size=(32, 32), weights="default")


def test_the_preprocessing_of_pretrained_weights() -> None:
    expected = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "image_size": [224, 224]}
    assert weights_preprocess("resnet18", "default") == {**expected, "crop_ratio": 224 / 256}
    assert weights_preprocess("timm/resnet10t", "default") == {
        **expected,
        "image_size": [176, 176],
        "crop_ratio": 0.875,
    }
    assert weights_preprocess("resnet18", "none") is None
    assert weights_preprocess("lenet5", "default") is None


@pytest.mark.slow
def test_what_a_server_imports_stays_light() -> None:
    code = (
        "import sys, refract.models.bundle.bundle, refract.models.classifier, refract.models.registry\n"
        "refract.models.registry.build('resnet20', 2, image_size=(32, 32))\n"
        "heavy = {'lightning', 'torchmetrics', 'mlflow', 'torchvision', 'timm', 'refract.augment', 'refract.pipeline', 'refract.serve'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


@pytest.mark.parametrize(
    ("degrees", "wanted"),
    [(0, {0: 1.0}), (30, {1: 0.5, 2: 0.5}), (90, {4: 0.5, 5: 0.5}), (100, {5: 1.0}), (175, {8: 0.25, 0: 0.75})],
)
def test_hog_votes_for_the_two_nearest_of_nine_directions(degrees: float, wanted: dict[int, float]) -> None:
    """A ramp has one direction; a bin is 20° wide, and a vote is shared by how near its two neighbours are."""
    down, across = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    turn = math.radians(degrees)
    ramp = (across * math.cos(turn) + down * math.sin(turn)).expand(1, 3, 24, 24)
    blocks = HoG((24, 24), cell=4)(ramp).view(1, 4, 9, 5, 5)[0, :, :, 2, 2]  # of the middle, which knows no border
    histograms = blocks / blocks.sum(dim=1, keepdim=True)
    votes = torch.zeros(9)
    for place, share in wanted.items():
        votes[place] = share
    clipped = torch.nn.functional.normalize(votes.repeat(4), dim=0).clamp(max=0.2).view(4, 9)  # L2-Hys
    torch.testing.assert_close(histograms, clipped / clipped.sum(dim=1, keepdim=True), atol=1e-3, rtol=0)


def test_stochastic_depth_rises_linearly_to_the_last_branch() -> None:
    network = build("cnn", 2, image_size=(16, 16), widths=[8, 8], depth=3, residual=True, drop_path=0.4)
    assert [module.p for module in network.modules() if isinstance(module, StochasticDepth)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4]
    )


def test_fastnets_third_convolution_is_residual() -> None:
    network = build("fastnet", 3, image_size=(32, 32), widths=[8, 8, 8], depth=3).eval()
    stage = network.stages[0]
    with torch.no_grad():
        stage.conv3.weight.zero_()
        values = torch.randn(2, 24, 16, 16)
        first = nn.functional.gelu(stage.norm1(nn.functional.max_pool2d(stage.conv1(values), 2)))
        assert torch.equal(stage(values), nn.functional.gelu(first)), (
            "the output of the first convolution is passed through"
        )
    with pytest.raises(ValueError, match="depth=4: expected 2 or 3"):
        build("fastnet", 3, image_size=(32, 32), depth=4)
    for widths in ([64, 64], [64, 0, 64], [64, 1.5, 64]):
        with pytest.raises(ValueError, match=r"widths=.*: expected three whole numbers above 0"):
            build("fastnet", 3, image_size=(32, 32), widths=widths)


@pytest.mark.parametrize("features", ["pixels", "colour_histogram", "hog"])
def test_a_linear_classifier_fits_its_features(features: str) -> None:
    network = build("linear", 3, image_size=(24, 32), args={"features": features}).eval()
    assert network(torch.rand(2, 3, 24, 32)).shape == (2, 3)


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_a_dropout_outside_its_range_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"dropout=1.5"):
        build(name, 3, image_size=(16, 16), args={"dropout": 1.5})
