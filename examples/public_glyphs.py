"""Public digits drawn from strokes: a public stand-in for handwriting that no person wrote.

Every digit has a few skeletons (as people are taught to write them, open and closed, with and without a bar). A
skeleton is bent, slanted, stretched and drawn with a pen of random width, then brought to the layout that the MNIST
authors describe: 20x20 box, centre of mass in the middle of 28x28 pixels. Nothing here was fitted to any data set.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Points (x, y) in the unit square, y downwards. A point given twice is a corner; otherwise the curve is smooth.
_RING = [(0.5, 0.0), (0.2, 0.12), (0.08, 0.5), (0.2, 0.88), (0.5, 1.0), (0.8, 0.88), (0.92, 0.5), (0.8, 0.12), (0.5, 0.0)]
SKELETONS: dict[int, list[list[list[tuple[float, float]]]]] = {
    0: [
        [_RING],
        [[(0.6, 0.02), (0.3, 0.1), (0.1, 0.5), (0.2, 0.88), (0.5, 1.0), (0.82, 0.8), (0.9, 0.4), (0.7, 0.06), (0.42, 0.08)]],
        [[(0.35, 0.1), (0.12, 0.4), (0.15, 0.8), (0.45, 1.0), (0.8, 0.8), (0.9, 0.4), (0.7, 0.05), (0.35, 0.1)]],
    ],
    1: [
        [[(0.5, 0.0), (0.5, 0.5), (0.5, 1.0)]],
        [[(0.55, 0.0), (0.5, 0.5), (0.45, 1.0)]],
        [[(0.3, 0.22), (0.52, 0.0), (0.52, 0.0), (0.5, 0.5), (0.5, 1.0)]],
        [[(0.3, 0.2), (0.5, 0.0), (0.5, 0.0), (0.5, 1.0)], [(0.25, 1.0), (0.5, 1.0), (0.75, 1.0)]],
    ],
    2: [
        [[(0.12, 0.25), (0.3, 0.04), (0.65, 0.02), (0.85, 0.25), (0.7, 0.55), (0.4, 0.8), (0.1, 1.0), (0.1, 1.0), (0.5, 0.97), (0.92, 1.0)]],
        [[(0.1, 0.2), (0.4, 0.0), (0.8, 0.15), (0.75, 0.5), (0.45, 0.85), (0.2, 0.95), (0.15, 0.8), (0.35, 0.76), (0.6, 0.92), (0.95, 0.92)]],
        [[(0.15, 0.1), (0.5, 0.0), (0.8, 0.2), (0.65, 0.55), (0.2, 0.95), (0.2, 0.95), (0.6, 0.9), (0.95, 0.85)]],
        [[(0.1, 0.3), (0.25, 0.05), (0.6, 0.0), (0.85, 0.2), (0.75, 0.5), (0.05, 1.0), (0.05, 1.0), (0.95, 1.0)]],
    ],
    3: [
        [[(0.12, 0.12), (0.45, 0.0), (0.82, 0.15), (0.75, 0.38), (0.42, 0.48), (0.42, 0.48), (0.8, 0.58), (0.88, 0.82), (0.5, 1.0), (0.1, 0.88)]],
        [[(0.15, 0.05), (0.8, 0.02), (0.8, 0.02), (0.45, 0.42), (0.45, 0.42), (0.85, 0.58), (0.8, 0.9), (0.45, 1.0), (0.1, 0.9)]],
        [[(0.1, 0.15), (0.4, 0.0), (0.75, 0.1), (0.75, 0.35), (0.5, 0.46), (0.35, 0.47), (0.6, 0.48), (0.88, 0.65), (0.75, 0.93), (0.4, 1.0), (0.08, 0.85)]],
    ],
    4: [
        [[(0.2, 0.0), (0.1, 0.55), (0.1, 0.55), (0.9, 0.52)], [(0.75, 0.1), (0.7, 0.5), (0.68, 1.0)]],
        [[(0.65, 0.0), (0.05, 0.65), (0.05, 0.65), (0.95, 0.65)], [(0.65, 0.0), (0.65, 0.5), (0.65, 1.0)]],
        [[(0.15, 0.0), (0.08, 0.3), (0.2, 0.5), (0.5, 0.5), (0.8, 0.35), (0.85, 0.0), (0.85, 0.0), (0.75, 0.5), (0.7, 1.0)]],
        [[(0.25, 0.0), (0.1, 0.35), (0.15, 0.5), (0.8, 0.45)], [(0.8, 0.0), (0.75, 0.5), (0.72, 1.0)]],
    ],
    5: [
        [[(0.85, 0.02), (0.25, 0.0), (0.25, 0.0), (0.2, 0.42), (0.2, 0.42), (0.6, 0.38), (0.88, 0.65), (0.65, 0.95), (0.1, 0.95)]],
        [[(0.25, 0.05), (0.22, 0.45), (0.55, 0.42), (0.82, 0.68), (0.6, 0.98), (0.1, 0.92)], [(0.25, 0.04), (0.6, 0.05), (0.92, 0.0)]],
        [[(0.95, 0.0), (0.4, 0.05), (0.4, 0.05), (0.25, 0.38), (0.6, 0.5), (0.75, 0.75), (0.5, 0.98), (0.05, 0.95)]],
        [[(0.8, 0.05), (0.35, 0.02), (0.2, 0.2), (0.3, 0.42), (0.65, 0.52), (0.8, 0.75), (0.55, 1.0), (0.12, 0.92)]],
    ],
    6: [
        [[(0.75, 0.0), (0.35, 0.25), (0.12, 0.65), (0.3, 0.97), (0.7, 0.97), (0.88, 0.72), (0.65, 0.5), (0.3, 0.58), (0.15, 0.78)]],
        [[(0.5, 0.0), (0.2, 0.4), (0.15, 0.8), (0.45, 1.0), (0.8, 0.85), (0.75, 0.58), (0.45, 0.52), (0.18, 0.75)]],
        [[(0.4, 0.0), (0.2, 0.5), (0.25, 0.92), (0.6, 1.0), (0.8, 0.8), (0.6, 0.62), (0.25, 0.75)]],
    ],
    7: [
        [[(0.08, 0.05), (0.9, 0.02), (0.9, 0.02), (0.6, 0.5), (0.4, 1.0)]],
        [[(0.08, 0.15), (0.1, 0.03), (0.1, 0.03), (0.9, 0.03), (0.9, 0.03), (0.55, 0.5), (0.45, 1.0)]],
        [[(0.1, 0.05), (0.9, 0.02), (0.9, 0.02), (0.55, 0.55), (0.4, 1.0)], [(0.3, 0.52), (0.85, 0.48)]],
        [[(0.05, 0.12), (0.45, 0.08), (0.85, 0.0), (0.75, 0.4), (0.6, 0.7), (0.55, 1.0)]],
    ],
    8: [
        [[(0.8, 0.12), (0.5, 0.0), (0.2, 0.15), (0.35, 0.42), (0.7, 0.62), (0.8, 0.87), (0.5, 1.0), (0.2, 0.87), (0.32, 0.6), (0.7, 0.38), (0.8, 0.12)]],
        [[(0.5, 0.45), (0.2, 0.25), (0.45, 0.0), (0.78, 0.2), (0.5, 0.45), (0.15, 0.75), (0.5, 1.0), (0.85, 0.75), (0.5, 0.45)]],
        [[(0.85, 0.05), (0.4, 0.02), (0.25, 0.25), (0.6, 0.55), (0.65, 0.85), (0.4, 1.0), (0.2, 0.8), (0.5, 0.45), (0.9, 0.1)]],
    ],
    9: [
        [[(0.85, 0.25), (0.6, 0.02), (0.25, 0.1), (0.15, 0.4), (0.45, 0.52), (0.8, 0.35), (0.85, 0.2), (0.82, 0.55), (0.75, 1.0)]],
        [[(0.78, 0.15), (0.5, 0.0), (0.2, 0.2), (0.3, 0.48), (0.65, 0.42), (0.8, 0.12), (0.8, 0.12), (0.75, 0.5), (0.5, 1.0)]],
        [[(0.8, 0.1), (0.4, 0.02), (0.15, 0.3), (0.4, 0.5), (0.75, 0.35), (0.85, 0.05), (0.85, 0.6), (0.65, 0.95), (0.25, 0.95)]],
        [[(0.75, 0.3), (0.7, 0.05), (0.35, 0.05), (0.2, 0.35), (0.5, 0.45), (0.75, 0.25), (0.75, 0.25), (0.7, 0.6), (0.7, 1.0)]],
    ],
}  # fmt: skip
_CANVAS = 112  # drawn at four times the final resolution


def _smooth(points: np.ndarray, samples: int = 8) -> np.ndarray:
    """Catmull-Rom curve through (n, 2) points."""
    padded = np.concatenate([points[:1], points, points[-1:]])
    t = np.linspace(0, 1, samples, endpoint=False)[:, None]
    pieces = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(padded[:-3], padded[1:-2], padded[2:-1], padded[3:], strict=True)
    ]
    return np.concatenate([*pieces, points[-1:]])


def _draw(label: int, rng: np.random.Generator) -> Image.Image:
    """One digit, 28x28 grey, white ink on black."""
    skeleton = SKELETONS[label][rng.integers(len(SKELETONS[label]))]
    slant, angle, aspect = rng.normal(0.12, 0.25), rng.normal(0, 0.12), np.exp(rng.normal(-0.25, 0.25))
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.array(
        [[aspect, -slant], [0, 1]]
    )
    wave, jitter = rng.normal(0, 0.05, (2, 2, 3)), rng.uniform(0.01, 0.045)
    strokes = []
    for stroke in skeleton:
        points = np.array(stroke)
        keep = np.concatenate([[True], (points[1:] != points[:-1]).any(1)])  # a doubled point moves as one
        moved = (points[keep] + rng.normal(0, jitter, (int(keep.sum()), 2)))[np.cumsum(keep) - 1]
        curve = _smooth(moved) - 0.5
        x, y = curve[:, :1], curve[:, 1:]
        basis = np.concatenate([np.sin(3 * x + 2 * y), np.cos(2 * x - 3 * y), x * y], axis=1)
        curve = curve + basis @ wave[0].T * 0.7 + np.roll(basis, 1, axis=1) @ wave[1].T * 0.7
        strokes.append(curve @ matrix.T)
    every = np.concatenate(strokes)
    low, extent = every.min(0), (every.max(0) - every.min(0)).max()
    width = np.clip(np.exp(rng.normal(np.log(9.5), 0.33)), 4, 22)
    scale = (80 - width) / extent
    offset = (_CANVAS - (every.max(0) - low) * scale) / 2
    image = Image.new("L", (_CANVAS, _CANVAS))
    pen, radius = ImageDraw.Draw(image), width / 2
    for curve in strokes:
        pixels = (curve - low) * scale + offset
        pen.line([tuple(p) for p in pixels], fill=255, width=round(width), joint="curve")
        for end in (pixels[0], pixels[-1]):
            pen.ellipse([*(end - radius), *(end + radius)], fill=255)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1.0, 2.2))).resize((28, 28), Image.Resampling.BOX)
    ink = np.asarray(image, dtype=np.float64)
    ys, xs = np.mgrid[0:28, 0:28]
    shift_x, shift_y = (round(13.5 - (grid * ink).sum() / ink.sum()) for grid in (xs, ys))
    return image.transform((28, 28), Image.Transform.AFFINE, (1, 0, -shift_x, 0, 1, -shift_y))


def render_digits(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` digits, classes in turn: uint8 images (count, 28, 28), ink 255 on 0, and labels (count,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    return np.stack([np.asarray(_draw(int(label), rng)) for label in labels]), labels
