"""Makes the images beside this file, which are in the repository: python3 make.py, with Pillow and numpy.

They are small on purpose: a smooth ground, edges, and some noise, in every variety that the decoders have to know.
"""

import io
import pathlib

import numpy
from PIL import Image

HERE = pathlib.Path(__file__).parent


def picture(width, height, noise=24):
    """No symmetry in it, so that a wrong turn is seen."""
    y, x = numpy.mgrid[0:height, 0:width].astype(float)
    noise = numpy.random.default_rng(5).integers(0, noise, (height, width, 3))
    planes = [x / width * 200, y / height * 220, 120 + 100 * numpy.sin(x / 9 + y / 5)]
    pixels = numpy.stack(planes, axis=2) + noise
    pixels[height // 8 : height // 3, width // 10 : width // 2] = [250, 20, 60]
    pixels[height // 2 :, : width // 6] = [10, 10, 240]
    return Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8))


def main():
    image = picture(97, 61)
    gray = image.convert("L")
    alpha = image.convert("RGBA")
    alpha.putalpha(gray)

    def save(name, image, **options):
        image.save(HERE / name, **options)

    save("baseline-420.jpg", image, quality=90)
    save("baseline-444.jpg", image, quality=90, subsampling=0)
    save("baseline-422.jpg", image, quality=90, subsampling=1)
    save("restart.jpg", image, quality=90, restart_marker_blocks=3)
    save("progressive.jpg", image, quality=90, progressive=True)
    save("gray.jpg", gray, quality=90)
    save("cmyk.jpg", image.convert("CMYK"), quality=90)
    save("one-pixel.jpg", image.crop((20, 20, 21, 21)), quality=90)
    save("one-column.jpg", image.crop((20, 0, 21, 61)), quality=90)
    save("one-row.jpg", image.crop((0, 30, 97, 31)), quality=90)
    save("large.jpg", picture(640, 427), quality=80)
    # Without noise, so that they are small.
    smooth = picture(640, 427, 1)
    save("large-progressive.jpg", smooth, quality=80, progressive=True)
    save("large.png", smooth.convert("RGBA"))
    save("large.webp", smooth, quality=60)
    save("large-lossless.webp", smooth.quantize(32).convert("RGBA"), lossless=True)
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
        # Stored so that it is upright once it is turned: FLIP_LEFT_RIGHT 0, FLIP_TOP_BOTTOM 1, ROTATE_90 2, _180 3, _270 4,
        # TRANSPOSE 5, TRANSVERSE 6.
        stored = image.transpose(turns[number]) if number in turns else image
        save(f"exif-{number}.jpg", stored, quality=95, subsampling=0, exif=exif)
    save("rgb.png", image)
    save("gray.png", gray)
    save("gray-alpha.png", alpha.convert("LA"))
    save("rgba.png", alpha)
    save("palette.png", image.quantize(64))
    save("one-bit.png", gray.point(lambda value: 255 * (value > 120)).convert("1"))
    deep = (numpy.asarray(gray).astype(numpy.uint16) << 8) + 77
    save("gray-16.png", Image.fromarray(deep))
    save("lossy.webp", image, quality=90)
    save("lossless.webp", image, lossless=True)
    save("alpha.webp", alpha, quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    save("exif-6.png", image.transpose(2), exif=exif)
    save("exif-6.webp", image.transpose(2), exif=exif, lossless=True)
    interlaced(alpha)
    frames = [image, image.transpose(0)]
    frames[0].save(HERE / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)


def interlaced(image):
    """Pillow writes none, so this is Adam7 by hand; filter 0, RGBA of 16 bits."""
    import struct
    import zlib

    pixels = numpy.asarray(image).astype(numpy.uint16) * 257
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    raw = b""
    for left, top, across, down in passes:
        part = pixels[top::down, left::across]
        if part.size:
            raw += b"".join(b"\0" + row.astype(">u2").tobytes() for row in part)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", image.width, image.height, 16, 6, 0, 0, 1)
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    file.seek(0, 2)
    file.write(chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b""))
    (HERE / "interlaced-16.png").write_bytes(file.getvalue())


if __name__ == "__main__":
    main()
