"""The embedded image task: scikit-learn's real handwritten digits, at the size of the shipped ViT.

The 1797 pictures of 8 x 8 grey levels are the test set of UCI's "Optical Recognition of Handwritten Digits"
(Alpaydin & Kaynak 1998, CC BY 4.0). They are enlarged to 16 x 16 by bilinear interpolation and repeated over
three channels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedspan.support.errors import FedspanError

IMAGE_SIZE = 16
NUM_TEST = 450
CLASS_NAMES = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True, slots=True)
class Digits:
    """Disjoint train and test pictures: images (N, 16, 16, 3) uint8, labels (N,) int64 in 0..9."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def load(seed: int) -> Digits:
    """Load the digits and split them at random into 1347 to train on and 450 to test on.

    Parameters
    ----------
    seed
        Determines the split, and nothing else; the same seed gives the same arrays.

    Raises
    ------
    FedspanError
        If scikit-learn, which contains the pictures, is not installed.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}: expected a non-negative integer")
    try:
        from sklearn.datasets import load_digits  # half a second: only for this task
    except ImportError as error:
        raise FedspanError(
            "data.task 'builtin:digits' needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    bunch = load_digits()
    images, labels = _enlarge(bunch.images), bunch.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    return Digits(images[train], labels[train], images[test], labels[test], CLASS_NAMES)


def _enlarge(images: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Turn grey levels 0..16, (N, 8, 8), into RGB bytes (N, 16, 16, 3); pixel centres aligned, edges repeated."""
    size = images.shape[1]
    position = np.clip((np.arange(IMAGE_SIZE) + 0.5) * size / IMAGE_SIZE - 0.5, 0, size - 1)
    weights = np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(size)))  # (16, 8), rows sum to 1
    grey = np.round(weights @ images @ weights.T * (255 / 16)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
