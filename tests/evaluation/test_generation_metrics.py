"""Generated images against real ones: in a classifier's features, and in Inception's through torch-fidelity."""

import sys
import urllib.error

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_collapse import CollapseError
from timm_collapse.data import open_dataset
from timm_collapse.data.images import photo_tensor
from timm_collapse.evaluation import (
    Features,
    FeatureStatistics,
    classifier_score,
    evaluate_generation,
    evaluate_inception,
    extract_features,
    extract_inception_features,
    fidelity,
    frechet_distance,
    kid,
    prdc,
)

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SHAPE)


@pytest.fixture(scope="module")
def digits():
    """Images in [0, 1] and labels of the 360 digits of the validation split."""
    dataset = open_dataset("digits", "validation").dataset
    return torch.stack([photo_tensor(dataset[i][0], 8) for i in range(360)]), torch.tensor(dataset.labels)


def quiet(model, images, **kwargs):
    return extract_features(model, images, device="cpu", progress=False, **kwargs)


def random_features(n, d=6, shift=0.0, seed=0, name="net"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) + shift
    return Features(x, torch.randn(n, 4, generator=generator), None, name)


@pytest.mark.parametrize("name", ["vit", "test_resnet", "test_efficientnet"])
def test_features_are_those_of_the_model(name, model):
    network = model if name == "vit" else timm.create_model(name, num_classes=10)
    config = timm.data.resolve_model_data_config(network)
    size = 32 if name == "vit" else config["input_size"][1]
    images = torch.rand(3, 3, size, size)
    network.train()
    found = quiet(network, images, batch_size=2)
    assert network.training
    network.eval()
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = network((images - mean) / std)
        again = network.get_classifier()(found.features)
    assert found.features.shape == (3, network.num_features) and found.labels is None
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
    assert found.name.startswith(network.pretrained_cfg["architecture"] + ".")


def test_images_are_resized_whole_and_may_be_uint8(model):
    # black and white, so that bicubic overshoots
    pixels = 255 * torch.randint(0, 2, (2, 3, 48, 48), dtype=torch.uint8)
    from_bytes = quiet(model, pixels).features
    torch.testing.assert_close(from_bytes, quiet(model, pixels / 255).features)
    photos = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]
    by_pillow = quiet(model, torch.stack([photo_tensor(photo, 32) for photo in photos])).features
    # Pillow rounds to 8 bits
    torch.testing.assert_close(from_bytes, by_pillow, rtol=0, atol=0.005)
    wide = torch.zeros(2, 3, 48, 80, dtype=torch.uint8)
    wide[..., 16:64] = pixels
    torch.testing.assert_close(quiet(model, wide).features, from_bytes)


def test_batches_with_labels(model, digits):
    images, labels = digits
    batches = [(images[:50], labels[:50]), (images[50:70], labels[50:70])]
    found = quiet(model, batches, name="mine")
    assert torch.equal(found.labels, labels[:70]) and found.name == "mine"
    torch.testing.assert_close(found.features, quiet(model, images[:70]).features, rtol=1e-4, atol=1e-5)
    half = quiet(model, images[:70], precision="bf16").features
    assert half.dtype == torch.float32 and 0 < (half - found.features).abs().max() < 0.1


def test_digits_from_end_to_end(model, digits):
    images, labels = digits
    even, odd = (quiet(model, images[part::2]) for part in (0, 1))
    noise = quiet(model, torch.rand(180, 3, 8, 8))
    few = quiet(model, images[1:25:2].repeat(15, 1, 1, 1) * 0.99)
    good, bad = evaluate_generation(odd, even, device="cpu"), evaluate_generation(noise, even, device="cpu")
    lost = evaluate_generation(few, even, device="cpu")
    assert good.frechet < 0.1 * bad.frechet and abs(good.kid) < 0.1 * bad.kid
    assert good.precision > 0.8 > bad.precision and good.coverage > 0.8 > bad.coverage
    assert lost.precision > 0.8 and lost.recall < 0.2 and lost.coverage < 0.5 and lost.frechet > 2 * good.frechet
    assert 0.7 < good.density < 1.3 and good.samples == good.references == 180 and good.k == 5
    assert good.label_accuracy is None and good.features == even.name
    assert good == evaluate_generation(odd, even, device="cpu")  # seeded


def test_the_report_is_its_parts():
    fake, real = random_features(40), random_features(50, shift=0.2, seed=1)
    fake.labels = fake.logits.argmax(1)
    fake.labels[:10] = (fake.labels[:10] + 1) % 4
    found = evaluate_generation(fake, real, k=3, kid_subset_size=50 - 10, kid_subsets=2, seed=3, device="cpu")
    generator = torch.Generator().manual_seed(3)
    assert (found.classifier_score, found.classifier_score_std) == classifier_score(fake.logits, 10, generator)
    assert (found.kid, found.kid_std) == kid(fake.features, real.features, 40, 2, generator)
    assert (found.precision, found.recall, found.density, found.coverage) == prdc(real.features, fake.features, 3)
    own, other = fake.statistics(), real.statistics()
    distance = frechet_distance(own.mean, own.covariance, other.mean, other.covariance)
    assert found.frechet == pytest.approx(distance) and found.label_accuracy == 0.75

    alone = evaluate_generation(fake, statistics=other, device="cpu").to_dict()
    assert alone["frechet"] == pytest.approx(distance) and alone["references"] == 50
    assert [alone[key] for key in ("kid", "kid_std", "precision", "recall", "density", "coverage")] == [None] * 6
    shifted = FeatureStatistics().update(real.features + 1)
    both = evaluate_generation(fake, real, shifted, k=3, kid_subsets=2, device="cpu")
    assert both.precision == found.precision and both.frechet > distance + 1


def with_labels(labels):
    fake = random_features(20)
    fake.labels = labels
    return fake


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: evaluate_generation(random_features(20)), "real and statistics: at least one of them is needed"),
        (lambda: evaluate_generation(random_features(20), random_features(5)), "k must be 1 to 4, .* got 5"),
        (lambda: evaluate_generation(random_features(20), random_features(20, 7)), "same width"),
        (lambda: evaluate_generation(random_features(20), random_features(20, name="b")), "real must be of the same"),
        (lambda: evaluate_generation(random_features(20), statistics=FeatureStatistics("b")), "statistics must be of"),
        (lambda: evaluate_generation(random_features(20, shift=torch.nan), random_features(20)), "fake must be finite"),
        (lambda: evaluate_generation(random_features(20), random_features(20, shift=torch.inf)), "real must be finite"),
        (lambda: evaluate_generation(random_features(9), random_features(20)), "splits must be 1 to 9"),
        (lambda: evaluate_generation(with_labels(torch.full((20,), 4)), random_features(20)), r"labels .* \[0, 4\)"),
        (
            lambda: evaluate_generation(with_labels(torch.zeros(3).long()), random_features(20)),
            r"labels must be \(20,\)",
        ),
    ],
)
def test_bad_features(call, message):
    with pytest.raises(CollapseError, match=message):
        call()


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.rand(2, 3, 8, 8) - 0.5, r"in \[0, 1\], clamped and not normalised, got -0"),
        (torch.full((2, 3, 8, 8), torch.nan), "got nan"),
        (torch.ones(2, 3, 8, 8, dtype=torch.long), "uint8, or floating point"),
        (torch.rand(2, 1, 8, 8), r"\(B, 3, H, W\)"),
        (torch.rand(0, 3, 8, 8), "at least one"),
        ([], "at least one"),
        ([torch.rand(1, 3, 8, 8), (torch.rand(1, 3, 8, 8), torch.zeros(1))], "labels must be given for all"),
    ],
)
def test_bad_images(model, images, message):
    with pytest.raises(CollapseError, match=message):
        quiet(model, images)


def test_models_that_cannot_be_used(model):
    with pytest.raises(CollapseError, match="forward_features and forward_head, as timm's, got Linear"):
        quiet(torch.nn.Linear(2, 2), torch.rand(1, 3, 8, 8))
    with pytest.raises(CollapseError, match="precision must be no or bf16"):
        quiet(model, torch.rand(1, 3, 8, 8), precision="fp16")
    unpooled = timm.create_model("vit_tiny_patch16_224", **{**SHAPE, "global_pool": "", "num_classes": 0})
    with pytest.raises(CollapseError, match="must pool its features"):
        quiet(unpooled, torch.rand(1, 3, 8, 8))


class Pixels(torch.utils.data.Dataset):
    """What torch-fidelity takes: uint8 images without labels."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture
def tiny(monkeypatch):
    """Puts a small network in Inception's place; its metrics are then torch-fidelity's, without the weights."""
    from torch_fidelity import registry
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Tiny(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.project = torch.nn.Linear(3 * 64, 12, bias=False)
            with torch.no_grad():
                generator = torch.Generator().manual_seed(0)
                self.project.weight.copy_(torch.randn(12, 192, generator=generator) / 500)

        @staticmethod
        def get_provided_features_list():
            return "2048", "logits_unbiased"

        get_default_feature_layer_for_metric = staticmethod(
            lambda metric: "logits_unbiased" if metric == "isc" else "2048"
        )

        def forward(self, images):
            assert images.dtype == torch.uint8
            out = self.project(images.flatten(1).float())
            return tuple(out if name == "2048" else out[:, :5] for name in self.features_list)

    monkeypatch.setitem(registry.FEATURE_EXTRACTORS_REGISTRY, "tiny", Tiny)
    monkeypatch.setattr(fidelity, "EXTRACTOR", "tiny")
    return Tiny


def inception(images, **kwargs):
    return extract_inception_features(images, device="cpu", progress=False, **kwargs)


def test_inception_metrics_are_torch_fidelitys(tiny, digits):
    import torch_fidelity

    pixels = (digits[0] * 255).round().to(torch.uint8)
    fake, real = pixels[:60].roll(1, 2), pixels[60:160]
    found = evaluate_inception(inception(fake.float() / 255), inception(real, batch_size=7), kid_subset_size=40)
    expected = torch_fidelity.calculate_metrics(
        input1=Pixels(fake), input2=Pixels(real), feature_extractor="tiny", isc=True, fid=True, kid=True, prc=True,
        kid_subset_size=40, cuda=False, cache=False, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    assert found.samples == 60 and found.references == 100 and found.k == 3
    assert found.fid == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert found.inception_score == pytest.approx(expected["inception_score_mean"], rel=1e-5)
    assert found.inception_score_std == pytest.approx(expected["inception_score_std"], rel=1e-3)
    assert found.kid == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert found.kid_std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)
    assert (found.precision, found.recall) == (expected["precision"], expected["recall"])


def test_fid_against_statistics_in_a_file(tiny, digits, tmp_path):
    fake, real = inception(digits[0][:60].roll(1, 2)), inception(digits[0][60:160])
    direct = evaluate_inception(fake, real)
    np.savez(tmp_path / "adm.npz", mu=real.features.numpy().mean(0), sigma=np.cov(real.features.numpy(), rowvar=False))
    statistics = FeatureStatistics.from_npz(tmp_path / "adm.npz")
    alone = evaluate_inception(fake, statistics=statistics)
    assert alone.fid == pytest.approx(direct.fid, rel=1e-5) and direct.fid > 0
    assert (alone.kid, alone.precision, alone.recall, alone.references) == (None,) * 4
    assert evaluate_inception(fake).fid is None
    own = evaluate_generation(fake, real, kid_subsets=2, device="cpu")  # the same distance by other means
    assert own.frechet == pytest.approx(direct.fid, rel=1e-4)
    both = evaluate_inception(fake, fake, statistics)
    assert both.fid == alone.fid and both.precision == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: evaluate_inception(random_features(20)), "fake must be of 'tiny'"),
        (lambda f: evaluate_inception(f(20), random_features(20)), "real must be of 'tiny'"),
        (lambda f: evaluate_inception(f(20), statistics=FeatureStatistics("net")), "statistics must be of 'tiny'"),
        (lambda f: evaluate_inception(f(9), f(20)), "at least 10 images, the splits of the score, got 9"),
        (lambda f: evaluate_inception(f(20), f(3)), "k must be 1 to 2, .* got 3"),
        (lambda f: evaluate_inception(f(20), f(20), kid_subset_size=21), "kid_subset_size must be 2 to 20, got 21"),
        (lambda f: evaluate_inception(f(20), statistics=f(20, 7).statistics()), "width 6 of the features, got 7"),
        (lambda f: evaluate_inception(f(20, shift=torch.nan), f(20)), "fake must be finite"),
    ],
)
def test_bad_inception_features(tiny, call, message):
    with pytest.raises(CollapseError, match=message):
        call(lambda *args, **kwargs: random_features(*args, **kwargs, name="tiny"))


def test_without_torch_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", None)
    with pytest.raises(CollapseError, match="pip install torch-fidelity"):
        inception(torch.rand(1, 3, 8, 8))


def test_inceptions_weights_are_found_or_named(monkeypatch, tmp_path):
    from torch_fidelity import feature_extractor_inceptionv3

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(CollapseError) as caught:
        inception(torch.rand(1, 3, 8, 8))
    text = str(caught.value)
    assert "https://github.com/toshas/torch-fidelity" in text and "--inception FILE" in text
    assert str(tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth") in text

    (tmp_path / "text.pth").write_text("no")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({"a": Pixels(0)}, tmp_path / "code.pth")  # would run code when it is unpickled
    wrong = {"text": "cannot be read", "none": "cannot be read", "code": "cannot be read", "other": "are not those of"}
    for name, message in wrong.items():
        with pytest.raises(CollapseError, match=message):
            inception(torch.rand(1, 3, 8, 8), weights=tmp_path / f"{name}.pth")


def test_inception_itself_with_random_weights(monkeypatch, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "empty.pth"))
    torch.save(network.state_dict(), tmp_path / "random.pth")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = inception(images, weights=tmp_path / "random.pth")
    assert found.features.shape == (2, 2048) and found.logits.shape == (2, 1008)
    assert found.name == "inception-v3-compat"
    torch.testing.assert_close(found.features, network(images)[0])
    torch.testing.assert_close(found.logits, found.features @ network.fc.weight.T)
