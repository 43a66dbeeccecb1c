"""The front page's pictures: a part of a chapter's figure each, so large that its letters can be read.

`python .ci/thumbs.py` makes them anew after a chapter's figure has changed.
"""
import base64
import io
import json
from pathlib import Path

from PIL import Image, ImageChops

nbs = Path(__file__).resolve().parent.parent / "nbs"
parts = {                                  # chapter: which of its stored figures, and left, top, right, bottom of the part
    "02_bert": (0, (0, 0, 1, 1)),
    "04_heads": (0, (.478, 0, 1, 1)),
    "07_pcgrad": (0, (0, 0, 1, .455)),
    "09_smart": (0, (0, 0, 1, .525))}
size = (480, 280)


def figure(name, number):
    "A chapter's stored picture of that number."
    cells = json.loads((nbs / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    pictures = [o["data"]["image/png"] for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    if len(pictures) <= number: raise SystemExit(f"{name} stores {len(pictures)} figures, not {number + 1}")
    return Image.open(io.BytesIO(base64.b64decode(pictures[number])))


def card(image, part):
    "A part of the picture on a white card of one size, so that it can be seen in dark mode, too."
    box = [round(x * length) for x, length in zip(part, image.size * 2)]
    image = image.convert("RGBA").crop(box)
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    image = white.crop(ImageChops.difference(white.convert("RGB"), Image.new("RGB", image.size, "white")).getbbox())
    image.thumbnail((size[0] - 16, size[1] - 16), Image.LANCZOS)
    made = Image.new("RGBA", size, "white")
    made.alpha_composite(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return made.convert("RGB").quantize(128)


for name, (number, part) in parts.items():
    card(figure(name, number), part).save(nbs / f"thumb_{name}.png", optimize=True)
