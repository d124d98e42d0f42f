"""Pictures of notebooks in few colours, for git keeps every version of them.

python scripts/pictures.py NOTEBOOK ...
"""

import base64
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from codetrace.core.files import atomic_write, read_json

SHADE = 0.15  # A picture is the same where no pixel is that much, of 1, brighter or darker


def read_picture(png: str) -> Image.Image:
    "A picture as notebooks hold it."
    return Image.open(io.BytesIO(base64.b64decode(png)))


def is_same_picture(first: str, second: str) -> bool:
    "Whether two pictures, as notebooks hold them, show the same: no pixel is of another colour."
    pixels = [np.asarray(read_picture(png).convert("RGB"), float) / 255 for png in (first, second)]
    return pixels[0].shape == pixels[1].shape and float(np.abs(pixels[0] - pixels[1]).max(initial=0)) <= SHADE


def in_few_colours(png: str, colours: int) -> str:
    "A picture, as notebooks hold it, with a palette; itself where that is no smaller."
    picture = read_picture(png)
    if picture.mode == "P" and len(picture.getcolors() or ()) <= colours:
        return png
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    written = io.BytesIO()
    palette = Image.Quantize.FASTOCTREE  # keeps a colour of few pixels, such as a red digit; the usual one does not
    white.convert("RGB").quantize(colours, palette).save(written, "PNG", optimize=True)
    small = base64.b64encode(written.getvalue()).decode()
    return small if len(small) < len(png) else png


def pictures_of(cell: dict) -> list[dict]:
    "The data of each output of a cell that is a picture."
    return [output["data"] for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]


def as_small_as_it_can_be(png: str) -> str:
    "The fewest colours in which a picture still is the same."
    reduced = (in_few_colours(png, colours) for colours in (12, 16, 24, 32, 64, 128, 256))
    return next((small for small in reduced if is_same_picture(png, small)), png)


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        for cell in read_json(path)["cells"]:
            for data in pictures_of(cell):
                png = "".join(data["image/png"])
                text = text.replace(png.strip(), as_small_as_it_can_be(png).strip())
        atomic_write(path, text.encode())


if __name__ == "__main__":
    main(sys.argv[1:])
