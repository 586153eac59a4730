"""The thousand classes of ILSVRC-2012, their words, and the validation labels."""

import functools
import re
from importlib import resources

from alexnet_jax.data.errors import DataError

# Images in the official archives (Russakovsky et al. 2015, table 2).
OFFICIAL_COUNTS = {"train": 1_281_167, "validation": 50_000}
# The official names, and Hugging Face's, which end in the class.
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
_WITH_WNID = re.compile(r"(n\d{8})_\d+\.jpe?g|.+_(n\d{8})\.jpe?g", re.IGNORECASE)


@functools.cache
def class_words() -> dict[str, str]:
    """Return {WNID: words}, "n01440764" -> "tench, Tinca tinca", in label order.

    Label k is the k-th of the sorted WNIDs, as in Caffe, torchvision and tfds (not
    ILSVRC2012_ID of the development kit, which counts from 1 in another order). Two
    classes have the same words: the bird and the machine are both "crane".
    """
    file = resources.files("alexnet_jax.data.imagenet") / "classes.txt"
    text = file.read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return dict(line.split(" ", 1) for line in lines)


def wnids() -> tuple[str, ...]:
    """Return the thousand WNIDs in the order of their labels."""
    return tuple(class_words())


def words(class_name: str) -> str:
    """Return the first word of a class, "tench"; a name that is no WNID as it is."""
    return class_words().get(class_name, class_name).split(",")[0]


@functools.cache
def _validation_wnids() -> tuple[str, ...]:
    """Return the official ground truth by image; tfds carries it in its package."""
    import tensorflow_datasets as tfds

    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    return tuple(path.read_text().split())


def named_wnid(file_name: str) -> str | None:
    """Return the class in the name of an image of ILSVRC-2012, or None.

    Known are n01440764_10026.JPEG; ILSVRC2012_val_00000001.JPEG, by its number (archives
    that were packed again have another order); and the names of Hugging Face, by their
    ending: ILSVRC2012_val_00000001_n01751748.JPEG.

    Raises:
      DataError: there is no validation image of that number.
    """
    if match := _WITH_WNID.fullmatch(file_name):
        return match[1] or match[2]
    if match := _VALIDATION_NAME.fullmatch(file_name):
        number = int(match[1])
        if not 1 <= number <= OFFICIAL_COUNTS["validation"]:
            raise DataError(
                f"{file_name} is no validation image of ILSVRC-2012: expected a number from 1 to "
                "50,000. Remove the file"
            )
        return _validation_wnids()[number - 1]
    return None


def check_label(file_name: str, wnid: str, where: str) -> None:
    """Raise DataError if a label contradicts the class in an official file name."""
    told = named_wnid(file_name) or wnid
    if told != wnid:
        raise DataError(
            f"{file_name} in {where} is labelled {wnid} ({words(wnid)}), but it is of "
            f"class {told} ({words(told)}): the images were sorted wrongly. Sort them again, or "
            "give the archives"
        )
