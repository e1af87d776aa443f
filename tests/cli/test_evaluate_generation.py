"""`timm-collapse evaluate-generation`: what it writes and prints, and that every failure is a CollapseError."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_collapse import CollapseError
from timm_collapse.cli import evaluate_generation as command
from timm_collapse.cli.main import build_parser
from timm_collapse.data import open_dataset
from timm_collapse.evaluation import Features, FeatureStatistics, fidelity
from timm_collapse.evaluation.samples import open_samples
from timm_collapse.hub.save import save_model

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
REAL = ["--dataset", "digits"]
QUICK = ["--workers", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    model.model_args = SHAPE
    return save_model(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """60 training digits as an .npz file of ADM's layout, and as a folder of class folders."""
    root, dataset = tmp_path_factory.mktemp("samples"), open_dataset("digits", "train").dataset
    images, labels = zip(*(dataset[i] for i in range(60)))
    np.savez(root / "all.npz", np.stack([np.asarray(image) for image in images]), np.array(labels))
    for i, (image, label) in enumerate(zip(images, labels)):
        (root / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(root / "folder" / str(label) / f"{i}.png")
    return root


@pytest.fixture
def run(here, capsys):
    """Runs the command in an empty folder; returns stdout and stderr."""

    def run(*argv):
        args = build_parser().parse_args(["evaluate-generation", *(str(argument) for argument in argv)])
        command.run(args)
        return capsys.readouterr()

    return run


def test_a_folder_of_class_folders_against_a_data_set(run, folder, samples):
    arguments = ["--samples", samples / "folder", "--features", folder, *REAL, *QUICK]
    out, _ = run(*arguments, "--json", "a.json", "--k", 3, "--images", 100)
    data = json.loads(Path("a.json").read_text())
    assert (data["samples"], data["references"], data["k"]) == (60, 100, 3) and data["dataset"] == "digits"
    assert data["features"].endswith("/tiny at 8 x 8") and str(folder) not in json.dumps(data)
    assert data["precision"] > 0.7 and data["recall"] > 0.7 and 0 <= data["label_accuracy"] <= 1
    assert "60 samples, 100 real images" in out and "Fréchet distance" in out and "label accuracy" in out
    assert not any(name in out for name in ("FID", "KID", "Inception"))  # these are of other features


def test_the_npz_file_holds_the_same_images(run, folder, samples):
    common = ["--features", f"local-dir:{folder}", *REAL, *QUICK, "--images", 80, "--json", "-"]
    # sorted by class in the folder, mixed in the file: only what is drawn at random may differ
    first, second = (json.loads(run("--samples", samples / name, *common)[0]) for name in ("folder", "all.npz"))
    assert first["frechet"] == pytest.approx(second["frechet"], rel=1e-4)
    assert first["label_accuracy"] == second["label_accuracy"] and first["coverage"] == second["coverage"]


def test_saved_statistics_stand_for_the_images(run, folder, samples):
    common = ["--samples", samples / "all.npz", "--features", folder, *QUICK, "--json", "-"]
    full = json.loads(run(*common, *REAL, "--save-statistics", "real.npz")[0])
    saved = FeatureStatistics.from_npz("real.npz")
    assert saved.count == 360 and saved.features == full["features"]
    out, err = run(*common, "--reference", "real.npz")
    again = json.loads(out)
    assert again["frechet"] == pytest.approx(full["frechet"]) and again["references"] == 360
    assert again["precision"] is None and again["label_accuracy"] == full["label_accuracy"]
    assert "Fréchet distance" in err and "precision" not in err

    FeatureStatistics("other at 8 x 8").update(torch.rand(9, 32)).to_npz("other.npz")
    with pytest.raises(CollapseError, match="statistics of 'other at 8 x 8', the samples' are of"):
        run(*common, "--reference", "other.npz")


def test_adms_reference_batch_is_images_to_a_classifier(run, folder, samples):
    images = np.load(samples / "all.npz")["arr_0"]
    np.savez("adm.npz", arr_0=images, mu=np.ones(2048), sigma=np.eye(2048))
    common = ["--samples", samples / "all.npz", "--features", folder, *QUICK, "--json", "-"]
    data = json.loads(run(*common, "--reference", "adm.npz")[0])
    assert data["references"] == 60 and data["frechet"] == pytest.approx(0, abs=1e-6) and data["coverage"] == 1
    np.savez("bare.npz", mu=np.ones(2048), sigma=np.eye(2048))
    with pytest.raises(CollapseError, match="statistics of 'an unnamed model'"):
        run(*common, "--reference", "bare.npz")


def test_class_folders_are_found_by_name_in_the_data_set(tmp_path):
    for i, name in enumerate("abcdefghij"):
        for part, count in (("real/validation", 2), ("fake", 2 if name in "cj" else 0)):
            for n in range(count):
                (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (25 * i, 9 * n, 0)).save(tmp_path / part / name / f"{n}.png")
    info = open_dataset(str(tmp_path / "real"), "validation")
    fake = open_samples(str(tmp_path / "fake"))
    assert fake.classes(command._class_to_idx(info)).tolist() == [2, 2, 9, 9]
    assert fake.classes({}) is None
    (tmp_path / "fake" / "c").rename(tmp_path / "fake" / "7")
    (tmp_path / "fake" / "j").rename(tmp_path / "fake" / "12")
    assert sorted(open_samples(str(tmp_path / "fake")).classes({"0": 0}).tolist()) == [7, 7, 12, 12]
    Image.new("RGB", (8, 8)).save(tmp_path / "fake" / "loose.png")
    assert open_samples(str(tmp_path / "fake")).classes({}) is None


def test_file_names_of_the_generate_command_hold_labels(tmp_path):
    for number, label in enumerate((7, 3)):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number:06d}_{label}.png")
    assert open_samples(str(tmp_path)).classes({}).tolist() == [7, 3]
    Image.new("RGB", (8, 8)).save(tmp_path / "000002.png")
    assert open_samples(str(tmp_path)).classes({}) is None


def test_without_labels_the_table_says_why(run, folder, samples):
    np.savez("bare.npz", np.load(samples / "all.npz")["arr_0"])
    common = ["--features", folder, *QUICK, *REAL, "--images", 50]
    out, _ = run("--samples", "bare.npz", *common)
    assert "do not say which class was asked for" in " ".join(out.split())
    np.savez("high.npz", np.load(samples / "all.npz")["arr_0"], np.full(60, 10))
    out, _ = run("--samples", "high.npz", *common)
    assert "the classifier's 10 classes are not those" in " ".join(out.split())


def test_inception(run, samples, monkeypatch):
    """With features made of the pixels in place of Inception's, whose weights are not here."""

    def extract(images, weights=None, device=None, total=None):
        pixels = torch.cat([batch for batch, _ in images])
        assert len(pixels) == total and pixels.shape[1:] == (3, 8, 8) and weights == "w.pth"
        flat = pixels[:, 0].flatten(1)
        return Features(flat, flat[:, :9], None, fidelity.EXTRACTOR)

    monkeypatch.setattr("timm_collapse.evaluation.extract_inception_features", extract)
    common = ["--samples", samples / "all.npz", "--inception", "w.pth", *QUICK]
    out, _ = run(*common, *REAL, "--json", "a.json", "--save-statistics", "real.npz")
    data = json.loads(Path("a.json").read_text())
    assert data["fid"] > 0 and data["references"] == 360 and data["k"] == 3 and 0 < data["precision"] <= 1
    assert "FID" in out and "KID" in out and "Inception score" in out and "k = 3" in out and "label" not in out
    alone = json.loads(run(*common, "--reference", "real.npz", "--json", "-")[0])
    assert alone["fid"] == pytest.approx(data["fid"]) and alone["precision"] is None
    # images and statistics of other images in one file, as ADM's
    np.savez("adm.npz", np.load(samples / "all.npz")["arr_0"], mu=np.load("real.npz")["mu"], sigma=np.eye(64))
    both = json.loads(run(*common, "--reference", "adm.npz", "--json", "-")[0])
    assert both["precision"] == both["recall"] == 1 and both["fid"] > data["fid"] and both["references"] is None


def make_wrong(root):
    root.mkdir(exist_ok=True)
    (root / "empty").mkdir()
    (root / "sizes").mkdir()
    for side in (8, 9):
        Image.new("RGB", (side, side)).save(root / "sizes" / f"{side}.png")
    (root / "text").mkdir()
    (root / "text" / "a.png").write_text("no")
    np.savez(root / "none.npz", a=np.ones(2))
    np.savez(root / "float.npz", np.ones((2, 8, 8, 3)))
    np.savez(root / "labels.npz", np.ones((2, 8, 8, 3), np.uint8), np.ones(3, int))
    np.savez(root / "one.npz", np.ones((1, 8, 8, 3), np.uint8))
    np.savez(root / "few.npz", np.ones((3, 8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "missing"], "--samples must be a folder or an .npz file"),
        (["--samples", "empty"], "holds no .png"),
        (["--samples", "sizes"], r"of one size: .*8.png has \(8, 8\), .*9.png has \(9, 9\)"),
        (["--samples", "text"], "a.png cannot be read"),
        (["--samples", "none.npz"], "holds no arr_0"),
        (["--samples", "float.npz"], r"arr_0 must be \(N, H, W, 3\) uint8, got .* float64"),
        (["--samples", "labels.npz"], r"arr_1 must be \(2,\) integers, got \(3,\)"),
        (["--samples", "one.npz"], "--samples: one.npz holds 1 images, too few: needed are at least 10"),
        (["--samples", "few.npz"], "--samples: few.npz holds 3 images, too few: needed are at least 10"),
        (["--k", 60], "all.npz holds 60 images, too few: needed are at least 61"),
        (["--images", 4], "--images: 4 real images are too few: needed are at least 6, for k = 5 neighbours"),
        (["--k", 0], "--k must be at least 1, got 0"),
        (["--batch-size", 0], "--batch-size must be at least 1"),
        (["--json", "no/a.json"], "the folder 'no' does not exist"),
        (["--device", "nonsense"], "'nonsense' cannot be used"),
        (["--split", "third"], "split: digits has train and validation"),
        (["--features", "nonsense"], "'nonsense' could not be loaded"),
    ],
)
def test_wrong_arguments(run, folder, samples, arguments, message):
    make_wrong(Path())
    with pytest.raises(CollapseError, match=message):
        run("--samples", samples / "all.npz", "--features", folder, *REAL, *QUICK, *arguments)


@pytest.mark.parametrize("name, message", [("none.npz", "must hold mu and sigma, or arr_0"), ("no.npz", "cannot be")])
def test_wrong_references(run, folder, samples, name, message):
    make_wrong(Path())
    with pytest.raises(CollapseError, match=message):
        run("--samples", samples / "all.npz", "--features", folder, "--reference", name, *QUICK)
    FeatureStatistics("a").update(torch.rand(9, 3)).to_npz("a.npz")
    with pytest.raises(CollapseError, match="--save-statistics needs real images"):
        run("--samples", samples / "all.npz", "--features", folder, "--reference", "a.npz", "--save-statistics", "b")


def test_few_images_are_refused_before_anything_is_loaded(run, samples):
    """With statistics alone there are no neighbours; and a reference of images needs as many as a data set."""
    make_wrong(Path())
    FeatureStatistics("a").update(torch.rand(9, 3)).to_npz("a.npz")
    for wrong, message in (
        (["--samples", "few.npz", "--reference", "a.npz"], "few.npz holds 3 images, too few: needed are at least 10"),
        (["--samples", samples / "all.npz", "--reference", "few.npz"], "--reference: 3 real images are too few"),
    ):
        for network in (["--features", "none"], ["--inception"]):
            with pytest.raises(CollapseError, match=message):
                run(*wrong, *network, "--k", 3, *QUICK)


def test_one_network_and_one_reference(run, folder, samples, capsys):
    common = ["--samples", samples / "all.npz"]
    for wrong in (REAL, ["--inception"], ["--inception", "--features", folder, *REAL]):
        with pytest.raises(SystemExit):
            run(*common, *wrong)
