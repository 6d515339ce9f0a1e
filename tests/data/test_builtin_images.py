"""The shipped image base, its recipe, and the embedded digits."""

import importlib.util
import itertools
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.data.builtin import base_path, digits

ROOT = Path(__file__).resolve().parents[2]
BASE = base_path("vit")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_vit", ROOT / "recipes" / "pretrain_vit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the base folder ---------------------------------------------------------------------------------------


def test_base_fits_the_package() -> None:
    """The folder takes less than 4 MB and holds nothing but JSON, text and safetensors."""
    files = {f.name: f.stat().st_size for f in BASE.iterdir()}
    assert set(files) == {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
    assert sum(files.values()) < 4 * 2**20


def test_base_loads_offline_and_accepts_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and processor load without network or torchvision, in float32, only the head being new."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model, info = AutoModelForImageClassification.from_pretrained(
        BASE, num_labels=10, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    images = digits.load(0).test_images[:3]
    pixels = AutoImageProcessor.from_pretrained(BASE)(list(images), return_tensors="pt")["pixel_values"]
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # already at the model's size
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    assert model(pixel_values=pixels).logits.shape == (3, 10)


# --- the digits --------------------------------------------------------------------------------------------


def bags(images: np.ndarray, labels: np.ndarray) -> Counter[tuple[bytes, int]]:
    return Counter((x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_split_is_disjoint_and_complete(seed: int) -> None:
    """Train and test together are all 1797 labelled pictures, each exactly once."""
    from sklearn.datasets import load_digits

    data = digits.load(seed)
    assert data.train_images.shape == (1347, 16, 16, 3)
    assert data.test_images.shape == (450, 16, 16, 3)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    raw = load_digits()
    whole = bags(digits._enlarge(raw.images), raw.target)
    train, test = (
        bags(data.train_images, data.train_labels),
        bags(data.test_images, data.test_labels),
    )
    assert sum(whole.values()) == 1797
    assert train + test == whole
    assert set(data.test_labels) == set(data.train_labels) == set(range(len(data.class_names)))


def test_split_depends_on_the_seed_alone() -> None:
    """The same seed gives the same arrays whatever was drawn before; another seed gives another split."""
    first = digits.load(3)
    np.random.rand(7)  # global state must not matter
    again, other = digits.load(3), digits.load(4)
    np.testing.assert_array_equal(first.train_images, again.train_images)
    np.testing.assert_array_equal(first.test_labels, again.test_labels)
    assert not np.array_equal(first.test_images, other.test_images)


def test_enlarging_agrees_with_pytorch() -> None:
    """The enlarged picture is bilinear interpolation, to half a grey level."""
    levels = np.random.default_rng(0).integers(0, 17, (5, 8, 8)).astype(np.float64)
    ours = torch.from_numpy(digits._enlarge(levels)[..., 0]).double()
    oracle = torch.nn.functional.interpolate(
        torch.from_numpy(levels)[:, None] * (255 / 16), size=(16, 16), mode="bilinear", align_corners=False
    )[:, 0]
    torch.testing.assert_close(ours, oracle, rtol=0, atol=0.5 + 1e-9)


def test_missing_sklearn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scikit-learn the message says what to install; a negative seed is refused by value."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        digits.load(0)
    with pytest.raises(ValueError, match="-1"):
        digits.load(-1)


# --- the recipe's glyphs -----------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), num_classes=st.integers(2, 12))
def test_glyphs_are_deterministic(recipe: ModuleType, seed: int, num_classes: int) -> None:
    """One seed, one set of drawings and pictures, in range; another seed draws others."""
    labels = torch.arange(num_classes)
    pictures = []
    for s in (seed, seed, seed + 1):
        rng = generator(s)
        pictures.append(recipe.draw(recipe.make_glyphs(num_classes, rng), labels, rng))
    assert pictures[0].shape == (num_classes, 3, 16, 16)
    assert 0 <= float(pictures[0].min()) <= float(pictures[0].max()) <= 1
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


def test_joined_strokes_share_their_points(recipe: ModuleType) -> None:
    """A stroke begins at a point of its own or where the one before it ends, so no jitter can tear a line."""
    glyphs = recipe.make_glyphs(50, generator(0))
    joined = 0
    for strokes, drawn in zip(glyphs.strokes, glyphs.drawn, strict=True):
        used = strokes[drawn]
        for before, after in itertools.pairwise(used):
            joined += int(before[3] == after[0])
            assert int(after[0]) - int(before[3]) in (0, 1)
    assert joined > 20


def test_distances_agree_with_dense_sampling(recipe: ModuleType) -> None:
    """A pixel's distance to the pieces is the least distance to many points laid along them."""
    glyphs = recipe.make_glyphs(8, generator(1))
    ours = recipe.distances(glyphs.points, glyphs.strokes, glyphs.drawn)
    axis = (torch.arange(16) + 0.5) / 8 - 1
    for label in range(8):
        control = glyphs.points[label][glyphs.strokes[label][glyphs.drawn[label]]]  # (strokes, 4, 2)
        t = torch.linspace(0, 1, recipe.PIECES_PER_STROKE + 1)[:, None, None]
        a, b, c, d = (control[:, i] for i in range(4))
        knots = (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d
        share = torch.linspace(0, 1, 200)[:, None, None, None]
        on = (knots[:-1] + share * (knots[1:] - knots[:-1])).reshape(-1, 2)
        pixels = torch.stack([axis.repeat(16), axis.repeat_interleave(16)], dim=1)  # x fastest
        oracle = torch.stack([(on - pixel).norm(dim=1).min() for pixel in pixels]).view(16, 16)
        torch.testing.assert_close(ours[label], oracle, rtol=0, atol=1e-2)


def test_labels_name_what_is_drawn(recipe: ModuleType) -> None:
    """The nearest mean picture of a class, taken from other pictures, names a glyph far above chance."""
    num_classes, rng = 10, generator(2)
    glyphs = recipe.make_glyphs(num_classes, rng)
    labels = torch.arange(num_classes).repeat(60)
    pictures = recipe.draw(glyphs, labels, rng)[:, 0].flatten(1)
    pictures = pictures - pictures.mean(dim=1, keepdim=True)
    pictures = pictures / pictures.norm(dim=1, keepdim=True)
    means = torch.stack([pictures[:300][labels[:300] == y].mean(dim=0) for y in range(num_classes)])
    hits = ((pictures[300:] @ means.T).argmax(dim=1) == labels[300:]).float().mean()
    assert hits > 0.5  # chance is 0.1


def test_features_separate_glyphs_never_seen(recipe: ModuleType) -> None:
    """A linear read-out of the shipped backbone names unseen glyphs better than that of an untrained one."""
    from transformers import ViTModel

    num_classes, rng = 20, generator(12345)  # the recipe's own glyphs come from another seed
    glyphs = recipe.make_glyphs(num_classes, rng)
    labels = torch.arange(num_classes).repeat(30)
    pixels = recipe.normalise(recipe.draw(glyphs, labels, rng))

    def read_out(backbone: torch.nn.Module) -> float:
        with torch.no_grad():
            features = backbone.eval()(pixel_values=pixels).last_hidden_state[:, 0].double()
        features = (features - features.mean(dim=0)) / (features.std(dim=0) + 1e-6)
        train, test = features[:300], features[300:]
        targets = torch.nn.functional.one_hot(labels[:300], num_classes).double()
        gram = train.T @ train + 30.0 * torch.eye(features.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(gram, train.T @ targets)
        return float(((test @ weights).argmax(dim=1) == labels[300:]).double().mean())

    trained = read_out(ViTModel.from_pretrained(BASE, add_pooling_layer=False))
    untrained = read_out(recipe.build(num_classes, hidden=96, layers=4, seed=0).vit)
    assert trained > untrained + 0.15
    assert trained > 0.7
