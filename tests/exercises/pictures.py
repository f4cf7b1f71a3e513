"""Small pictures for exercises: images, points, curves, histograms, matrices. PIL and nothing else.

Each function returns a PIL image. `stack` and `beside` put pictures together.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER = "#202020", "#b8b8b8", "#ffffff"
COLORS = ("#1f5fa8", "#c8402f", "#3d8f4f", "#8a5bb0", "#c08a20")


def font(size: int = 13):
    return ImageFont.load_default(size)


def write(image: Image.Image, xy, text: str, size: int = 13, anchor: str = "la", color=INK):
    ImageDraw.Draw(image).text(xy, text, fill=color, font=font(size), anchor=anchor)


def text_width(text: str, size: int = 13) -> int:
    return math.ceil(font(size).getlength(text))


def titled(image: Image.Image, title: str, size: int = 14) -> Image.Image:
    """A picture under a line of text."""
    out = Image.new("RGB", (max(image.width, text_width(title, size) + 12), image.height + 26),
                    PAPER)
    out.paste(image, (0, 26))
    write(out, (6, 6), title, size)
    return out


def stack(pictures: list, gap: int = 10) -> Image.Image:
    """Pictures one below the other."""
    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    out, y = Image.new("RGB", (max(p.width for p in pictures), height), PAPER), 0
    for p in pictures:
        out.paste(p, (0, y))
        y += p.height + gap
    return out


def beside(pictures: list, gap: int = 14) -> Image.Image:
    """Pictures one beside the other."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    out, x = Image.new("RGB", (width, max(p.height for p in pictures)), PAPER), 0
    for p in pictures:
        out.paste(p, (x, 0))
        x += p.width + gap
    return out


def message(text: str, width: int = 420, height: int = 90) -> Image.Image:
    """A panel with words, where there is no picture."""
    out, words, line, y = Image.new("RGB", (width, height), "#f2f2f2"), text.split(), "", 12
    for word in [*words, None]:
        if word is None or text_width(line + " " + word) > width - 24:
            write(out, (12, y), line)
            line, y = word, y + 18
        else:
            line = f"{line} {word}".strip()
    return out


def gray(array) -> Image.Image:
    """An array or tensor (h, w) in [0, 255] -> an image."""
    return Image.fromarray(np.asarray(array).clip(0, 255).astype(np.uint8)).convert("RGB")


def images(pictures: list, captions: list[str], columns: int, side: int = 96) -> Image.Image:
    """Arrays (h, w) in [0, 255] in rows, each with a caption below."""
    rows, cell = math.ceil(len(pictures) / columns), side + 22
    out = Image.new("RGB", (columns * (side + 6) - 6, rows * cell), PAPER)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        x, y = i % columns * (side + 6), i // columns * cell
        out.paste(gray(picture).resize((side, side), Image.LANCZOS), (x, y))
        write(out, (x + side // 2, y + side + 4), caption, 12, "ma")
    return out


def ticks(low: float, high: float) -> list[float]:
    """A few round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 3 or 1))
    step *= next((m for m in (1, 2, 5) if (high - low) / (step * m) <= 5), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def short(value: float) -> str:
    return f"{value:.4g}"


class Axes:
    """A frame with ticks; `at` gives the pixel of a point."""

    def __init__(self, x: tuple, y: tuple, labels=("", ""), size=(330, 230), log=(False, False)):
        self.x, self.y, self.log = x, y, log
        self.image = Image.new("RGB", size, PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.box = (56, 22, size[0] - 14, size[1] - 44)     # left, top, right, bottom
        left, top, right, bottom = self.box
        for axis, (low, high) in enumerate((x, y)):
            if log[axis]:
                found = [10.0 ** k for k in range(math.ceil(math.log10(low) - 1e-9),
                                                  math.floor(math.log10(high) + 1e-9) + 1)]
                found = found if len(found) > 1 else [low, high]
            else:
                found = ticks(low, high)
            for value in found:
                px, py = self.at(value if axis == 0 else x[0], value if axis else y[0])
                if axis == 0:
                    self.draw.line((px, top, px, bottom), "#ececec")
                    write(self.image, (px, bottom + 5), short(value), 11, "ma")
                else:
                    self.draw.line((left, py, right, py), "#ececec")
                    write(self.image, (left - 5, py), short(value), 11, "rm")
        self.draw.rectangle(self.box, outline=FAINT)
        write(self.image, ((left + right) // 2, size[1] - 20), labels[0], 12, "ma")
        write(self.image, (6, 0), labels[1], 12)

    def at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        shares = []
        for value, (low, high), log in zip((x, y), (self.x, self.y), self.log):
            if log:
                value, low, high = (math.log10(max(v, 1e-300)) for v in (value, low, high))
            shares.append(min(1.5, max(-0.5, (value - low) / ((high - low) or 1))))
        return left + shares[0] * (right - left), bottom - shares[1] * (bottom - top)


def curves(lines: dict, labels=("", ""), size=(330, 230), log=(False, False), y=None, low=False):
    """{name: (xs, ys)} as curves with a legend at the right (`low`: below). `y`: limits (default:
    of the data)."""
    lines = {k: ([float(v) for v in a], [float(v) for v in b]) for k, (a, b) in lines.items()}
    xs = [v for a, _ in lines.values() for v in a]
    ys = [v for _, b in lines.values() for v in b if math.isfinite(v)] or [0, 1]
    room = 0 if log[1] else 0.05 * ((max(ys) - min(ys)) or 1)
    y = y or (min(ys) - room, max(ys) + room)
    axes = Axes((min(xs), max(xs)), y, labels, size, log)
    for i, (name, (a, b)) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        points = [axes.at(*p) for p in zip(a, b) if math.isfinite(p[1])]
        if len(points) > 1:
            axes.draw.line(points, color, 2)
        if len(points) <= 12:
            for px, py in points:
                axes.draw.ellipse((px - 3, py - 3, px + 3, py + 3), color)
    legend(axes, list(lines), low)
    return axes.image


def legend(axes: Axes, names: list[str], low: bool):
    names = [n for n in names if n]
    if not names:
        return
    width = max(text_width(n, 11) for n in names) + 26
    left, top = axes.box[2] - width - 4, axes.box[1] + 4
    if low:
        top = axes.box[3] - 15 * len(names) - 8
    axes.draw.rectangle((left, top, axes.box[2] - 4, top + 15 * len(names) + 4), PAPER, FAINT)
    for i, name in enumerate(names):
        y = top + 10 + 15 * i
        axes.draw.line((left + 4, y, left + 18, y), COLORS[i % len(COLORS)], 3)
        write(axes.image, (left + 22, y), name, 11, "lm")


def histogram(values, low: float, high: float, label: str, bins: int = 40, top: float | None = None,
              size=(230, 190)) -> Image.Image:
    """The density of some numbers between low and high."""
    counts, edges = np.histogram(np.asarray(values, dtype=float), bins, (low, high))
    density = counts / max(1, len(values)) / (edges[1] - edges[0])
    axes = Axes((low, high), (0, top or density.max() * 1.1 or 1), (label, "density"), size)
    for a, b, d in zip(edges, edges[1:], density):
        (x0, y0), (x1, y1) = axes.at(a, d), axes.at(b, 0)
        if d > 0:
            axes.draw.rectangle((x0, max(y0, axes.box[1]), max(x0, x1 - 1), y1), COLORS[0])
    return axes.image


def points(xy, limit: float, caption: str, side: int = 132, color=COLORS[0]) -> Image.Image:
    """Points (n, 2) in a square from -limit to limit; y goes up."""
    out = Image.new("RGB", (side, side + 20), PAPER)
    draw = ImageDraw.Draw(out)
    for x, y in np.asarray(xy, dtype=float):
        px, py = (x / limit + 1) / 2 * side, (1 - y / limit) / 2 * side
        if 0 <= px < side and 0 <= py < side:
            draw.ellipse((px - 1, py - 1, px + 1, py + 1), color)
    draw.rectangle((0, 0, side - 1, side - 1), outline=FAINT)
    write(out, (side // 2, side + 3), caption, 12, "ma")
    return out


def color_of(values: np.ndarray, low: float, high: float, signed: bool) -> np.ndarray:
    """Numbers -> RGB: white to blue, or blue, white, red where `signed`."""
    share = ((values - low) / ((high - low) or 1)).clip(0, 1)[..., None]
    white, blue, red = (np.array(c, float) for c in ((255, 255, 255), (31, 95, 168), (200, 64, 47)))
    if not signed:
        return white + share * (blue - white)
    return np.where(share < 0.5, blue + 2 * share * (white - blue),
                    white + (2 * share - 1) * (red - white))


def matrix(values, rows: list[str] = (), columns: list[str] = (), cell: int = 22, low=0.0,
           high=1.0, signed=False) -> Image.Image:
    """A matrix as coloured cells with labels; column labels stand upright."""
    values = np.nan_to_num(np.asarray(values, dtype=float))
    n, m = values.shape
    left = max([text_width(r, 12) for r in rows], default=0) + (8 if len(rows) else 0)
    above = max([text_width(c, 12) for c in columns], default=0) + (8 if len(columns) else 0)
    out = Image.new("RGB", (left + m * cell + 1, above + n * cell + 1), PAPER)
    colors = color_of(values, low, high, signed).round().astype(np.uint8)
    grid = Image.fromarray(colors).resize((m * cell, n * cell), Image.NEAREST)
    out.paste(grid, (left, above))
    draw = ImageDraw.Draw(out)
    if cell > 12:
        for i in range(n + 1):
            draw.line((left, above + i * cell, left + m * cell, above + i * cell), "#dcdcdc")
        for j in range(m + 1):
            draw.line((left + j * cell, above, left + j * cell, above + n * cell), "#dcdcdc")
    for i, label in enumerate(rows):
        write(out, (left - 5, above + i * cell + cell // 2), label, 12, "rm")
    for j, label in enumerate(columns):
        strip = Image.new("RGB", (above, 16), PAPER)
        write(strip, (3, 8), label, 12, "lm")
        out.paste(strip.rotate(90, expand=True), (left + j * cell + (cell - 16) // 2, 0))
    return out


def bars(values: dict[str, float], high: float, width: int = 330) -> Image.Image:
    """{name: number} as horizontal bars with the number behind."""
    left = max(text_width(k, 12) for k in values) + 10
    out = Image.new("RGB", (left + width + 60, 26 * len(values) + 4), PAPER)
    draw = ImageDraw.Draw(out)
    for i, (name, value) in enumerate(values.items()):
        y, length = 4 + 26 * i, max(1, min(1.0, value / high) * width)
        write(out, (left - 6, y + 9), name, 12, "rm")
        draw.rectangle((left, y, left + length, y + 18), COLORS[0])
        write(out, (left + length + 5, y + 9), f"{value:.2f}", 12, "lm")
    return out
