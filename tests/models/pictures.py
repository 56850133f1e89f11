"""Makes digits-pictures.bin, the JPEGs of the demo, of digits-test.bin: `python pictures.py`, with numpy and Pillow (`make tools`:
~/.cache/penstock/servers-images-*/bin/python).

The first five of each digit, 8 × 8 pixels as a scanner saw them, drawn large: smoothly, on paper that is not quite white and not
evenly lit, with noise. The file has the number of pictures, then of each the digit, the length and the JPEG; numbers are
little-endian, 32 bits, and the digit a byte.
"""

import io
import pathlib
import struct

import numpy
from PIL import Image

HERE = pathlib.Path(__file__).parent
EACH = 5
SIDE = 256
NOISE = 3.0


def picture(pixels, random):
    large = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    across, down = numpy.meshgrid(numpy.linspace(-1, 1, SIDE), numpy.linspace(-1, 1, SIDE))
    # The model was trained on bright ink; as on a photograph of a blackboard, light falls off towards the corners.
    light = 1 - 0.04 * (across**2 + down**2)
    drawn = numpy.asarray(large, dtype=numpy.float64) * light + random.normal(0, NOISE, (SIDE, SIDE))
    colours = numpy.stack([drawn, drawn * 0.99, drawn * 0.97], axis=-1)
    file = io.BytesIO()
    Image.fromarray(colours.clip(0, 255).astype(numpy.uint8)).save(file, "JPEG", quality=75)
    return file.getvalue()


def main():
    data = (HERE / "digits-test.bin").read_bytes()
    count = int.from_bytes(data[:4], "little")
    pixels = numpy.frombuffer(data[4 : 4 + count * 64], numpy.uint8).reshape(count, 8, 8)
    labels = list(data[4 + count * 64 :])
    random = numpy.random.default_rng(5)
    chosen = [at for digit in range(10) for at in [at for at in range(count) if labels[at] == digit][:EACH]]
    with open(HERE / "digits-pictures.bin", "wb") as file:
        file.write(struct.pack("<I", len(chosen)))
        for at in chosen:
            jpeg = picture((pixels[at].astype(numpy.uint16) * 255 // 16).astype(numpy.uint8), random)
            file.write(struct.pack("<BI", labels[at], len(jpeg)) + jpeg)


if __name__ == "__main__":
    main()
