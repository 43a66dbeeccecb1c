"""The front page's pictures: a figure of each of six chapters, small. `python .ci/thumbs.py` makes them anew after a chapter's figure has changed."""
import base64
import io
import json
from pathlib import Path

from PIL import Image

nbs = Path(__file__).resolve().parent.parent / "nbs"
chapters = {"02_bert": 0, "04_heads": 0, "07_pcgrad": 0, "08_conflicts": 0, "09_smart": 0, "11_electra": 1} # which of its stored figures
size = (400, 240)


def figure(name, number):
    "A chapter's stored picture of that number."
    cells = json.loads((nbs / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    pictures = [o["data"]["image/png"] for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    if len(pictures) <= number: raise SystemExit(f"{name} stores {len(pictures)} figures, not {number + 1}")
    return Image.open(io.BytesIO(base64.b64decode(pictures[number])))


def card(image):
    "The picture on a white card of one size, so that it can be seen in dark mode, too."
    image = image.convert("RGBA")
    image.thumbnail((size[0] - 16, size[1] - 16), Image.LANCZOS)
    made = Image.new("RGBA", size, "white")
    made.alpha_composite(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return made.convert("RGB").quantize(128)


for name, number in chapters.items():
    card(figure(name, number)).save(nbs / f"thumb_{name}.png", optimize=True)
