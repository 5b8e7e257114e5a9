"""Hostile inputs for `fuzz`: each maker writes one into a folder and returns the command lines that read it.

Everything is drawn from the `random.Random` that is passed in, so a case can be made again from its number.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

MARK = "<script>alert(1)"
NAMES = [
    "cat", "dog", "0", " ", "a b", "a\nb", "a\rb", "\x1b[31mred\x1b[0m", MARK, "<img src=x onerror=alert(1)>",
    "'\"&;|`",
    "-rf", "--help", "%s%n%d", "{0}", "${oc.env:HOME}", "{{7*7}}", "=1+1", "CON", "nul.txt", "\u202etxt.exe", "\u0301",
    "\U0001f408", "x" * 255, "é" * 127, "..x", "~", "$HOME", "*", "?", "a,b", "a:b", "a\\b", "\x7f",
    os.fsdecode(b"\xff\xfe"), os.fsdecode(b"caf\xe9"), "train", "test", "__class__", "nan", "True", "None", "1e999",
]  # fmt: skip
"""Names of classes and files; none holds a slash or NUL, which a file system refuses."""
TEXTS = [*NAMES, "../../escape", "/etc/passwd", "a/../../b", "", "a/b", "\x00", "..", ".", "x" * 5000, "//", "C:\\x"]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 10**12, -(10**30), 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "a",
    "../x", [], [1], [[]], [None], {}, {"a": 1}, {"_target_": "os.system"}, MARK, "9" * 400, [1, "a", None], "no", "1",
]  # fmt: skip
WORDS = [
    "abc", "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e400", "[]", "[1]", "[a,b]", "{}", "{a: 1}", "null",
    "true", '""', "'../x'", "${seed}", "${oc.env:HOME}", "${nothing}", "???", "[1,", "{", "'", "a=b", "é",
    "\x1b[31m", "a\nb", "<b>", "9" * 40, "0x10", "1_000", "--x", "~", "@x", "\\",
    "[[[[]]]]", "${", "!!python/object:os.system", "a b",
]  # fmt: skip


NUMBERS = ["0", "1", "2", "3", "4", "8", "16", "0.5", "0.1", "1.0", "1e-3", "-1", "null", "true", "false", "[1,2]"]


def mutated(content: bytes, dice: random.Random) -> bytes:
    """`content` cut, with flipped bits, with a part doubled or removed, or with something after it."""
    how = dice.randrange(7)
    place = dice.randrange(len(content)) if content else 0
    if how == 0:
        return content[:place]
    if how == 1:
        return content + dice.randbytes(dice.randrange(1, 200))
    if how == 2:
        return content[:place] + content[place + dice.randrange(1, 50) :]
    if how == 3:
        return content[:place] + content[max(0, place - 40) : place] + content[place:]
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 5, 50))):
        if changed:
            spot = dice.randrange(min(len(changed), 200 if how == 4 else len(changed)))
            changed[spot] = dice.choice((changed[spot] ^ 1 << dice.randrange(8), 0, 255, dice.randrange(256)))
    return bytes(changed)


def mutated_json(value: Any, dice: random.Random, *, depth: int = 0) -> Any:
    """`value` with one entry, anywhere in it, replaced, removed, renamed or added."""
    if isinstance(value, dict) and value and (depth == 0 or dice.random() < 0.7):
        key = dice.choice(list(value))
        how = dice.random()
        if how < 0.6:
            return {**value, key: mutated_json(value[key], dice, depth=depth + 1)}
        if how < 0.8:
            return {name: part for name, part in value.items() if name != key}
        return {**value, dice.choice(TEXTS): dice.choice(VALUES)}
    if isinstance(value, list) and value and dice.random() < 0.5:
        place = dice.randrange(len(value))
        return [*value[:place], mutated_json(value[place], dice, depth=depth + 1), *value[place + 1 :]]
    return dice.choice([*VALUES, *TEXTS])


def json_bytes(value: Any, dice: random.Random) -> bytes:
    """`value` as JSON, now and then damaged as bytes."""
    content = json.dumps(value, default=str).encode("utf-8", "surrogatepass")
    return mutated(content, dice) if dice.random() < 0.3 else content


# ---- images


def picture(dice: random.Random) -> bytes:
    """An encoded image: any format, mode, size, often damaged, sometimes a bomb, an animation, or no image at all."""
    kind = dice.random()
    if kind < 0.08:
        return dice.choice(
            (b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", dice.randbytes(300))
        )
    if kind < 0.14:
        return png_with_size(*dice.choice(((0, 5), (2**31 - 1, 2**31 - 1), (65535, 65535), (12000, 12000), (1, 10**8))))
    if kind < 0.20:
        return animation(dice)
    mode = dice.choice(("L", "RGB", "RGBA", "P", "CMYK", "1", "LA", "I;16", "I", "F", "YCbCr", "L", "RGB", "L"))
    size = dice.choice(((16, 16), (16, 16), (16, 16), (1, 1), (1, 900), (17, 3), (64, 64), (300, 200)))
    shade = dice.randrange(256)
    image = Image.effect_noise(size, shade / 4 + 1) if dice.random() < 0.7 else Image.new("L", size, shade)
    with suppress(ValueError):
        image = image.convert(mode)
    endings = ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "PNG", "PNG"]
    options = {"exif": exif(dice)} if dice.random() < 0.1 else {}
    for name in (dice.choice(endings), "PNG", "TIFF"):
        buffer = io.BytesIO()
        with suppress(Exception):  # not every format takes every mode
            image.save(buffer, format=name, **options)
            break
    content = buffer.getvalue()
    return mutated(content, dice) if dice.random() < 0.4 else content


def png_with_size(width: int, height: int) -> bytes:
    """A small file whose header promises so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"\x00" * min(20_000_000, (width // 8 + 2) * min(height, 15000)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animation(dice: random.Random) -> bytes:
    frames = [Image.effect_noise((16, 16), 60 + 9 * n) for n in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format=dice.choice(("GIF", "PNG", "WEBP", "TIFF")), save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def exif(dice: random.Random) -> bytes:
    found = Image.Exif()
    found[0x0112] = dice.choice((1, 3, 6, 8, 9, 0, 65535))
    return dice.choice((found.tobytes(), b"Exif\x00\x00" + dice.randbytes(20)))


def put(path: Path, content: bytes) -> None:
    """Write unless the file system refuses the name."""
    with suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def odd_entry(path: Path, dice: random.Random) -> None:
    """Something that is no regular file where an image should be."""
    with suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        how = dice.randrange(6)
        if how == 0:
            path.mkdir()
        elif how == 1:
            os.mkfifo(path)
        else:
            path.symlink_to(("nowhere", path.name, "/dev/zero", "..")[how - 2])


def good_png(dice: random.Random) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 20 + dice.randrange(60)).save(buffer, format="PNG")
    return buffer.getvalue()


def image_folder(root: Path, dice: random.Random, *, hostility: float = 0.25) -> None:
    """Classes of images, some names and some files hostile."""
    plain = ["cat", "dog", "eel", "fox"]
    top = root / "train" if dice.random() < 0.15 else root
    for number in range(dice.choice((1, 2, 3, 3))):
        name = dice.choice(NAMES) if dice.random() < hostility else plain[number]
        for place in range(dice.choice((0, 1, 3, 6, 6))):
            stem = dice.choice(NAMES) if dice.random() < hostility else f"{place}"
            file = (
                top
                / name
                / (stem[: 240 if dice.random() < 0.5 else 255] + dice.choice((".png", ".png", ".JPG", ".gif")))
            )
            if dice.random() < hostility / 3:
                odd_entry(file, dice)
            else:
                put(file, picture(dice) if dice.random() < hostility else good_png(dice))


# ---- arrays and tables


def npz(dice: random.Random) -> bytes:
    """An .npz with training and test arrays, one or two of them not as they should be."""
    count, side = dice.choice(((30, 16), (30, 8), (3, 16), (0, 16), (30, 1), (200, 5)))
    noise = np.random.default_rng(dice.randrange(2**32))
    arrays: dict[str, Any] = {
        "train_images": noise.integers(0, 256, (count, side, side), dtype=np.uint8),
        "train_labels": np.arange(count) % 3,
        "test_images": noise.integers(0, 256, (count, side, side), dtype=np.uint8),
        "test_labels": np.arange(count) % 3,
    }
    if dice.random() < 0.5:
        arrays["class_names"] = np.array([dice.choice(TEXTS) for _ in range(dice.choice((3, 3, 3, 2, 0)))] or [""])
    for _ in range(dice.choice((0, 1, 1, 2))):
        key = dice.choice(list(arrays))
        arrays[key] = odd_array(arrays[key], dice)
        if dice.random() < 0.1:
            del arrays[key]
    buffer = io.BytesIO()
    arrays.pop("file", None)
    (np.savez_compressed if dice.random() < 0.3 else np.savez)(buffer, **arrays)
    content = buffer.getvalue()
    kind = dice.random()
    if kind < 0.1:
        return npz_of_header(dice)
    return mutated(content, dice) if kind < 0.35 else content


def odd_array(array: np.ndarray, dice: random.Random) -> np.ndarray:
    size = array.size
    choices: list[Callable[[], np.ndarray]] = [
        lambda: array.astype(dice.choice(("f4", "f8", ">f8", "i8", "u8", "f2", "c8", "U3", "S3", "?", "M8[s]", "O"))),
        lambda: array[..., None], lambda: array.reshape(-1), lambda: array[:0], lambda: array[: size // 2],
        lambda: np.zeros(()), lambda: np.full(array.shape, np.nan), lambda: np.full(array.shape, np.inf),
        lambda: np.full(array.shape, -1), lambda: np.full(array.shape, 2**62), lambda: np.array([object()]),
        lambda: np.zeros((3, 5, 7, 9, 2)), lambda: array.astype("f8") / 255, lambda: np.zeros(array.shape, "V8"),
        lambda: np.array([{"a": 1}], dtype=object), lambda: np.zeros((30, 2, 16, 16), np.uint8),
        lambda: np.zeros((30, 3, 16, 16), np.uint8), lambda: np.array(["a", "b", "a"]), lambda: np.arange(size),
    ]  # fmt: skip
    with suppress(ValueError, TypeError, IndexError):
        return dice.choice(choices)()
    return array


def npz_of_header(dice: random.Random) -> bytes:
    """Arrays whose headers promise absurd shapes or hold code, or a bomb of zeros."""
    header = dice.choice((
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 9999, 9999), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 4), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': __import__('os').system('touch escaped'), 'shape': (3,)}",
        "{" * 3000, "[" * 9000, "{'descr': '<U999999999', 'fortran_order': False, 'shape': (4,), }",
    ))  # fmt: skip
    text = header.encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", min(len(text), 65535)) + text + b"\x00" * 64
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in ("train_images", "train_labels"):
            archive.writestr(f"{key}.npy", content)
        archive.writestr("../escape.npy", b"x")
        if dice.random() < 0.2:
            archive.writestr("class_names.npy", b"\x00" * 200_000_000)
    return buffer.getvalue()


def csv_table(folder: Path, dice: random.Random) -> Path:
    """A table of image paths and labels, some of them odd, in one of the known forms."""
    for number in range(8):
        put(folder / f"{number}.png", picture(dice) if dice.random() < 0.2 else good_png(dice))
    rows = []
    for number in range(dice.choice((0, 1, 8, 12))):
        path = dice.choice(TEXTS) if dice.random() < 0.2 else f"{number % 9}.png"
        rows.append((path, dice.choice(TEXTS) if dice.random() < 0.2 else "ab"[number % 2]))
    head = ("path", "label") if dice.random() < 0.9 else (dice.choice(TEXTS), dice.choice(TEXTS))
    ending = dice.choice((".csv", ".csv", ".tsv", ".jsonl", ".parquet", ".txt"))
    if ending == ".jsonl":
        made = [json.dumps({head[0]: path, head[1]: dice.choice((label, label, 3, None, [1]))}) for path, label in rows]
        content = "\n".join(made).encode("utf-8", "replace")
    else:
        mark = "\t" if ending == ".tsv" else ","
        quoted = dice.random() < 0.7
        cells = [head, *rows]
        text = "\n".join(mark.join(f'"{part}"' if quoted else part for part in row) for row in cells)
        encoding = dice.choice(("utf-8", "utf-16", "latin-1", "utf-8-sig"))
        escaped = dice.random() < 0.3 and encoding == "utf-8"
        content = text.encode(encoding, "surrogateescape" if escaped else "replace")
        if ending == ".parquet":
            content = parquet(rows, head) or content
    file = folder / f"table{ending}"
    put(file, mutated(content, dice) if dice.random() < 0.3 else content)
    return file


def parquet(rows: list, head: tuple[str, str]) -> bytes:
    with suppress(Exception):
        import pandas as pd

        buffer = io.BytesIO()
        pd.DataFrame(rows, columns=list(head)).to_parquet(buffer)
        return buffer.getvalue()
    return b""


def shard(dice: random.Random) -> bytes:
    """A tar of samples, with members that lead elsewhere, links, odd labels."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=dice.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for number in range(dice.choice((0, 2, 6))):
            name = dice.choice(TEXTS) if dice.random() < 0.2 else f"s{number}"
            label = dice.choice(TEXTS) if dice.random() < 0.2 else str(number % 2)
            image = picture(dice) if dice.random() < 0.2 else good_png(dice)
            second = (
                ("json", json.dumps({"label": dice.choice((label, *VALUES))}))
                if dice.random() < 0.3
                else ("cls", label)
            )
            parts = [("png", image), (second[0], second[1].encode("utf-8", "replace"))]
            for ending, content in parts:
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                if dice.random() < 0.04:
                    member.type, member.linkname, member.size = (
                        dice.choice((tarfile.SYMTYPE, tarfile.FIFOTYPE)),
                        "/etc/passwd",
                        0,
                    )
                with suppress(Exception):
                    tar.addfile(member, io.BytesIO(content))
    content = buffer.getvalue()
    return mutated(content, dice) if dice.random() < 0.35 else content


def idx(dice: random.Random) -> bytes:
    """An IDX file, gzipped or not, with a header that may lie."""
    shape = dice.choice(((5, 4, 4), (5,), (0,), (2**31, 2**31, 4), (5, 4), ()))
    body = bytes(80) if shape == (5, 4, 4) else bytes(5)
    code = dice.choice((8, 8, 8, 13, 255))
    content = (
        bytes([0, 0, code, len(shape)]) + b"".join(struct.pack(">I", min(side, 2**32 - 1)) for side in shape) + body
    )
    content = mutated(content, dice) if dice.random() < 0.5 else content
    return gzip.compress(content) if dice.random() < 0.5 else content


# ---- what runs wrote


class Harmful:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("escaped",)


def checkpoint(state: dict, dice: random.Random) -> bytes:
    """A checkpoint whose checksum is right and whose contents are not."""
    how = dice.randrange(8)
    state = dict(state)
    if how == 0:
        state[dice.choice([*state, "new"])] = Harmful()
    elif how == 1:
        state[dice.choice(list(state))] = dice.choice(VALUES)
    elif how == 2:
        state.pop(dice.choice(list(state)))
    elif how in (3, 4):
        model = dict(state.get("model") or {"x": torch.zeros(2)})
        key = dice.choice(list(model))
        model[key] = dice.choice(
            (torch.zeros(3), torch.full_like(model[key].float(), float("nan")), "text", model[key].int())
        )
        state["model"] = model
    elif how == 5:
        state = mutated_json(state, dice)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    if how >= 6:
        payload = absurd_zip(payload, dice) if how == 6 else mutated(payload, dice)
    return b"gen_invariance checkpoint 1 " + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


def absurd_zip(payload: bytes, dice: random.Random) -> bytes:
    """The archive of a torch file with one member damaged, gone or huge."""
    with suppress(Exception):
        source, buffer = zipfile.ZipFile(io.BytesIO(payload)), io.BytesIO()
        names = source.namelist()
        bad, how = dice.choice(names), dice.randrange(3)
        with zipfile.ZipFile(buffer, "w", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as target:
            for name in names:
                content = source.read(name)
                if name == bad and how == 1:
                    continue
                target.writestr(name, mutated(content, dice) if name == bad and how == 0 else content)
            if how == 2:
                target.writestr("archive/data/999", bytes(300_000_000), zipfile.ZIP_DEFLATED)
        return buffer.getvalue()
    return payload


def safetensors_file(content: bytes, dice: random.Random) -> bytes:
    """Weights whose header lies, or whose values are no numbers."""
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    how = dice.randrange(6)
    key = dice.choice([name for name in header if name != "__metadata__"])
    if how == 0:
        header[key]["shape"] = dice.choice(([2**40], [-1], [], [0], [2**31, 2**31], ["a"], [3, 3]))
    elif how == 1:
        header[key]["data_offsets"] = dice.choice(([0, 2**62], [5, 1], [-4, 4], [0, 0]))
    elif how == 2:
        header[key]["dtype"] = dice.choice(("F64", "I8", "BF16", "BOOL", "X9", "F16"))
    elif how == 3:
        header = mutated_json(header, dice)
    elif how == 4:
        body = b"\xff" * len(body)
    text = json.dumps(header, default=str).encode("utf-8", "surrogatepass")
    length = dice.choice((len(text), len(text), len(text), len(text), 2**63, 0, 10**9))
    made = struct.pack("<Q", length) + text + body
    return mutated(made, dice) if how == 5 else made


def copy_tree(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, symlinks=True)
    return target
