"""Hostile images against the real token store: no crash, no hang, no full memory, and no bad image moves a row.

Images come from a seeded generator: whole ones of every kind, which must give a row; broken ones, which must not;
small files that attack the decoders (they claim or unpack to gigabytes, or flood them with metadata); and whole ones
with random damage. They go through `build_token_store` in a process of their own, twice: one by one, which times each,
and in full batches. A label names each image, so the rows show which were kept.

A failure is an image that is kept or left out against its kind, that takes more than SECONDS of processor time, or
whose row in a batch is not the row it gives alone. More than MEMORY, or the end of the process, fails all.
"""

import argparse
import io
import json
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.report import write_report

SIDE = 5792  # the largest square that is decoded
SECONDS = 5.0  # of processor time for one image; unlike the clock, it does not count what else the machine does
MEMORY = 1024  # MiB beyond what the process holds before the first image: 32 bytes for every pixel that is decoded
ATTACKS = 66  # at most, and one image in 20; they take their time by intention, and there are 33 kinds

Draw = np.random.Generator


# -- whole images: each must give a row ------------------------------------------------------------------------------


def pixels(draw: Draw, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    shape = (int(draw.integers(8, 40)), int(draw.integers(8, 40)), channels)
    high = 1.0 if dtype is np.float32 else np.iinfo(dtype).max
    values = draw.random(shape) * high
    return values.astype(dtype)[..., 0] if channels == 1 else values.astype(dtype)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(draw: Draw, mode: str) -> Image.Image:
    if mode in ("I;16", "F"):
        return Image.fromarray(pixels(draw, 1, np.uint16 if mode == "I;16" else np.float32))
    if mode in ("L", "1"):
        return Image.fromarray(pixels(draw, 1)).convert(mode)
    if mode == "LA":
        return Image.fromarray(pixels(draw, 4), "RGBA").convert("LA")
    image = Image.fromarray(pixels(draw, 4 if mode == "RGBA" else 3))
    return image if mode == "RGBA" else image.convert(mode)


MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"),
    "PPM": ("1", "L", "RGB"),
    "JPEG2000": ("L", "RGB", "RGBA"),
}


def whole(draw: Draw) -> tuple[str, Any]:
    """An ordinary file of one of many formats and modes, some with a wrong name."""
    kind = str(draw.choice(list(MODES)))
    mode = str(draw.choice(MODES[kind]))
    options: dict[str, Any] = {}
    if kind == "JPEG":
        options = {"progressive": bool(draw.integers(2)), "quality": int(draw.integers(1, 96))}
    if kind == "TIFF" and mode != "F":
        options = {"compression": str(draw.choice(["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"]))}
    if kind == "WEBP":
        options = {"lossless": bool(draw.integers(2))}
    content = saved(picture(draw, mode), kind, **options)
    return f"{kind} {mode}", {"bytes": content, "path": str(draw.choice(["a.png", "a.jpg", "a.txt", "../../a", ""]))}


def animated(draw: Draw) -> tuple[str, Any]:
    kind = str(draw.choice(["GIF", "PNG", "WEBP", "TIFF"]))
    frames = [Image.fromarray(pixels(draw)).resize((24, 16)) for _ in range(int(draw.integers(2, 6)))]
    return f"animated {kind}", saved(frames[0], kind, save_all=True, append_images=frames[1:])


def odd_metadata(draw: Draw) -> tuple[str, Any]:
    """Sound pixels beside EXIF, ICC and text that are not."""
    image = picture(draw, "RGB")
    exif = Image.Exif()
    exif[0x0112] = int(draw.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 65535]))
    name, options = {
        0: ("orientation", {"exif": exif}),
        1: ("EXIF of noise", {"exif": b"Exif\0\0" + draw.bytes(300)}),
        2: ("ICC of noise", {"icc_profile": draw.bytes(500)}),
        3: ("EXIF that points to itself", {"exif": b"Exif\0\0" + tiff([(0x8769, 4, 1, 8)])}),
        4: ("EXIF that claims 4 GiB", {"exif": b"Exif\0\0" + tiff([(0x0112, 2, 2**32 - 1, 8)])}),
    }[int(draw.integers(5))]
    kind = str(draw.choice(["JPEG", "PNG", "WEBP"]))
    return f"{kind}, {name}", saved(image, kind, **options) + draw.bytes(int(draw.integers(0, 2)) * 50)


def one_pixel(draw: Draw) -> tuple[str, Any]:
    kind = str(draw.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    width, height = ((1, 1), (1, 3000), (3000, 1))[int(draw.integers(3))]
    return f"{width}x{height} {kind}", saved(Image.new("L", (width, height), 77), kind)


# -- broken: each must be left out -----------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, data: bytes, depth: int = 8, colour: int = 0, before: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(tags: list[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    """A little-endian TIFF with one directory of (tag, type, count, value or offset)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


def no_image(draw: Draw) -> tuple[str, Any]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", saved(picture(draw, "L"), "PNG"))
    values = {
        "empty": b"",
        "nothing": None,
        "noise": draw.bytes(int(draw.integers(1, 5000))),
        "HTML": b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>",
        "SVG": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>",
        "zip": archive.getvalue(),
        "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n",
        "no such file": {"bytes": None, "path": "/no/such/file.png"},
        "device without end": {"bytes": None, "path": "/dev/zero"},
        "folder": {"bytes": None, "path": "/"},
        "path with a null": "a\0b.png",
        "neither bytes nor path": {"bytes": None, "path": None},
        "number": 7,
        "float TIFF with NaN": saved(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"),
        "float TIFF with infinity": saved(Image.fromarray(np.full((9, 9), np.inf, np.float32)), "TIFF"),
        "array with NaN": np.full((9, 9), np.nan, np.float32),
        "array of text": np.array([["a", "b"]]),
        "empty array": np.zeros((0, 4, 3), np.uint8),
    }
    name = str(draw.choice(list(values)))
    return name, values[name]


def truncated(draw: Draw) -> tuple[str, Any]:
    kind = str(draw.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "JPEG2000"]))
    content = saved(Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    return f"truncated {kind}", content[: int(len(content) * draw.uniform(0.01, 0.6))]


def huge_header(draw: Draw) -> tuple[str, Any]:
    """A few bytes that claim 30,000 x 30,000 pixels or more."""
    side = int(draw.choice([30_000, 50_000, 65_535]))
    two = struct.pack("<HH", side, side)
    jpeg = (
        b"\xff\xd8\xff\xc0\0\x0b\x08"
        + struct.pack(">HH", side, side)
        + b"\x01\x01\x11\0\xff\xda\0\x08\x01\x01\0\0\x3f\0"
    )
    strip = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    frame = b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0" + two + b"\0\x02\x02\x4c\x01\0;"
    canvas = struct.pack("<I", 16_382)[:3] * 2
    values = {
        "PNG": png(side, side, zlib.compress(bytes(100_000))),
        "PNG of 2**31 - 1": png(2**31 - 1, 2**31 - 1, zlib.compress(b"\0")),
        "JPEG": jpeg + bytes(1000) + b"\xff\xd9",
        "GIF": b"GIF89a" + two + frame,
        "GIF frame beyond its canvas": b"GIF89a\x08\0\x08\0" + frame,
        "BMP": b"BM" + struct.pack("<IIIIiiHHIIIIII", 58, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(4),
        "TIFF": tiff([*strip, (278, 4, 1, side), (279, 4, 1, 2**31)]),
        "WebP": b"RIFF\x28\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0" + canvas + bytes(12),
        "PPM": b"P6 %d %d 255\n" % (side, side) + bytes(100),
        "ICO with a large PNG": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + struct.pack("<II", 10**4, 22)
        + png(12_000, 12_000, zlib.compress(bytes(144_012_000), 1)),
    }  # fmt: skip
    name = str(draw.choice(list(values)))
    return f"huge header, {name}", values[name]


# -- attacks on the decoders: kept or not, but quickly and in little memory -----------------------------------------


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def crowded_directory(entries: int, order: str) -> bytes:
    """A TIFF or EXIF directory whose entries all point at the same bytes, each of which a reader copies."""
    size = entries * 12
    body = b"".join(struct.pack(order + "HHII", 1000 + tag, 7, size, 8) for tag in range(entries))
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, entries) + body + bytes(4)


def scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose every scan is empty but has to be walked over all blocks."""
    content = saved(Image.new("L", (64, 64), 99), "JPEG", progressive=True)
    frame = content.index(b"\xff\xc2")
    content = content[: frame + 5] + struct.pack(">HH", side, side) + content[frame + 9 :]
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * count + b"\xff\xd9"


def attack(draw: Draw, number: int) -> tuple[str, Any]:
    """The attack of that number; after the last kind the first comes again."""
    plain = saved(Image.fromarray(pixels(draw, 3)), "JPEG")
    grey = png(16, 16, zlib.compress(bytes(17 * 16)))
    flat = zlib.compressobj(1)
    length = 8 << 20
    makers: dict[str, Callable[[], bytes]] = {
        "largest PNG, grey": lambda: png(SIDE, SIDE, zlib.compress(bytes((SIDE + 1) * SIDE), 1)),
        "largest PNG, RGBA": lambda: png(SIDE, SIDE, zlib.compress(bytes(SIDE * (4 * SIDE + 1)), 1), colour=6),
        "largest PNG, 16 bit": lambda: png(SIDE, SIDE, zlib.compress(bytes(SIDE * (2 * SIDE + 1)), 1), depth=16),
        "largest PNG, one row": lambda: png(2**25, 1, zlib.compress(bytes(2**25 + 1), 1)),
        "PNG of many chunks": lambda: grey[:33] + chunk(b"prIv", b"") * (length // 12) + grey[33:],
        "PNG with a text bomb": lambda: png(
            9, 9, zlib.compress(bytes(90)), before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27), 1)) * 20
        ),
        "PNG with an ICC bomb": lambda: png(
            9, 9, zlib.compress(bytes(90)), before=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28), 1))
        ),
        "PNG with an EXIF bomb": lambda: png(
            9, 9, zlib.compress(bytes(90)), before=chunk(b"eXIf", crowded_directory(60_000, "<"))
        ),
        "PNG that unpacks beyond its size": lambda: png(9, 9, flat.compress(bytes(2**29)) + flat.flush()),
        "WebP with an EXIF bomb": lambda: saved(
            Image.new("RGB", (9, 9)), "WEBP", exif=b"Exif\0\0" + crowded_directory(60_000, ">")
        ),
        "JPEG with an EXIF bomb": lambda: (
            plain[:2] + segment(0xE1, b"Exif\0\0" + crowded_directory(5000, "<")) + plain[20:]
        ),
        "JPEG with EXIF in many segments": lambda: (
            plain[:2]
            + b"".join(
                segment(0xE1, b"Exif\0\0" + crowded_directory(60_000, "<")[at : at + 65_000])
                for at in range(0, 720_000, 65_000)
            )
            + plain[20:]
        ),
        "JPEG with padding": lambda: plain[:2] + b"\xff" * length + plain[2:],
        "JPEG with junk": lambda: plain[:2] + bytes(length) + plain[2:],
        "JPEG with comments": lambda: plain[:2] + segment(0xFE, b"a" * 8) * (length // 12) + plain[2:],
        "JPEG of many scans": lambda: scans(SIDE, 400),
        "GIF with comments": lambda: b"GIF89a\x08\0\x08\0\0\0\0" + b"!\xfe" + (b"\xff" + b"a" * 255) * (length // 256),
        "GIF of many blocks": lambda: b"GIF89a\x08\0\x08\0\0\0\0" + b"!\xfe\x01a\0" * (length // 5),
        "BMP of short runs": lambda: (
            b"BM"
            + struct.pack("<IIIIiiHHIIIIII", 0, 0, 1078, 40, SIDE, SIDE, 1, 8, 1, 0, 0, 0, 0, 0)
            + bytes(1024)
            + b"\x01\x01\0\0" * SIDE
            + b"\0\x01"
        ),
        "TIFF with an EXIF bomb": lambda: crowded_directory(60_000, "<"),
        "TIFF with one huge tile": lambda: tiff(
            [(256, 4, 1, 9), (257, 4, 1, 9), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
            + [(322, 4, 1, 32_768), (323, 4, 1, 32_768), (324, 4, 1, 150), (325, 4, 1, 10**7)],
            zlib.compress(bytes(2**30), 1),
        ),
        "TIFF with a million strips": lambda: tiff(
            [(256, 4, 1, 1), (257, 4, 1, 10**6), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
            + [(273, 4, 10**6, 122), (278, 4, 1, 1), (279, 4, 10**6, 122 + 4 * 10**6)],
            struct.pack("<I", 8) * 10**6 + struct.pack("<I", 1) * 10**6,
        ),
        "TIFF of tags": lambda: tiff(
            [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, length, 98)],
            bytes(4 * length),
        ),
        "TIFF with a directory of tags": lambda: tiff(
            [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
            + [(278, 4, 1, 8), (279, 4, 1, 64), (0x8769, 4, 1, 122)],
            struct.pack("<HHHII", 1, 37500, 4, length, 140) + bytes(4 * length + 4),
        ),
        "JPEG of segments": lambda: plain[:2] + segment(0xE5, b"") * length + plain[2:],
        "PPM with a comment": lambda: b"P5 #" + b"a" * length + b"\n8 8 255\n" + bytes(64),
        "PPM in words": lambda: b"P2 2000 2000 255\n" + b"1 " * 4_000_000,
        "largest WebP": lambda: saved(Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 9)), "WEBP", lossless=True, method=0),
        "largest JPEG": lambda: saved(Image.new("RGB", (SIDE, SIDE), (9, 99, 9)), "JPEG", progressive=True),
        "largest JPEG 2000": lambda: saved(Image.new("RGB", (SIDE, SIDE), (9, 99, 9)), "JPEG2000"),
        "largest AVIF": lambda: saved(Image.new("RGB", (SIDE, SIDE), (9, 99, 9)), "AVIF", speed=10),
        "largest GIF": lambda: saved(Image.new("P", (SIDE, SIDE), 9), "GIF"),
        "largest TIFF": lambda: saved(Image.new("CMYK", (SIDE, SIDE), 9), "TIFF", compression="tiff_adobe_deflate"),
    }
    name = list(makers)[number * 7 % len(makers)]  # 7 has no divisor in common with 33
    return name, makers[name]()


def damaged(draw: Draw) -> tuple[str, Any]:
    """A whole file, cut, overwritten, with bytes put in or taken out."""
    name, value = whole(draw)
    content = bytearray(value["bytes"])
    for _ in range(int(draw.integers(1, 6))):
        place = int(draw.integers(0, len(content)))
        match int(draw.integers(0, 4)):
            case 0:
                content = content[: max(place, 1)]
            case 1:
                content[place] = int(draw.integers(0, 256))
            case 2:
                content[place:place] = draw.bytes(8)
            case 3:
                del content[place : place + 8]
                content = content or bytearray(b"\0")
    return f"damaged {name}", bytes(content)


# -- the run ---------------------------------------------------------------------------------------------------------

# Kind, its share of the images, and whether it must give a row (None: it may).
KINDS: list[tuple[Callable[[Draw], tuple[str, Any]], int, bool | None]] = [
    (whole, 24, True),
    (animated, 6, True),
    (odd_metadata, 10, True),
    (one_pixel, 4, True),
    (no_image, 16, False),
    (truncated, 8, False),
    (huge_header, 6, False),
    (damaged, 26, None),
]


def images(count: int, seed: int = 0) -> Iterator[tuple[str, Any, bool | None]]:
    """That many (name, image, whether it must give a row), the same for the same seed; attacks evenly among them."""
    shares = np.array([share for _, share, _ in KINDS], float)
    attacks = min(ATTACKS, -(-count // 20))
    for index in range(count):
        draw = np.random.default_rng([seed, index])
        if index * attacks // count != (index + 1) * attacks // count:
            yield *attack(draw, index * attacks // count), None
        else:
            make, _, expected = KINDS[int(draw.choice(len(KINDS), p=shares / shares.sum()))]
            yield *make(draw), expected


def _make(path: str, count: int, seed: int) -> None:
    """Writes the images to a file, so that the memory that making them takes is not counted."""
    warnings.simplefilter("ignore")
    with open(path, "wb") as file:
        for made in images(count, seed):
            pickle.dump(made, file)


def _peak_memory() -> float:
    """The most resident memory (MiB) this process has held; not `ru_maxrss`, which starts at that of the parent."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "this system does not say how much memory a process has used at most"
    return int(found[1]) / 1024


def _push(path: str, count: int) -> dict[str, Any]:
    """Both runs over the images in a file. Warns of nothing: Pillow warns about most of these images."""
    import torch

    from hf_spectral_dp import SpectralConfig, SpectralTokenizerForCausalLM
    from hf_spectral_dp.image_processing_spectral import SpectralImageProcessor
    from hf_spectral_dp.token_store import TokenStore, build_token_store

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = SpectralConfig(
        num_channels=3, num_classes=count, hidden_size=8, num_attention_heads=1, num_hidden_layers=1
    )
    model = SpectralTokenizerForCausalLM(config)
    for index in range(len(config.layout.scales)):
        model.codec.codebook(index).normal_()
    processor = SpectralImageProcessor(image_size=config.image_size, num_channels=3)
    first_class = config.class_token_ids[0]
    names: list[tuple[str, bool | None]] = []
    timings: list[tuple[float, float, str]] = []

    def rows(timed: bool) -> Iterator[dict[str, Any]]:
        with open(path, "rb") as file:
            for label in range(count):
                name, image, expected = pickle.load(file)
                cpu, wall = time.process_time(), time.perf_counter()
                yield {"image": image, "label": label}
                if timed:  # the store has taken this image and asks for the next
                    timings.append((time.process_time() - cpu, time.perf_counter() - wall, name))
                    names.append((name, expected))

    def build(folder: Path, size: int) -> dict[int, bytes]:
        store = build_token_store(
            rows(size == 1), model, processor, folder, label_column="label", batch_size=size, progress=False
        )
        found = store[np.arange(len(store))]["input_ids"].numpy()
        assert len(store) + store.report["undecodable"] == count and TokenStore.load(folder).verify()
        return {int(row[0]) - first_class: row[1:].tobytes() for row in found}

    with tempfile.TemporaryDirectory() as folder:
        before = _peak_memory()
        alone = build(Path(folder) / "alone", 1)
        batched = build(Path(folder) / "batched", 256)
        memory = _peak_memory() - before
    moved = [label for label in alone.keys() | batched.keys() if alone.get(label) != batched.get(label)]
    failures = [f"slow: {name}" for cpu, _, name in timings if cpu > SECONDS]
    failures += [f"row of another value in a batch: {names[label][0]}" for label in moved]
    for label, (name, expected) in enumerate(names):
        if expected not in (None, label in alone):
            failures.append(f"{'left out' if expected else 'kept'}: {name}")
    return {
        "failures": failures,
        "kept": len(alone),
        "peak_memory_mib": round(memory, 1),
        "slowest_seconds": round(max(timings)[0], 2),
        "slowest": max(timings)[2],
        "slowest_wall_seconds": round(max(wall for _, wall, _ in timings), 2),
    }


def run(count: int, seed: int = 0) -> dict[str, Any]:
    """Pushes `count` hostile images through the token store, in a process of its own.

    Returns:
        {"check", "tried", "failed", "kept", "peak_memory_mib", "slowest_seconds", "slowest", "slowest_wall_seconds",
        "first_failures"}; of a run that crashed or hung, the first three and "first_failures".
    """
    row: dict[str, Any] = {"check": "hostile images", "tried": count}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/images"
        code = f"import json; from benchmarks.hostile_images import _push; print(json.dumps(_push({file!r}, {count})))"
        _make(file, count, seed)
        try:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600 + count)
        except subprocess.TimeoutExpired as error:
            return {**row, "failed": count, "first_failures": [f"no end after {error.timeout:g} seconds"]}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {**row, "failed": count, "first_failures": [f"exit code {done.returncode}: {last}"]}
    result = json.loads(done.stdout.splitlines()[-1])
    failures = result.pop("failures")
    failed = len(failures)
    if result["peak_memory_mib"] > MEMORY:
        failures.insert(0, f"memory: {result['peak_memory_mib']} MiB exceed {MEMORY}")
        failed = count
    return {**row, "failed": failed, **result, "first_failures": failures[:5]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="300 images instead of 5,000")
    parser.add_argument("--out", help="file for the JSON report")
    arguments = parser.parse_args()
    row = run(300 if arguments.quick else 5000)
    write_report("python -m benchmarks.hostile_images" + " --quick" * arguments.quick, [row], arguments.out)


if __name__ == "__main__":
    main()
