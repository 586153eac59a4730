"""Class folders: PATH/train/<class>/<image>."""

import os
from pathlib import Path

import numpy as np

from alexnet_jax.data.errors import DataError
from alexnet_jax.data.imagenet import named_wnid
from alexnet_jax.data.images import IMAGE_SUFFIXES
from alexnet_jax.data.sources.source import StoredSource, some, statistics_name, visible, what_is_in
from alexnet_jax.system.cli import expanded

_EVAL_FOLDERS = ("test", "val", "validation")
# Layout of tiny-imagenet: a folder of images per class and split, and for a split
# without class folders a table of lines "file name, TAB, class, TAB, box".
_IMAGES, _ANNOTATIONS = "images", "val_annotations.txt"


class FolderSource(StoredSource):
    """PATH/{train, test|val|validation}/<class>/<image>.

    Labels are the positions of the class names in sorted order (by code point, so WNIDs
    of ImageNet get their usual labels); files are sorted too. Images are turned by their
    EXIF orientation. Hidden files are ignored; other files and folders inside a class
    folder are named in `left_out`. ImageNet needs no class folders if the file names say
    the class (`named_wnid`). tiny-imagenet is read as it is unpacked.
    """

    _upright = True

    def __init__(self, path: str | os.PathLike, split: str, image_size: int):
        root = expanded(path)
        folder = split_folder(root, split)
        classes, ignored = find_images(folder)
        self.class_names = tuple(sorted(classes))
        # File names only: the 1.3 million full paths of ImageNet would take 200 MB.
        self._places = [classes[name][0] for name in self.class_names]
        files = [classes[name][1] for name in self.class_names]
        self._files = [file for of_class in files for file in of_class]
        self._label_of = np.arange(len(files), dtype=np.int32)
        self._class_of = np.repeat(self._label_of, [len(f) for f in files])
        self.num_examples = len(self._files)
        self.image_size = image_size
        self.ranges = ((os.path.realpath(folder), 0, self.num_examples),)
        self.description = f"folder {folder}"
        if ignored:
            self.left_out = f"{len(ignored):,} left out of {folder}: {some(ignored)}"
        self.statistics_path = root / statistics_name(split, image_size)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        return self._label_of[self._class_of[indices]]

    def path_of(self, index: int) -> Path:
        """Return the file of an example."""
        return self._places[self._class_of[index]] / self._files[index]

    def name_of(self, index: int) -> str:
        return str(self.path_of(index))

    def record(self, index: int) -> tuple[int, bytes]:
        label = self._label_of[self._class_of[index]]
        return label.item(), self.path_of(index).read_bytes()


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split; `test`, `val`, `validation` stand for each other."""
    names = [split]
    if split in _EVAL_FOLDERS:
        names += [name for name in _EVAL_FOLDERS if name != split]
    found = [root / name for name in names if (root / name).is_dir()]
    if found and (found[0].name == split or len(found) == 1):
        return found[0]
    if found:
        raise DataError(
            f"{root} has no folder {split!r} but {some([f.name for f in found])}: "
            "say which with --config.data.eval_split"
        )
    raise FileNotFoundError(
        f"no folder {' or '.join(names)} in {root.absolute()} ({what_is_in(root)}). "
        f"Expected {root}/train/<class>/<image>.jpg and test or val beside train; set "
        "--config.data.source=folder:PATH to the folder that holds them"
    )


def find_images(folder: Path) -> tuple[dict[str, tuple[Path, list[str]]], list[str]]:
    """Find the images of a split.

    Returns:
      {class: (folder of its images, their sorted names)}, and the files and folders
      that are not read, relative to `folder`.

    Raises:
      DataError: there are no classes, a class has no images, or an image no class.
    """
    inside = visible(folder)
    folders = [name for name, is_folder in inside.items() if is_folder]
    if not folders or folders == [_IMAGES]:
        return _find_side_by_side(folder, folder / _IMAGES if folders else folder)
    found = {}
    ignored = [name for name, is_folder in inside.items() if not is_folder]
    for name in folders:
        place = folder / name
        files, others = _list_images(place)
        if not files and _IMAGES in others:  # tiny-imagenet
            others.remove(_IMAGES)
            ignored += [f"{name}/{other}" for other in others]
            place /= _IMAGES
            files, others = _list_images(place)
        if not files:
            raise DataError(
                f"class folder {place} holds no images (.jpg, .png ...; found there: "
                f"{some(others)}). Fill it or remove it: an empty class would shift the labels "
                "unnoticed"
            )
        found[name] = place, files
        ignored += [str((place / other).relative_to(folder)) for other in others]
    return found, ignored


def _find_side_by_side(
    folder: Path, place: Path
) -> tuple[dict[str, tuple[Path, list[str]]], list[str]]:
    """Find the images of a split that lie in one folder, `place`, see `find_images`."""
    files, others = _list_images(place)
    if (table := folder / _ANNOTATIONS).exists():
        lines = table.read_text("utf-8").splitlines()
        class_of = dict(line.split("\t")[:2] for line in lines if line)
    else:
        class_of = {name: wnid for name in files if (wnid := named_wnid(name))}
    if not class_of and place != folder:
        raise DataError(
            f"the images in {place} have no classes: there is no {_ANNOTATIONS} beside "
            "it, and the split test of tiny-imagenet has none. Set "
            "--config.data.eval_split=val, or move the images into class folders"
        )
    if not class_of:
        raise DataError(
            f"no class folders in {folder} (found there: {some(files + others)}). "
            f"Expected {folder / '<class>' / '<image>.jpg'}, one folder per class; "
            "change --config.data.source or move the images"
        )
    if unknown := [name for name in files if name not in class_of]:
        raise DataError(
            f"{len(unknown)} of {len(files)} images in {place} have no class: "
            f"{some(unknown)}. Move them into class folders, or out of {folder}"
        )
    found: dict[str, tuple[Path, list[str]]] = {}
    for name in files:
        found.setdefault(class_of[name], (place, []))[1].append(name)
    return found, [str((place / other).relative_to(folder)) for other in others]


def _list_images(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the images in a folder, and of all else."""
    files, others = [], []
    for name in visible(folder):
        is_image = name.lower().endswith(IMAGE_SUFFIXES)
        (files if is_image else others).append(name)
    return files, others
