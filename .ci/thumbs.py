"""The front page's four pictures: the first figure of four chapters, small. `python .ci/thumbs.py` makes them anew after a chapter's figure has changed."""
import base64
import io
import json
from pathlib import Path

from PIL import Image

nbs = Path(__file__).resolve().parent.parent / "nbs"
chapters = ("02_bert", "07_pcgrad", "09_smart", "11_electra")
size = (400, 240)


def first_figure(name):
    "A chapter's first stored picture."
    for cell in json.loads((nbs / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        for out in cell.get("outputs", []):
            if "image/png" in out.get("data", {}): return Image.open(io.BytesIO(base64.b64decode(out["data"]["image/png"])))
    raise SystemExit(f"{name} stores no figure")


def card(image):
    "The picture on a white card of one size, so that it can be seen in dark mode, too."
    image = image.convert("RGBA")
    image.thumbnail((size[0] - 16, size[1] - 16), Image.LANCZOS)
    made = Image.new("RGBA", size, "white")
    made.alpha_composite(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return made.convert("RGB").quantize(128)


for name in chapters:
    (nbs / "thumbs").mkdir(exist_ok=True)
    card(first_figure(name)).save(nbs / "thumbs" / f"{name}.png", optimize=True)
