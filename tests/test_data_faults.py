"""Faults of data: nothing is lost, nothing is let in, and each is one message."""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import typing
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_distributed import CONFIG, launch
from test_imagenet import (
    NUM_VALIDATION,
    TRAIN,
    VALIDATION,
    WNIDS,
    example,
    file_of,
    records,
    tar_of,
    write_archives,
    write_folders,
    write_shards_here,
    write_tfds,
)
from test_train import folder, small_config  # noqa: F401, a fixture

from alexnet_jax import experiment as experiment_lib
from alexnet_jax import predict, prepare, protocol, train
from alexnet_jax.data import (
    DataError,
    images,
    locks,
    match_classes,
    open_source,
    sources,
    statistics,
    textures,
)
from alexnet_jax.data.imagenet import originals, preparation
from alexnet_jax.data.loader import TrainOrder
from alexnet_jax.data.sources import FolderSource, Source, TfdsSource
from alexnet_jax.writers import read_metrics

REPOSITORY = Path(__file__).parents[1]


# Pictures, and the doors that they come through.


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(side: int = 40) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))


def cut(kind: str) -> bytes:
    whole = encoded(noise(), kind)
    return whole[: len(whole) // 2]


def animation() -> bytes:
    colors = ["#c80000", *["#0000c8", "#00c800"] * 20]
    first, *others = [Image.new("RGB", (20, 10), color) for color in colors]
    return encoded(first, "GIF", save_all=True, append_images=others)


def with_much_text() -> bytes:
    """More than Pillow's 1 MB, and a colour profile of as much."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 3_000_000, zip=True)
    info.add_itxt("comment", "x" * 3_000_000, zip=True)
    return encoded(_PLAIN, "PNG", pnginfo=info, icc_profile=bytes(3_000_000))


def sideways() -> bytes:
    """Stored red beside blue; upright it is red above blue."""
    picture = Image.new("RGB", (32, 32), "red")
    picture.paste("blue", (16, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture, "JPEG", quality=95, exif=exif)


def patched(data: bytes, place: int, layout: str, *values: int) -> bytes:
    raw = struct.pack(layout, *values)
    return data[:place] + raw + data[place + len(raw) :]


def large_jpeg(width: int, height: int) -> bytes:
    small = encoded(noise(), "JPEG")
    return patched(small, small.index(b"\xff\xc0") + 5, ">HH", height, width)


def large_png(width: int, height: int) -> bytes:
    """Whole, of one bit a pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(1 + -(-width // 8))) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", rows + packer.flush())
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def large_gif(width: int, height: int) -> bytes:
    return patched(encoded(noise().quantize(8), "GIF"), 6, "<HH", width, height)


def large_bmp(width: int, height: int) -> bytes:
    return patched(encoded(noise(), "BMP"), 18, "<ii", width, height)


def large_webp(width: int, height: int) -> bytes:
    """14 bits each, minus one, after the mark of a lossless picture."""
    bits = (width - 1) | (height - 1) << 14
    return patched(encoded(noise(), "WEBP", lossless=True), 21, "<I", bits)


def large_tiff(width: int, height: int) -> bytes:
    data = encoded(noise(), "TIFF")
    start = struct.unpack("<I", data[4:8])[0]
    for place in range(start + 2, start + 2 + 12 * 3, 12):
        [tag] = struct.unpack("<H", data[place : place + 2])
        if side := {256: width, 257: height}.get(tag):
            data = patched(data, place + 2, "<HII", 4, 1, side)
    return data


def tiled_tiff(tile: int) -> bytes:
    """16 x 16 grey pixels, all in the corner of one tile."""
    packed = zlib.compress(bytes(tile * tile))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile}
    tags |= {324: 8, 325: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory


def with_scans(count: int) -> bytes:
    """A JPEG with so many scans more, all of them without anything in them."""
    data = encoded(noise(), "JPEG")
    return data[:-2] + b"\xff\xda\0\2" * count + data[-2:]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A picture file, and what must come of it: one colour, or words of a message."""

    name: str
    data: bytes
    expected: tuple[int, int, int] | str


_PLAIN = Image.new("RGB", (30, 20), (200, 100, 50))
_LIMIT = f"more than {images.MAX_PIXELS:,} pixels; make it smaller"
FAULTS = [
    # (255 - ink) (255 - black) / 255
    Fault(
        "CMYK",
        encoded(Image.new("CMYK", (30, 20), (0, 155, 205, 55)), "JPEG", quality=95),
        (200, 78, 39),
    ),
    Fault(
        "16 bits",
        encoded(Image.fromarray(np.full((9, 7), 0x804D, np.uint16)), "PNG"),
        (0x80, 0x80, 0x80),
    ),
    Fault(
        "10 bits in 16",
        encoded(Image.fromarray(np.full((9, 7), 1000, np.uint16)), "PNG"),
        "its largest value is 1,000 of 65,535",
    ),
    Fault("animated GIF", animation(), (200, 0, 0)),
    Fault(
        "1x1", encoded(Image.new("RGB", (1, 1), (10, 200, 30)), "PNG"), (10, 200, 30)
    ),
    Fault("a BMP by another name", encoded(_PLAIN, "BMP"), (200, 100, 50)),
    Fault("stray bytes after it", encoded(_PLAIN, "PNG") + b"\0\0", (200, 100, 50)),
    Fault("truncated JPEG", cut("JPEG"), "truncated"),
    Fault("truncated PNG", cut("PNG"), "truncated"),
    Fault("truncated GIF", cut("GIF"), "truncated"),
    Fault("truncated WebP", cut("WEBP"), "could not create decoder"),
    Fault(
        "cut in its header", encoded(noise(), "JPEG")[:3], "it is damaged or no picture"
    ),
    Fault("zero bytes", b"", "the file is empty"),
    Fault("wrong magic", b"<!DOCTYPE html>", "begins with b'<!DOCTYP'"),
    # Pillow would start Ghostscript.
    Fault(
        "a program",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "begins with b'%!PS-Ado'",
    ),
    Fault("much text", with_much_text(), (200, 100, 50)),
    Fault("strip", encoded(Image.new("L", (1, 2_000_000)), "PNG"), "too long a strip"),
    Fault("JPEG of 20,000", large_jpeg(20_000, 20_000), _LIMIT),
    Fault("JPEG of 10,000", large_jpeg(10_000, 10_000), f"10,000 x 10,000, {_LIMIT}"),
    Fault("PNG of 20,000", large_png(20_000, 20_000), _LIMIT),
    Fault("GIF of 20,000", large_gif(20_000, 20_000), _LIMIT),
    Fault("WebP of 16,383", large_webp(16_383, 16_383), _LIMIT),
    Fault("BMP of 20,000", large_bmp(20_000, 20_000), _LIMIT),
    Fault("TIFF of 20,000", large_tiff(20_000, 20_000), _LIMIT),
    Fault("small tile", tiled_tiff(16), (0, 0, 0)),
    Fault("large tile", tiled_tiff(10_000), f"10,000 x 10,000, {_LIMIT}"),
    Fault(
        "JPEG in a TIFF",
        encoded(_PLAIN, "TIFF", compression="jpeg"),
        "it is a TIFF with JPEG in it",
    ),
    # Some of 150 bytes take gigabytes.
    Fault("JPEG 2000", encoded(_PLAIN, "JPEG2000"), "it is damaged or no picture"),
    Fault("scans", with_scans(100), "it has 101 scans, more than 100"),
    Fault(
        "bytes as of scans in a comment and behind it",
        encoded(_PLAIN, "JPEG", quality=95, comment=b"\xff\xda" * 99)
        + b"\xff\xda" * 99,
        (200, 100, 50),
    ),
]
NAMES = {fault.name: f"{WNIDS[0]}_{i}.JPEG" for i, fault in enumerate(FAULTS)}
SIDEWAYS = f"{WNIDS[0]}_sideways.JPEG"  # sorted behind the others
FOLDER, TFDS, NOTEBOOK, COMMAND = "folder:PATH", "tfds", "load_picture", "predict"
PREPARED = ("archives", "folders", "imagenet2012/5.1.0")
TAKE_OUT = "Replace the file by an intact copy or take it out of the data set."
REMEDIES = {
    FOLDER: TAKE_OUT,
    TFDS: "Delete the directory and prepare the data set again.",
    NOTEBOOK: "Give an intact copy or another picture.",
    COMMAND: "Give an intact copy or another picture.",
}


@pytest.fixture(scope="module")
def originals_of_faults(tmp_path_factory) -> Path:
    """All of them as archives, as class folders and as a tfds data set."""
    root = tmp_path_factory.mktemp("faults")
    train = {NAMES[fault.name]: (0, fault.data) for fault in FAULTS}
    train[SIDEWAYS] = 0, sideways()
    write_archives(root / "archives", train)
    write_folders(root / "folders", flat=True, train=train)
    write_tfds(root / "imagenet2012" / "5.1.0", "array_record", train)
    return root


@pytest.fixture(scope="module")
def prepared(originals_of_faults, tmp_path_factory):
    """What `prepare imagenet` makes of each: (data_dir, its record, what it said)."""

    @functools.cache
    def prepare_from(kind: str) -> tuple[Path, dict, str]:
        target, said = tmp_path_factory.mktemp("prepared"), []
        with pytest.MonkeyPatch.context() as patch:
            write_shards_here(patch)
            patch.setattr(prepare, "_say", said.append)
            source = f"--source={originals_of_faults / kind}"
            arguments = [source, f"--data_dir={target}", "--max_unreadable=30"]
            assert prepare.main(["prepare", "imagenet", *arguments]) == 0
        record = target / "imagenet2012_256" / "1.0.0" / "preparation.json"
        return target, json.loads(record.read_text()), "\n".join(said)

    return prepare_from


class Eye:
    """Stands for the network of `predict`: keeps what it is shown."""

    image_size = 8
    class_names = ("a", "b")
    seen: typing.ClassVar[list[np.ndarray]] = []

    def __init__(self, *_, **__):
        Eye.seen.clear()

    def __call__(self, pictures):
        Eye.seen += pictures
        return np.zeros((len(pictures), 2), np.float32)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("door", [FOLDER, TFDS, NOTEBOOK, COMMAND])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_picture_is_right_or_refused(
    fault, door, originals_of_faults, monkeypatch, capsys
):
    path = originals_of_faults / "folders" / "train" / WNIDS[0] / NAMES[fault.name]
    picture, message, name = None, None, str(path)
    if door == COMMAND:
        monkeypatch.setattr(predict, "Extractor", Eye)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            status = predict.main(["--workdir=none", str(path)])
        assert not warned  # they are lines on standard error as well
        out, err = capsys.readouterr()
        assert (status, bool(out), err.count("\n")) in ((0, True, 0), (1, False, 1))
        picture, message = (Eye.seen or [None])[0], err.strip()
    else:
        try:
            if door == NOTEBOOK:
                picture = images.load_picture(path, 8)
            else:
                source, index = opened(door, originals_of_faults, fault)
                if door == TFDS:
                    name = f"record {index} of {source.description}"
                picture = fetched(source, index)
        except DataError as error:
            message = str(error)
    check_outcome(fault, picture, message)
    if message:
        assert f"cannot decode {name} ({len(fault.data)} bytes): " in message
        assert message.endswith(f". {REMEDIES[door]}")


def check_is_sideways(picture: np.ndarray) -> None:
    middle = picture[len(picture) // 2].astype(int)
    np.testing.assert_allclose(middle[0], (255, 0, 0), atol=5)
    np.testing.assert_allclose(middle[-1], (0, 0, 255), atol=5)


def test_only_the_users_own_files_are_turned(originals_of_faults):
    stored = TfdsSource(originals_of_faults / "imagenet2012" / "5.1.0", "train", 8)
    check_is_sideways(fetched(stored, len(FAULTS)))
    own = FolderSource(originals_of_faults / "folders", "train", 8)
    assert own.path_of(len(FAULTS)).name == SIDEWAYS
    check_is_sideways(fetched(own, len(FAULTS)).transpose(1, 0, 2))


def opened(door: str, root: Path, fault: Fault) -> tuple[Source, int]:
    if door == FOLDER:
        index = sorted(NAMES.values()).index(NAMES[fault.name])
        return FolderSource(root / "folders", "train", 8), index
    source = TfdsSource(root / "imagenet2012" / "5.1.0", "train", 8)
    return source, list(NAMES).index(fault.name)


def fetched(source: Source, index: int) -> np.ndarray:
    size = source.image_size
    picture = np.empty((1, size, size, 3), np.uint8)
    source.fetch(np.array([index]), picture, np.empty(1, np.int32))
    return picture[0]


def check_outcome(
    fault: Fault, picture: np.ndarray | None, message: str | None
) -> None:
    if isinstance(fault.expected, str):
        assert picture is None and message and fault.expected in message
        assert "BytesIO" not in message and "\n" not in message.strip()
    else:
        assert picture is not None
        np.testing.assert_allclose(picture.mean((0, 1)), fault.expected, atol=3)
        assert picture.std((0, 1)).max() < 3


@pytest.mark.parametrize("kind", PREPARED)
def test_prepared_pictures_are_right_or_left_out_with_a_word(kind, prepared):
    target, record, said = prepared(kind)
    stored, left_out = records(target, "train"), dict(record["unreadable"])
    assert set(stored) | set(left_out) == {*NAMES.values(), SIDEWAYS}
    # As in ImageNet's published protocol: not turned.
    check_is_sideways(images.decode(stored[SIDEWAYS][1], 256, SIDEWAYS))
    for fault in FAULTS:
        name = NAMES[fault.name]
        picture = None
        if name in stored:
            picture = images.decode(stored[name][1], 256, name)
        check_outcome(fault, picture, left_out.get(name))
        if name in left_out:
            why = left_out[name]
            assert why.startswith(f"cannot decode {name} ({len(fault.data)} bytes): ")
    assert f"left out, {len(left_out)} pictures:\n" in said
    said_of = [why for why in left_out.values() if f"  {why}\n" in said]
    assert len(said_of) == 20 < len(left_out)
    assert f"\n  ... {len(left_out)} in all\n" in said
    assert set(records(target, "validation")) == set(VALIDATION)


# Reads pictures in a process of its own; how much more memory that took, in KiB.
_PEAK = """
import sys
from alexnet_jax.data import DataError, images

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

before = peak()
for path in sys.argv[1:]:
    try:
        images.load_picture(path, 256)
    except DataError:
        print(peak() - before, path)
"""


def test_what_is_too_large_takes_no_memory(originals_of_faults):
    """A picture of 10,000 x 10,000 would take 300 MB, the strip 131 GB."""
    place = originals_of_faults / "folders" / "train" / WNIDS[0]
    names = [NAMES[f.name] for f in FAULTS if "too long" in str(f.expected)]
    names += [NAMES[f.name] for f in FAULTS if _LIMIT in str(f.expected)]
    assert len(names) == 9
    found = subprocess.run(
        [sys.executable, "-c", _PEAK, *(str(place / name) for name in names)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = found.stdout.splitlines()
    assert len(lines) == len(names)
    assert max(int(line.split()[0]) for line in lines) < 64 * 1024, found.stdout


def test_of_a_huge_file_no_more_is_read_than_shows_that_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    path = tmp_path / "train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG"
    path.parent.mkdir(parents=True)
    path.touch()
    os.truncate(path, 10 * 2**30)
    assert len(images.read(path)) == 2**20 + 1
    with open("/dev/zero", "rb"):  # it says that it has no bytes
        assert len(images.read("/dev/zero")) == 2**20 + 1
    words = r"1\.JPEG .*: files of more than 1,048,576 bytes are not read"
    with pytest.raises(DataError, match=words):
        images.load_picture(path, 8)
    with pytest.raises(DataError, match=words):
        fetched(FolderSource(tmp_path, "train", 8), 0)
    write_folders(tmp_path, flat=True, train={})
    found = originals.find(tmp_path)["train"]
    assert len(found.read(0)[2]) == 2**20 + 1


def test_a_picture_that_pillow_has_opened(tmp_path):
    path = tmp_path / "x.jpg"
    for data, words in (
        (cut("JPEG"), "truncated"),
        (large_png(10_000, 9_000), "10,000 x 9,000, " + _LIMIT),
    ):
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened_by_caller = Image.open(path)
        with opened_by_caller, pytest.raises(DataError) as error:
            images.load_picture(opened_by_caller, 8)
        assert f"cannot decode {path}: " in str(error.value)
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"got uint8 \[0, 5, 3\]"):
        images.load_picture(np.zeros((0, 5, 3), np.uint8), 8)


def test_want_of_memory_is_not_the_pictures_fault(tmp_path, monkeypatch):
    """Nor may `prepare` leave it out as a broken one."""

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(images, "resize_to_square", full)
    data = encoded(noise(), "PNG")
    with pytest.raises(
        OSError, match=r"not enough memory to decode x\.png \(\d+ bytes"
    ):
        images.decode(data, 8, "x.png")
    source = write_archives(tmp_path / "source")
    for shard in preparation._shards(originals.find(source), tmp_path)[:1]:
        with pytest.raises(OSError, match="not enough memory to decode n0"):
            preparation.write_shard(shard)


def by_name(faults: list[tuple]) -> list:
    """The rows of a table, each called by the fault that it begins with."""
    return [pytest.param(*row, id=row[0].__name__.strip("_")) for row in faults]


# Folders.


def _class(root: Path, name: str | bytes = WNIDS[1]) -> Path:
    made = root / "train" / os.fsdecode(name)
    made.mkdir()
    return made


def _empty_class(root: Path) -> None:
    _class(root)


def _class_of_other_files(root: Path) -> None:
    (_class(root) / "a.svg").touch()
    (root / "train" / WNIDS[1] / ".hidden.jpg").touch()


def _class_that_links_to_itself(root: Path) -> None:
    (root / "train" / WNIDS[1]).symlink_to(WNIDS[1])


def _class_that_links_to_all(root: Path) -> None:
    (root / "train" / WNIDS[1]).symlink_to(".")


def _class_that_links_nowhere(root: Path) -> None:
    (root / "train" / WNIDS[1]).symlink_to("/no/such")


def _picture_that_links_to_itself(root: Path) -> None:
    (_class(root) / "1.jpg").symlink_to("1.jpg")


def _picture_that_links_nowhere(root: Path) -> None:
    (_class(root) / "1.jpg").symlink_to("../gone.jpg")


def _pipe(root: Path) -> None:
    os.mkfifo(_class(root) / "1.jpg")


def _folder_like_a_picture(root: Path) -> None:
    (_class(root) / "1.jpg").mkdir()


def _class_of_bytes(root: Path) -> None:
    (_class(root, b"caf\xe9") / "1.png").touch()


def _class_of_two_lines(root: Path) -> None:
    (_class(root, "a\nb") / "1.png").touch()


FOLDER_FAULTS = [
    (_empty_class, f"train/{WNIDS[1]} holds no pictures", "Fill it or remove it"),
    (_class_of_other_files, "found there: a.svg)", "Fill it or remove it"),
    (_class_that_links_to_itself, f"{WNIDS[1]} cannot be read: Too many", "remove it"),
    (_class_that_links_to_all, "holds pictures only in folders inside it", "Move them"),
    (_class_that_links_nowhere, "a link to /no/such, which is not there", "remove it"),
    (_picture_that_links_to_itself, "/1.jpg cannot be read: Too many", "remove it"),
    (_picture_that_links_nowhere, "a link to ../gone.jpg, which is not", "remove it"),
    (_pipe, "/1.jpg cannot be read: it is neither a file nor a folder", "remove it"),
    (_folder_like_a_picture, "/1.jpg is a folder with the name of a", "rename it"),
    (_class_of_bytes, r"'caf\udce9' in folder", "bytes that are no UTF-8: rename it"),
    (_class_of_two_lines, r"'a\nb' in folder", "control characters"),
]


@pytest.mark.parametrize("door", [FOLDER, "prepare"])
@pytest.mark.parametrize("damage, words, remedy", by_name(FOLDER_FAULTS))
def test_folders_that_are_wrong_are_one_message(
    damage, words, remedy, door, tmp_path, capsys
):
    root = write_folders(tmp_path / "pictures", flat=True, train={})
    (root / "train" / WNIDS[0]).mkdir(parents=True)
    (root / "train" / WNIDS[0] / "1.png").write_bytes(encoded(noise(), "PNG"))
    damage(root)
    if door == FOLDER:
        arguments = ["statistics", f"--source=folder:{root}"]
    else:
        arguments = ["imagenet", f"--source={root}", f"--data_dir={tmp_path / 'new'}"]
    assert prepare.main(["prepare", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and remedy in error and str(root) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


CLASS_NAMES = ["a b", "e\u0301cole", "école", "עברית", "می‌خواهم", "犬", "ﬁ", "🐕‍🦺"]


def test_names_are_of_any_unicode(tmp_path, monkeypatch, capsys):
    root, colors = tmp_path / "pictures", range(10, 250, 30)
    for name, color in zip(CLASS_NAMES, colors, strict=True):
        (root / "train" / name).mkdir(parents=True)
        picture = Image.new("L", (8, 8), color)
        picture.save(root / "train" / name / f"{name}.png")
    assert CLASS_NAMES == sorted(CLASS_NAMES)
    source = FolderSource(root, "train", 8)
    assert source.class_names == tuple(CLASS_NAMES)
    for index, color in enumerate(colors):
        assert (fetched(source, index) == color).all()
    # A picture's name may be no text at all, and is shown all the same.
    path = root / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(encoded(noise(), "PNG"))
    monkeypatch.setattr(predict, "Extractor", Eye)
    monkeypatch.setattr(Eye, "class_names", CLASS_NAMES[:2])
    for form in ("text", "json"):
        arguments = ["--workdir=none", f"--format={form}", str(path)]
        assert predict.main(arguments) == 0
        assert r"caf\udce9.png" in capsys.readouterr().out
    path.write_bytes(b"broken")
    assert predict.main(arguments) == 1
    assert r"caf\udce9.png (6 bytes): " in capsys.readouterr().err


def test_names_that_only_look_alike_are_told(tmp_path):
    for split, name in (("train", "e\u0301cole"), ("test", "école")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "1.png").write_bytes(encoded(noise(), "PNG"))
    splits = [FolderSource(tmp_path, split, 8) for split in ("train", "test")]
    with pytest.raises(DataError, match="written in two ways, Unicode's NFC and NFD"):
        match_classes(splits[1], splits[0].class_names)


def left_out_folder(root: Path) -> Path:
    """Two classes of three pictures, and files that are not read."""
    picture = encoded(noise(), "PNG")
    files = "a/2.png", "a/10.PNG", "a/.hidden.png", "a/notes.txt", "a/.git/1.png"
    deep = [f"a/deep/{i}.gif" for i in range(4)] + ["b/x/y/1.png", "b/x/.DS_Store"]
    for name in (*files, *deep, ".git/1.png", "b/1.avif", "b/1.heic", "3.jpg"):
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    return root


LEFT_OUT = (
    "2 file(s) of other kinds (a/notes.txt, b/1.heic), 5 picture(s) in folders inside a "
    "class (a/deep/0.gif, a/deep/1.gif, a/deep/2.gif, ...), 1 picture(s) outside class "
    "folders (3.jpg)"
)


def test_left_out_files_are_counted_by_reason(tmp_path):
    source = FolderSource(left_out_folder(tmp_path), "train", 8)
    assert source.class_names == ("a", "b")
    assert source.labels_of(np.arange(3)).tolist() == [0, 0, 1]
    assert source._files == ["10.PNG", "2.png", "1.avif"]
    assert source.description == f"folder {tmp_path / 'train'}"
    assert source.left_out == f"left out of {tmp_path / 'train'}: {LEFT_OUT}"
    assert sources.Sample(source, 2).left_out == source.left_out


def test_left_out_files_are_a_warning_of_every_command(tmp_path, capsys):
    root = left_out_folder(tmp_path / "pictures")
    (root / "train").rename(root / "test")
    left_out_folder(root)
    lines = [
        f"WARNING: left out of {root / split}: {LEFT_OUT}\n"
        for split in ("train", "test")
    ]
    run = small_config(root)
    experiment = experiment_lib.build(run)
    assert "".join(f"{line}\n" for line in train._describe(experiment)).endswith(
        "".join(lines)
    )
    capsys.readouterr()
    state = experiment.init_state()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    protocol._predictions(experiment, variables)
    assert capsys.readouterr().out == lines[1]
    common = [f"--source=folder:{root}", "--image_size=8"]
    assert prepare.main(["prepare", "statistics", *common]) == 0
    assert lines[0] in capsys.readouterr().out
    common += ["--eval_split=test", f"--out={tmp_path / 'sheet.png'}"]
    prepare.main(["prepare", "check", *common])
    said = capsys.readouterr().out
    assert [said.count(line) for line in lines] == [1, 1]


@pytest.mark.parametrize("suffix", images.PICTURE_SUFFIXES)
def test_every_readable_format_is_read_from_folders(suffix, tmp_path):
    path = tmp_path / "train" / "a" / f"1{suffix.upper()}"
    path.parent.mkdir(parents=True)
    mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
    Image.new(mode, (9, 9), 255 if mode != "RGB" else (255, 255, 255)).save(path)
    assert (fetched(FolderSource(tmp_path, "train", 8), 0) > 250).all()


def test_class_of_nested_pictures_only_says_so(tmp_path):
    (tmp_path / "train" / "a" / "deep").mkdir(parents=True)
    (tmp_path / "train" / "a" / "deep" / "1.tif").touch()
    words = r"a holds pictures only in folders inside it \(1 in deep\)\. Move them into"
    with pytest.raises(DataError, match=words):
        FolderSource(tmp_path, "train", 8)


def test_a_picture_that_has_gone_is_named(tmp_path):
    root = write_folders(tmp_path, flat=True)
    source = FolderSource(root, "train", 8)
    path = root / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    path.unlink()
    with pytest.raises(DataError, match=rf"cannot read {path}: No such file.*moved"):
        fetched(source, 0)
    path.symlink_to(path.name)  # to itself: there, and yet it cannot be read
    with pytest.raises(DataError, match=rf"cannot read {path}: .*\. Mend it or remove"):
        fetched(source, 0)


# Data sets of tfds.


def _shard(root: Path) -> Path:
    [path] = root.glob("*train*")
    return path


def _missing_shard(root: Path) -> None:
    _shard(root).unlink()


def _cut_shard(root: Path) -> None:
    os.truncate(_shard(root), _shard(root).stat().st_size // 2)


def _empty_shard(root: Path) -> None:
    os.truncate(_shard(root), 0)


def _flipped_bit(root: Path) -> None:
    whole = bytearray(_shard(root).read_bytes())
    whole[whole.index(b"JFIF")] ^= 1
    _shard(root).write_bytes(whole)


def _damaged_description(root: Path) -> None:
    (root / "dataset_info.json").write_text("{")


def _lengths(root: Path, *lengths: int) -> None:
    path = root / "dataset_info.json"
    about = json.loads(path.read_text())
    [split] = (split for split in about["splits"] if split["name"] == "train")
    split["shardLengths"] = [str(length) for length in lengths]
    path.write_text(json.dumps(about))


def _lengths_beyond_memory(root: Path) -> None:
    _lengths(root, 99_999_999_999)


def _files_without_end(root: Path) -> None:
    _lengths(root, *[1] * 70_000)


def _features(root: Path, old: str, new: str) -> None:
    path = root / "features.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _cut_features(root: Path) -> None:
    (root / "features.json").write_text('{"featuresDict": {')


def _feature_of_no_name(root: Path) -> None:
    _features(root, "image_feature.Image", "image_feature.Imagf")


def _feature_that_would_be_imported(root: Path) -> None:
    """A module that stops the tests if it is."""
    (root / "evil_module.py").write_text("raise SystemExit('imported')\n")
    _features(root, "tensorflow_datasets.core.features.image_feature", "evil_module")


def _classes_below_zero(root: Path) -> None:
    (root / "label.labels.txt").unlink()
    _features(root, '"numClasses": "1000"', '"numClasses": "-3"')


def _classes_beyond_memory(root: Path) -> None:
    (root / "label.labels.txt").unlink()
    _features(root, '"numClasses": "1000"', '"numClasses": "1000000000000"')


def _pipe_of_names(root: Path) -> None:
    (root / "label.labels.txt").unlink()
    os.mkfifo(root / "label.labels.txt")


def _with_record(root: Path, record: bytes) -> None:
    """Puts one record in the place of all."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(_shard(root)), "group_size:1")
    for _ in range(len(TRAIN)):
        writer.write(record)
    writer.close()


def _label_too_large(root: Path) -> None:
    _with_record(root, example(f"{WNIDS[0]}_0.JPEG", (1000, file_of(0))))


def _label_below_zero(root: Path) -> None:
    _with_record(root, example(f"{WNIDS[0]}_0.JPEG", (-1, file_of(0))))


def _record_of_something_else(root: Path) -> None:
    _with_record(root, b"\xff\xff not a protocol buffer")


def _record_without_label(root: Path) -> None:
    _with_record(root, b"")


TFDS_FAULTS = [
    (_missing_shard, "1 of 1 files of "),
    (_cut_shard, "chunk header hash mismatch"),
    (_empty_shard, "has 0 bytes, and dataset_info.json says that it has 18 records"),
    (_lengths_beyond_memory, "says that it has 99,999,999,999 records"),
    (_files_without_end, "says that its split train has 70,000 files; at most 65,536"),
    (_flipped_bit, "chunk data hash mismatch"),
    (_damaged_description, "(dataset_info.json, features.json) is damaged: "),
    (_cut_features, "(dataset_info.json, features.json) is damaged: "),
    (_feature_of_no_name, "Unrecognized FeatureConnector type"),
    (_feature_that_would_be_imported, "names the class 'evil_module.Image', which"),
    (_classes_below_zero, "label has -3 classes; 1 to 1,048,576 are possible"),
    (_classes_beyond_memory, "its label has 1000000000000 classes; 1 to"),
    (_pipe_of_names, "label.labels.txt is no file"),
    (_label_too_large, "label 1000, outside 0..999"),
    (_label_below_zero, "label -1, outside 0..999"),
    (_record_of_something_else, "is damaged: Error parsing message"),
    (_record_without_label, "is damaged: list index"),
]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tfds") / "imagenet2012" / "5.1.0"
    return write_tfds(root, "array_record")


@pytest.mark.parametrize("door", ["statistics", "check", "imagenet"])
@pytest.mark.parametrize("damage, words", by_name(TFDS_FAULTS))
def test_data_sets_that_are_wrong_are_one_message(
    damage, words, door, data_set, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "imagenet2012" / "5.1.0"
    shutil.copytree(data_set, root)
    damage(root)
    monkeypatch.syspath_prepend(root)  # what `python -m` does with the folder it is in
    originals._reader.cache_clear()
    write_shards_here(monkeypatch)
    arguments = ["--source=imagenet2012", f"--data_dir={tmp_path}"]
    if door == "check":
        arguments.append(f"--out={tmp_path / 'sheet.png'}")
    if door == "imagenet":
        arguments = [f"--source={root}", f"--data_dir={tmp_path / 'new'}"]
    assert prepare.main(["prepare", door, *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and str(root) in error
    assert re.search(r"[Pp]repare (it|that data set|the data set) again", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "new" / "imagenet2012_256" / "1.0.0").exists()


# Archives.

TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def _cut_in_a_picture(source: Path) -> None:
    os.truncate(source / TRAIN_TAR, 30_000)


def _cut_between_pictures(source: Path, name=VALIDATION_TAR) -> None:
    with tarfile.open(source / name) as archive:
        last = archive.getmembers()[-1]
    os.truncate(source / name, last.offset)


def _cut_between_classes(source: Path) -> None:
    _cut_between_pictures(source, TRAIN_TAR)


def _compressed(source: Path) -> None:
    path = source / TRAIN_TAR
    path.write_bytes(gzip.compress(path.read_bytes()))


def _sorted_wrongly(source: Path) -> None:
    inner = tar_of({f"{WNIDS[1]}_0.JPEG": file_of(0)})
    whole = tar_of({f"{WNIDS[0]}.tar": inner})
    (source / TRAIN_TAR).write_bytes(whole)


def _cut_in_a_class(source: Path) -> None:
    inner = tar_of({f"{WNIDS[0]}_0.JPEG": file_of(0)})[:2000]
    whole = tar_of({f"{WNIDS[0]}.tar": inner})
    (source / TRAIN_TAR).write_bytes(whole)


def _without_validation(source: Path) -> None:
    (source / VALIDATION_TAR).unlink()


def _not_an_archive(source: Path) -> None:
    (source / TRAIN_TAR).write_bytes(b"<html>404</html>" * 100)


def _flat_train(source: Path) -> None:
    flat = tar_of({name: data for name, (_, data) in TRAIN.items()})
    (source / TRAIN_TAR).write_bytes(flat)


def _unknown_class(source: Path) -> None:
    (source / TRAIN_TAR).write_bytes(tar_of({"n00000000.tar": b""}))


def _other_validation_names(source: Path) -> None:
    (source / VALIDATION_TAR).write_bytes(tar_of({"1.jpg": b"x"}))


def _twice(source: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        for _ in range(2):
            member = tarfile.TarInfo(f"{WNIDS[0]}_0.JPEG")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    whole = tar_of({f"{WNIDS[0]}.tar": inner.getvalue()})
    (source / TRAIN_TAR).write_bytes(whole)


def _cut_in_a_header(source: Path) -> None:
    with tarfile.open(source / VALIDATION_TAR) as archive:
        last = archive.getmembers()[-1]
    os.truncate(source / VALIDATION_TAR, last.offset + 200)


def _cut_in_a_header_of_a_class(source: Path) -> None:
    inner = tar_of({f"{WNIDS[0]}_{i}.JPEG": b"x" for i in range(2)})[: 1024 + 200]
    (source / TRAIN_TAR).write_bytes(tar_of({f"{WNIDS[0]}.tar": inner}))


ARCHIVE_FAULTS = [
    (_cut_in_a_picture, "was the download cut off?"),
    (_cut_between_pictures, "was the download cut off?"),
    (_cut_between_classes, "there is no end mark. It has"),
    (_cut_in_a_class, f"archive {WNIDS[0]}.tar: unexpected end of data"),
    (_cut_in_a_header, "there is no end mark. It has"),
    (_cut_in_a_header_of_a_class, f"archive {WNIDS[0]}.tar: there is no end mark"),
    (_compressed, "is compressed; the official archive is not"),
    (_sorted_wrongly, f"{WNIDS[1]}_0.JPEG in"),
    (_without_validation, "no validation split (ILSVRC2012_img_val.tar or val/"),
    (_not_an_archive, "the official archive 147,897,477,120"),
    (_flat_train, "expected archives of classes, such as n01440764.tar"),
    (_unknown_class, "none of the 1,000 classes of ILSVRC-2012"),
    (_other_validation_names, "is no validation picture of ILSVRC-2012"),
    (_twice, f"holds {WNIDS[0]}_0.JPEG more than once"),
]


@pytest.mark.parametrize("damage, words", by_name(ARCHIVE_FAULTS))
def test_archives_that_are_wrong_are_one_message(damage, words, tmp_path, capsys):
    source = write_archives(tmp_path / "source")
    damage(source)
    before = sorted(tmp_path.rglob("*"))
    target = tmp_path / "target"
    arguments = [f"--source={source}", f"--data_dir={target}"]
    assert prepare.main(["prepare", "imagenet", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and str(source) in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing was begun, nor anywhere else


def test_an_archive_within_a_class_is_no_picture(tmp_path, monkeypatch, capsys):
    source = write_archives(tmp_path / "source")
    more = tar_of({f"{WNIDS[0]}_0.JPEG": file_of(0), "more.tar": tar_of({"x": b"x"})})
    (source / TRAIN_TAR).write_bytes(tar_of({f"{WNIDS[0]}.tar": more}))
    write_shards_here(monkeypatch)
    arguments = [f"--source={source}", f"--data_dir={tmp_path}", "--max_unreadable=0"]
    assert prepare.main(["prepare", "imagenet", *arguments]) == 1
    assert "cannot decode more.tar (10240 bytes): it is" in capsys.readouterr().err


def _loose_validation(source: Path) -> None:
    (source / "val" / "ILSVRC2012_val_00000010.JPEG").write_bytes(file_of(0))


def _half_a_download(source: Path) -> None:
    (source / "train" / WNIDS[0] / "x.JPEG.part").touch()


def _picture_of_bytes(source: Path) -> None:
    (source / "train" / WNIDS[0] / os.fsdecode(b"\xff.JPEG")).touch()


def _pictures_deeper(source: Path) -> None:
    (source / "train" / WNIDS[0] / "more").mkdir()


def _wrong_validation_folder(source: Path) -> None:
    [path] = source.glob("val/*/ILSVRC2012_val_00000001.JPEG")
    (source / "val" / WNIDS[0]).mkdir()
    path.rename(source / "val" / WNIDS[0] / path.name)


IMAGENET_FOLDER_FAULTS = [
    (_loose_validation, "what to do with val/ILSVRC2012_val_00000010.JPEG"),
    (_half_a_download, f"what to do with train/{WNIDS[0]}/x.JPEG.part"),
    (_picture_of_bytes, r"'\udcff.JPEG' in folder "),
    (_pictures_deeper, f"what to do with train/{WNIDS[0]}/more"),
    (
        _wrong_validation_folder,
        "is labelled n01440764 (tench), but it is of class n01751748 (sea snake)",
    ),
]


@pytest.mark.parametrize("damage, words", by_name(IMAGENET_FOLDER_FAULTS))
def test_folders_of_imagenet_that_are_wrong_are_one_message(
    damage, words, tmp_path, capsys
):
    source = write_folders(tmp_path / "source", flat=False)
    damage(source)
    arguments = [f"--source={source}", f"--data_dir={tmp_path}"]
    assert prepare.main(["prepare", "imagenet", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in " ".join(error.split()), error
    assert not (tmp_path / "imagenet2012_256").exists()


# How many were refused.


def test_a_broken_picture_is_named_counted_and_limited(tmp_path, capsys):
    name = f"{WNIDS[1]}_2.JPEG"
    broken = TRAIN | {name: (1, TRAIN[name][1][:500])}
    empty = VALIDATION | {"ILSVRC2012_val_00000004.JPEG": b""}
    source = write_archives(tmp_path / "source", broken, empty)
    arguments = (f"--source={source}", f"--data_dir={tmp_path}")
    assert imagenet(*arguments, "--max_unreadable=1", "--workers=2") == 1
    error = capsys.readouterr().err
    assert "2 pictures cannot be read; --max_unreadable=1 allows no more. Put" in error
    assert f"cannot decode {name} (500 bytes)" in error
    assert "cannot decode ILSVRC2012_val_00000004.JPEG (0 bytes)" in error
    with pytest.raises(FileNotFoundError, match="was begun there; the same command"):
        open_source("imagenet2012_256", "train", data_dir=str(tmp_path))
    assert imagenet(*arguments, "--max_unreadable=2", "--workers=2") == 0
    output = capsys.readouterr().out
    assert "left out, 2 pictures" in output and f"cannot decode {name}" in output
    directory = tmp_path / "imagenet2012_256" / "1.0.0"
    record = json.loads((directory / "preparation.json").read_text())
    assert record["pictures"] == {
        "train": len(TRAIN) - 1,
        "validation": NUM_VALIDATION - 1,
    }
    assert [n for n, _ in record["unreadable"]] == [
        name,
        "ILSVRC2012_val_00000004.JPEG",
    ]
    assert set(records(tmp_path, "train")) == set(TRAIN) - {name}


def imagenet(*arguments: str) -> int:
    return prepare.main(["prepare", "imagenet", *arguments])


def test_a_thousand_broken_pictures_are_a_few_lines(tmp_path, monkeypatch, capsys):
    train = {f"{WNIDS[0]}_{i}.JPEG": (0, b"") for i in range(1000, 2000)} | TRAIN
    source = write_archives(tmp_path / "source", train)
    write_shards_here(monkeypatch)
    arguments = (f"--source={source}", f"--data_dir={tmp_path}")
    assert imagenet(*arguments) == 1
    error = capsys.readouterr().err
    assert "allows no more" in error and "  ... 1000 in all\n" in error
    assert error.count("\n") == 22
    assert imagenet(*arguments, "--max_unreadable=1000") == 0
    output = capsys.readouterr().out
    assert "left out, 1,000 pictures:\n" in output and "... 1000 in all" in output
    assert imagenet(*arguments) == 0
    assert "left out when it was made, 1,000 pictures" in capsys.readouterr().out


# Training.


def keep_statistics(pictures: Path, image_size: int) -> None:
    """A run would compute them first, and find there what is broken."""
    source = FolderSource(pictures, "train", image_size)
    statistics.compute(source).save(statistics.statistics_path(source))


@pytest.mark.parametrize(
    "split", ["train", pytest.param("test", marks=pytest.mark.slow)]
)
def test_a_broken_picture_ends_a_run_with_its_name(split, folder, tmp_path):  # noqa: F811
    """In the middle of an epoch, or in the evaluation after it."""
    pictures = tmp_path / "pictures"
    shutil.copytree(folder, pictures)
    config = small_config(pictures, num_epochs=2.0)
    keep_statistics(pictures, config.data.image_size)
    names = sorted(pictures.glob(f"{split}/*/*.png"))
    order = TrainOrder(len(names), batch_size=6, seed=config.seed)
    broken = names[order[2][3]]
    broken.write_bytes(broken.read_bytes()[:300])
    words = rf"cannot decode {broken} \(300 bytes\): .*truncated.*intact copy"
    with pytest.raises(DataError, match=words):
        train.train_and_evaluate(config, tmp_path / "run")
    steps = {row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert steps == ({5} if split == "test" else set())  # four and a bit make an epoch


@pytest.mark.slow
def test_a_broken_picture_of_one_process_ends_both(folder, tmp_path):  # noqa: F811
    """It is in the share of one of them; the other does not wait for it."""
    pictures = tmp_path / "pictures"
    shutil.copytree(folder, pictures)
    keep_statistics(pictures, 226)
    names = sorted(pictures.glob("train/*/*.png"))
    order = TrainOrder(len(names), batch_size=6, seed=0)
    broken = names[order[2][5]]
    broken.write_bytes(broken.read_bytes()[:300])
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(folder=pictures))
    launched = launch(config, tmp_path / "run", 2, "--config.parallel.mode=data")
    said, _ = launched.communicate(timeout=120)
    assert launched.returncode == 1, said
    errors = [line for line in said.splitlines() if "error: " in line]
    assert f"process 1: error: cannot decode {broken} (300 bytes): " in said
    assert any("process 0: error: another process is gone" in e for e in errors), said
    assert "Traceback" not in said


# A full disk.


@contextlib.contextmanager
def leaving(disk: Path, free: int) -> Iterator[None]:
    """Fills a disk, but for so many bytes."""
    rest = shutil.disk_usage(disk).free - free
    (disk / "others").write_bytes(bytes(max(0, rest)))
    try:
        yield
    finally:
        (disk / "others").unlink()


def check_finished_shards(unfinished: Path) -> None:
    """What a later start takes for whole is whole."""
    for result in unfinished.glob("parts/*.json"):
        shard = unfinished / result.stem
        assert json.loads(result.read_text())["bytes"] == shard.stat().st_size


def test_a_disk_that_becomes_full_while_imagenet_is_prepared(
    small_disk, tmp_path, monkeypatch, capsys
):
    """At every stage: tables, shards, descriptions, statistics."""
    disk, source = small_disk(8), write_archives(tmp_path / "source")
    directory = disk / "tfds" / "imagenet2012_256" / "1.0.0"
    arguments = (f"--source={source}", f"--data_dir={disk / 'tfds'}")
    made = write_shards_here(monkeypatch)
    monkeypatch.setattr(preparation, "check_room", lambda *_: None)
    monkeypatch.setattr(preparation, "_FEWEST_PICTURES", 9)  # train: two shards
    failures = 0
    for free in range(0, 6 << 20, 160 << 10):
        with leaving(disk, free):
            if imagenet(*arguments) == 0:
                break
        error = capsys.readouterr().err
        failures += 1
        assert f"cannot write in {disk}" in error and error.count("\n") == 1
        assert "No space left on device (0." in error and " MB free" in error
        assert "Make room there and start the same command again" in error
        assert not directory.exists()
        unfinished = directory.with_name("1.0.0.incomplete")
        check_finished_shards(unfinished)
        assert not [*unfinished.rglob(".*"), *unfinished.rglob("*.tmp")]
    assert failures >= 5
    assert len(made) == len(set(made)) == 3  # what was finished was not made again
    assert set(records(disk / "tfds", "train")) == set(TRAIN)
    train_split = TfdsSource(directory, "train", 256)
    stored = statistics.load(statistics.statistics_path(train_split))
    assert stored.num_examples == len(TRAIN)


@pytest.mark.slow
def test_a_disk_that_becomes_full_under_worker_processes(small_disk, tmp_path, capsys):
    """Noise takes twice the room that pictures are expected to."""
    disk, data = small_disk(6), encoded(noise(300), "JPEG", quality=95)
    train_files = {f"{wnid}_{i}.JPEG": (0, data) for wnid in WNIDS for i in range(33)}
    source = write_archives(tmp_path / "source", train_files)
    arguments = (f"--source={source}", f"--data_dir={disk}", "--workers=2")
    assert imagenet(*arguments) == 1
    error = capsys.readouterr().err
    assert f"prepare: cannot write in {disk}: No space left on device" in error
    assert " MB more needed). Make room there and start" in error
    assert error.count("\n") == 1
    unfinished = disk / "imagenet2012_256" / "1.0.0.incomplete"
    assert not [*disk.rglob(".*.tmp"), *disk.rglob("*dataset_info*")]
    check_finished_shards(unfinished)


def test_what_does_not_fit_is_not_begun(small_disk, tmp_path, capsys):
    disk, source = small_disk(1), write_archives(tmp_path / "source")
    assert imagenet(f"--source={source}", f"--data_dir={disk / 'new'}") == 1
    error = capsys.readouterr().err
    assert f"{disk / 'new'} has 1.0 MB free; about 3.0 MB are needed" in error
    assert not (disk / "new").exists()


def test_permissions_are_checked_first(tmp_path, monkeypatch, capsys):
    source = write_archives(tmp_path / "source")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert imagenet(f"--source={source}", f"--data_dir={tmp_path}") == 1
    assert f"cannot write to {tmp_path}: no permission" in capsys.readouterr().err


def test_a_disk_that_becomes_full_while_textures_are_drawn(
    small_disk, monkeypatch, capsys
):
    disk = small_disk(12)
    arguments = ["prepare", "textures", f"--data_dir={disk / 'tfds'}"]
    with leaving(disk, 2 << 20):
        assert prepare.main(arguments) == 1
    error = capsys.readouterr().err
    assert "tfds has 2.1 MB free; about 127.5 MB are needed. Make room" in error
    monkeypatch.setattr(textures, "check_room", lambda *_: None)
    with (
        leaving(disk, 2 << 20),
        pytest.raises(OSError, match="Make room there and start") as full,
    ):
        textures.build(disk / "tfds", tiny=True)
    assert f"cannot write in {disk}" in str(full.value)
    assert not list(disk.glob("tfds/textures/tiny/1.0.0*"))
    textures.build(disk / "tfds", tiny=True)
    size = sum(p.stat().st_size for p in disk.rglob("*") if p.is_file())
    assert 0.9 < size / (300 * textures._BYTES_A_PICTURE) < 1.1


def test_statistics_on_a_full_disk_leave_the_old_ones(small_disk, capsys):
    disk = small_disk(4)
    root = write_folders(disk, flat=True, train=dict(list(TRAIN.items())[:4]))
    arguments = ["prepare", "statistics", f"--source=folder:{root}"]
    assert prepare.main([*arguments, "--max_examples=1"]) == 0
    before = set(root.iterdir())
    capsys.readouterr()
    with leaving(disk, 100_000):
        assert prepare.main(arguments) == 1
    error = capsys.readouterr().err
    assert f"cannot write in {root}: No space left" in error and error.count("\n") == 1
    assert set(root.iterdir()) == before
    path = root / "statistics_256.npz"
    assert statistics.load(path).num_examples == 1
    assert prepare.main(arguments) == 0
    assert statistics.load(path).num_examples == 4


# One process at a time.

_HOLD = """
import pathlib, runpy, sys
held = runpy.run_path("alexnet_jax/data/locks.py")["held"]
with held(pathlib.Path(sys.argv[1]), wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""


def refused(path: Path) -> str:
    with pytest.raises(locks.HeldError) as error, locks.held(path, wait=False):
        pass
    assert str(error.value) == f"{path} is held by {error.value.holder}"
    return error.value.holder


def test_who_is_refused_is_told_who_holds_it(tmp_path):
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for _ in range(2):  # who is refused must not wipe out the holder's line
            who = refused(path)
            assert f"process {holder.pid} on {socket.gethostname()} since 2" in who
            assert "UTC" in who and "sys.stdin.read()" in who
        holder.kill()
    assert path.read_text()  # it was killed: its line is still there, but nobody's
    with locks.held(path, wait=True):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        assert f"process {os.getpid()} on" in refused(path)
    assert path.read_text() == ""


def test_a_lock_file_that_says_nothing(tmp_path):
    path = tmp_path / ".lock"
    for said in (b"", b"{", b"[]", b"\xff", b'{"pid": 1}', b"null"):
        with locks.held(path, wait=False):
            path.write_bytes(said)
            assert refused(path) == "another process"
            assert path.read_bytes() == said


def test_a_full_disk_holds_a_lock_all_the_same(small_disk):
    disk = small_disk(1)
    (disk / ".lock").touch()
    with pytest.raises(OSError, match="No space left"):
        (disk / "full").write_bytes(bytes(2 << 20))
    with locks.held(disk / ".lock", wait=False):
        assert refused(disk / ".lock") == "another process"


def test_one_preparation_at_a_time(tmp_path, monkeypatch, capsys):
    """The second one learns it before it reads archives for half an hour."""
    source = write_archives(tmp_path / "source")
    monkeypatch.setattr(originals, "find", None)
    with preparation._alone(tmp_path / "imagenet2012_256"):
        assert imagenet(f"--source={source}", f"--data_dir={tmp_path}") == 1
    error = capsys.readouterr().err
    who = f"is being prepared by process {os.getpid()} on {socket.gethostname()} since"
    assert who in error and "wait for it, or end it" in error


def at_once(*command: str) -> list[str]:
    """The outputs of two processes that do the same at the same time."""
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    return outputs


@pytest.mark.slow
def test_two_processes_draw_the_textures_once(tmp_path):
    script = (
        "import sys; from alexnet_jax.data import open_source; "
        "print(open_source('textures/tiny', 'test', data_dir=sys.argv[1]).num_examples)"
    )
    said = at_once("-c", script, str(tmp_path))
    assert [text.splitlines()[-1] for text in said] == ["100", "100"]
    assert sum(text.count("Drawing the textures") for text in said) == 1
    assert [path.name for path in (tmp_path / "textures" / "tiny").iterdir()] == [
        "1.0.0"
    ]


@pytest.mark.slow
def test_two_processes_compute_the_same_statistics(tmp_path):
    root = write_folders(tmp_path, flat=True)
    arguments = ("prepare", "statistics", f"--source=folder:{root}")
    assert prepare.main(list(arguments)) == 0
    path = root / "statistics_256.npz"
    expected = path.read_bytes()
    path.unlink()
    at_once("-m", "alexnet_jax.prepare", *arguments[1:])
    assert path.read_bytes() == expected
    assert {p.name for p in root.iterdir()} == {"train", "val", "statistics_256.npz"}
