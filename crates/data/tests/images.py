"""Writes images in formats that Rust does not write, with their pixels by Pillow and pydicom, for tests/images.rs.

Usage: images.py DIR. Reads DIR/job.json ({"seed"}), writes files, NAME.rgb next to those with a reference, and DIR/out.json.
"""

import base64
import io
import json
import os
import struct
import sys
import zlib

import numpy as np
from PIL import Image, ImageSequence
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2K,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

# Transfer syntaxes that pydicom does not know.
ENCAPSULATED_UNCOMPRESSED = "1.2.840.10008.1.2.1.98"
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
# Levels 9 x + 15 y of 16 x 8 pixels in high-throughput JPEG 2000, as OpenJPH 0.26 encodes them losslessly.
HTJ2K_STREAM = base64.b64decode(
    "/0//UQApQAAAAAAQAAAACAAAAAAAAAAAAAAAEAAAAAgAAAAAAAAAAAABBwEB/1AACAACAAAAAv9SAAwAAgABAAUEBEAB/1wAEyBIUFBQUFBQUFBQUFBQSEhI/5AACgAA"
    "AAAAWgAB/5PAJecAh3QAAMASgKIBB3QAwBLAEwDQACE0AIiIAEI0AMATQBUgxvyAAnQAQkEQ/gDkp1UAwCeAVgAAAOanwnUAnJmZmehye/fJ7LgA/9k="
)

root = sys.argv[1]
with open(os.path.join(root, "job.json"), encoding="utf-8") as f:
    rng = np.random.default_rng(json.load(f)["seed"])
out = []


def path(name):
    return os.path.join(root, name)


def reference(name, rgb):
    """Lists a file that must decode to these pixels within one level."""
    rgb = np.ascontiguousarray(rgb, dtype=np.uint8)
    rgb.tofile(path(name + ".rgb"))
    out.append({"file": name, "width": rgb.shape[1], "height": rgb.shape[0]})


def colours(h=40, w=56):
    y, x = np.mgrid[0:h, 0:w]
    return np.stack([x * 4 % 256, y * 6 % 256, (x * 2 + y * 3) % 256, x + y], -1).astype(np.uint8)


def picture(name, image, **options):
    image.save(path(name), **options)
    with Image.open(path(name)) as back:
        reference(name, np.asarray(back.convert("RGB")))


def rasters():
    a = colours()
    rgb = Image.fromarray(a[..., :3])
    noise = Image.fromarray(rng.integers(0, 256, (17, 23), dtype=np.uint8))
    picture("rgb.png", rgb)
    picture("rgba.png", Image.fromarray(a))
    picture("grey.png", noise)
    picture("grey_alpha.png", Image.fromarray(a[..., 2:]))
    picture("one_bit.png", noise.convert("1"))
    picture("palette.png", rgb.quantize(17))
    picture("palette_clear.png", rgb.quantize(5), transparency=2)
    picture("baseline.jpg", rgb, quality=95, subsampling=0)
    picture("progressive.jpg", rgb, quality=90, progressive=True)
    picture("grey.jpg", noise, quality=90)
    picture("cmyk.jpg", Image.fromarray(a, "CMYK"), quality=95)
    picture("one.png", Image.new("RGB", (1, 1), (1, 2, 3)))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("turned.jpg", rgb, quality=95, subsampling=0, exif=exif)
    frames = [Image.new("RGB", (9, 5), (i * 90, 10, 20)) for i in range(3)]
    picture("animated.png", frames[0], save_all=True, append_images=frames[1:], duration=50)
    with Image.open(path("animated.png")) as back:
        assert len(list(ImageSequence.Iterator(back))) == 3
    for kind in ("gif", "tiff", "webp", "bmp"):
        rgb.save(path("other." + kind))
    Image.new("L", (20000, 20)).save(path("long.png"))


def cut_short():
    """Writes complete and truncated JPEG files, and whether Pillow reads them."""
    a = rng.integers(0, 256, (61, 83, 3), dtype=np.uint8)
    verdicts = {}
    for form, options in {"base": {}, "420": {"subsampling": 2}, "progressive": {"progressive": True}}.items():
        picture(f"whole-{form}.jpg", Image.fromarray(a), quality=90, **options)
        with open(path(f"whole-{form}.jpg"), "rb") as f:
            whole = f.read()
        for end in (0, 1, 2, 3, 20, len(whole) // 4, len(whole) // 2, *rng.integers(1, len(whole) - 30, 12).tolist()):
            name = f"cut-{form}-{end}.jpg"
            with open(path(name), "wb") as f:
                f.write(whole[: len(whole) - end])
            try:
                with Image.open(path(name)) as image:
                    image.convert("RGB")
                verdicts[name] = True
            except (OSError, SyntaxError):
                verdicts[name] = False
    with open(path("cut.json"), "w", encoding="utf-8") as f:
        json.dump(verdicts, f)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bombs():
    def png(name, w, h, data, extra=b""):
        head = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
        with open(path(name), "wb") as f:
            f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b""))

    pack = zlib.compressobj(9)
    blown = b"".join(pack.compress(bytes(1 << 20)) for _ in range(400)) + pack.flush()
    png("claims.png", 60000, 60000, zlib.compress(bytes(100)))
    png("area.png", 16000, 16000, zlib.compress(bytes(100)))
    png("zip.png", 16, 16, blown)
    png("text.png", 4, 4, zlib.compress(bytes(52)), chunk(b"zTXt", b"note\0\0" + blown))
    png("profile.png", 4, 4, zlib.compress(bytes(52)), chunk(b"iCCP", b"icc\0\0" + blown))


def dicom(name, array, syntax=ExplicitVRLittleEndian, fragments=None, raw=None, **elements):
    """Writes a file with these pixels; elements override what follows from the array."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    ds.PatientName = "Doe^J\u00e4ne"
    ds.SpecificCharacterSet = "ISO_IR 192"
    inner = Dataset()
    # Inside a sequence these do not belong to the image.
    inner.Rows, inner.WindowCenter, inner.WindowWidth = 1, 5, 6
    inner.IconImageSequence = Sequence([Dataset()])
    ds.ReferencedImageSequence = Sequence([inner, inner])
    ds["ReferencedImageSequence"].is_undefined_length = True
    ds.SourceImageSequence = Sequence([])
    ds.Rows, ds.Columns = array.shape[:2]
    ds.SamplesPerPixel = 1 if array.ndim == 2 else 3
    ds.PhotometricInterpretation = "MONOCHROME2" if array.ndim == 2 else "RGB"
    if array.ndim == 3:
        ds.PlanarConfiguration = 0
    bits = array.dtype.itemsize * 8
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    ds.PixelRepresentation = int(array.dtype.kind == "i")
    for key, value in elements.items():
        setattr(ds, key, value)
    ds.HighBit = elements.get("HighBit", ds.BitsStored - 1)
    data = raw if raw is not None else array.astype(array.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
    if fragments is not None:
        ds.PixelData = encapsulate(fragments)
        ds["PixelData"].is_undefined_length = True
    else:
        ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB" if bits == 8 or fragments is not None else "OW"
    if syntax == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(path(name), enforce_file_format=True)
    return ds


def shown(ds, array):
    """Returns grey as pydicom displays it: its modality and VOI functions, then the output range scaled to 8 bits."""
    values = apply_modality_lut(array, ds).astype(np.float64)
    if "WindowWidth" in ds:
        low, high = 0.0, 2.0**ds.BitsStored - 1
        if ds.PixelRepresentation:
            low, high = -(2.0 ** (ds.BitsStored - 1)), 2.0 ** (ds.BitsStored - 1) - 1
        slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
        low, high = sorted((low * slope + intercept, high * slope + intercept))
        values = apply_voi_lut(values, ds, index=0, prefer_lut=False).astype(np.float64)
    elif "VOILUTSequence" in ds:
        low, high = 0, 2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
        values = apply_voi_lut(values.astype(np.int64), ds).astype(np.float64)
    else:
        low, high = values.min(), values.max()
    share = np.clip((values - low) / (high - low), 0, 1)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    return np.repeat(np.rint(share * 255)[..., None], 3, -1)


def grey(name, array, stored=None, **elements):
    ds = dicom(name, array, **elements)
    reference(name, shown(ds, array if stored is None else stored))


def again(name, source, change, pixels=None):
    """Writes a file made of another one's bytes, which pydicom reads as these pixels."""
    with open(path(source), "rb") as f:
        data = f.read()
    with open(path(name), "wb") as f:
        f.write(change(data))
    if pixels is not None:
        reference(name, pixels)
        return
    ds = dcmread(path(name), force=True)
    if "TransferSyntaxUID" not in ds.file_meta:
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if ds.original_encoding[0] else ExplicitVRLittleEndian
    reference(name, shown(ds, pixel_array(ds)))


def without_group_length(data):
    """Returns the file without the length of its file meta group."""
    assert data[132:140] == b"\x02\0\0\0UL\x04\0"
    return data[:132] + data[144:]


def relabelled(data, old, new):
    """Returns the file with another transfer syntax in its header, regardless of its encoding."""
    old, new = [uid.encode() + b"\0" * (len(uid) % 2) for uid in (old, new)]
    at = data.index(b"\x02\0\x10\0UI") + 6
    assert data[at + 2 : at + 2 + len(old)] == old
    return data[:at] + struct.pack("<H", len(new)) + new + data[at + 2 + len(old) :]


def broken_headers(u12, s16):
    """Writes files as scanners and exports leave them, with missing or wrong headers."""
    grey("whole.dcm", u12, BitsStored=12)
    grey("whole_implicit.dcm", s16, syntax=ImplicitVRLittleEndian)
    for source in ("whole", "whole_implicit"):
        again(f"{source}_no_length.dcm", f"{source}.dcm", without_group_length)
        again(f"{source}_wrong_length.dcm", f"{source}.dcm", lambda d: d[:140] + b"\x99\0\0\0" + d[144:])
        again(f"{source}_huge_length.dcm", f"{source}.dcm", lambda d: d[:140] + b"\xff\xff\xff\xff" + d[144:])
        again(f"{source}_no_preamble.dcm", f"{source}.dcm", lambda d: d[132:])
        again(f"{source}_bare.dcm", f"{source}.dcm", lambda d: d[144 + struct.unpack("<I", d[140:144])[0] :])
    again("explicit_labelled_implicit.dcm", "whole.dcm", lambda d: relabelled(d, ExplicitVRLittleEndian, ImplicitVRLittleEndian))
    again("implicit_labelled_explicit.dcm", "whole_implicit.dcm", lambda d: relabelled(d, ImplicitVRLittleEndian, ExplicitVRLittleEndian))


def tables(u8, u12, s16):
    """Writes VOI lookup tables of several depths and lengths, starting below and above 0, also after a window and inverted."""

    def table(bits, first, entries, vr="US"):
        item = Dataset()
        item.add_new(0x00283002, vr, [len(entries) % 65536, first, bits])
        item.add_new(0x00283006, "OW", np.asarray(entries, "<u2").tobytes())
        # Only the first one counts.
        other = Dataset()
        other.add_new(0x00283002, vr, [len(entries) % 65536, first, bits])
        other.add_new(0x00283006, "OW", np.asarray(entries, "<u2")[::-1].tobytes())
        return {"VOILUTSequence": Sequence([item, other])}

    falling = np.linspace(4095, 0, 4096).astype("u2")
    grey("table12.dcm", u12, BitsStored=12, **table(12, 0, falling))
    grey("table_late.dcm", u12, BitsStored=12, **table(10, 1000, rng.integers(0, 1024, 2000)))
    grey("table16.dcm", u12, BitsStored=12, **table(16, 0, rng.integers(0, 65536, 4096)))
    grey("table_signed.dcm", s16, **table(14, -20000, rng.integers(0, 16384, 40000), vr="SS"))
    grey("table_whole.dcm", random(0, 65536, "<u2"), **table(12, 0, rng.integers(0, 4096, 65536)))
    grey("table8.dcm", u8, **table(8, 0, rng.integers(0, 256, 256)))
    grey("table_inverted.dcm", u12, BitsStored=12, PhotometricInterpretation="MONOCHROME1", **table(12, 0, falling))
    grey("table_implicit.dcm", u12, syntax=ImplicitVRLittleEndian, BitsStored=12, **table(12, 0, falling))
    grey("table_rescaled.dcm", u12, BitsStored=12, RescaleSlope="2", RescaleIntercept="-1000", **table(11, 500, rng.integers(0, 2048, 5000)))
    grey("table_and_window.dcm", u12, BitsStored=12, WindowCenter=600, WindowWidth=900, **table(12, 0, falling))
    # pydicom counts entries of 8 bits modulo 256; the standard's rule by hand. Once with one word per entry, once with two entries per word.
    entries = rng.integers(0, 256, 4096).astype("u1")
    for name, data in (("table8_long.dcm", entries.astype("<u2").tobytes()), ("table8_packed.dcm", entries.tobytes())):
        item = Dataset()
        item.add_new(0x00283002, "US", [4096, 0, 8])
        item.add_new(0x00283006, "OW", data)
        dicom(name, u12, BitsStored=12, VOILUTSequence=Sequence([item]))
        reference(name, np.repeat(entries[u12][..., None], 3, -1))
    dicom("table_short.dcm", u12, BitsStored=12, **table(12, 0, falling[:50]))
    again("table_short.dcm", "table_short.dcm", lambda d: d.replace(b"US\x06\0\x32\0", b"US\x06\0\x99\0"), pixels=u8[:1, :1].repeat(3).reshape(1, 1, 3))
    out.pop()


def streams(u8, u12, s16, a):
    """Writes JPEG whose markers and header disagree about colour, and JPEG 2000."""

    def stream(image, kind, **options):
        with io.BytesIO() as f:
            image.save(f, kind, **options)
            return f.getvalue()

    ycc = stream(Image.fromarray(a), "JPEG", quality=95, subsampling=0)
    rgb = stream(Image.fromarray(a), "JPEG", quality=95, subsampling=0, keep_rgb=True)
    assert b"JFIF" in ycc and b"JFIF" not in rgb
    for name, data, photometric in (
        ("jfif_labelled_rgb.dcm", ycc, "RGB"),
        ("jfif_labelled_422.dcm", ycc, "YBR_FULL_422"),
        ("rgb_labelled_rgb.dcm", rgb, "RGB"),
        ("rgb_labelled_ybr.dcm", rgb, "YBR_FULL"),
    ):
        dicom(name, a, syntax=JPEGBaseline8Bit, fragments=[data], PhotometricInterpretation=photometric)
        with Image.open(io.BytesIO(data)) as back:
            reference(name, np.asarray(back.convert("RGB")))
    ds = dcmread(path("jfif_labelled_rgb.dcm"))
    assert np.abs(pixel_array(ds).astype(int) - a).max() < 12, "pydicom takes the stream's word"
    for end in (2, 20, len(ycc) // 2):
        dicom(f"cut_jpeg_{end if end < 99 else 'half'}.dcm", a, syntax=JPEGBaseline8Bit, fragments=[ycc[: len(ycc) - end]])

    def j2k(name, array, data, syntax=JPEG2000Lossless, **elements):
        ds = dicom(name, array, syntax=syntax, fragments=[data], **elements)
        pixels = pixel_array(ds)
        reference(name, shown(ds, pixels) if array.ndim == 2 else pixels)

    grey8, grey16 = stream(Image.fromarray(u8), "JPEG2000", no_jp2=True), stream(Image.fromarray(u12), "JPEG2000", no_jp2=True)
    j2k("j2k8.dcm", u8, grey8)
    j2k("j2k16.dcm", u12, grey16, WindowCenter=600, WindowWidth=900)
    j2k("j2k_deeper.dcm", u12, grey16, BitsStored=12)
    j2k("j2k_mono1.dcm", u12, grey16, PhotometricInterpretation="MONOCHROME1")
    j2k("j2k_boxed.dcm", u8, stream(Image.fromarray(u8), "JPEG2000"))
    j2k("j2k_tiled.dcm", u8, stream(Image.fromarray(u8), "JPEG2000", no_jp2=True, tile_size=(16, 16)))
    for name, photometric, syntax, options in (
        ("j2k_rct.dcm", "YBR_RCT", JPEG2000Lossless, {"irreversible": False, "mct": 1}),
        ("j2k_ict.dcm", "YBR_ICT", JPEG2000, {"irreversible": True, "mct": 1}),
        ("j2k_rgb.dcm", "RGB", JPEG2000Lossless, {"irreversible": False, "mct": 0}),
        ("j2k_ybr.dcm", "YBR_FULL", JPEG2000, {"irreversible": False, "mct": 0}),
    ):
        j2k(name, a, stream(Image.fromarray(a), "JPEG2000", no_jp2=True, **options), syntax, PhotometricInterpretation=photometric)
    lossy = stream(Image.fromarray(u8), "JPEG2000", no_jp2=True, irreversible=True, quality_mode="rates", quality_layers=[6])
    j2k("j2k_lossy.dcm", u8, lossy, JPEG2000, WindowCenter=128, WindowWidth=256)
    for end in (2, 20, len(grey8) // 2):
        dicom(f"cut_j2k_{end if end < 99 else 'half'}.dcm", u8, syntax=JPEG2000Lossless, fragments=[grey8[: len(grey8) - end]])
    dicom("j2k_smaller.dcm", u8[:-1], syntax=JPEG2000Lossless, fragments=[grey8])
    dicom("j2k_colour.dcm", u8, syntax=JPEG2000Lossless, fragments=[stream(Image.fromarray(a), "JPEG2000", no_jp2=True)], Rows=a.shape[0], Columns=a.shape[1])


def deflated(data):
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    return pack.compress(data) + pack.flush()


def rare_syntaxes(u8, u12, s16, a):
    """Writes deflated data sets and frames, uncompressed fragments, and high-throughput JPEG 2000."""
    window = {"WindowCenter": 600, "WindowWidth": 900}
    grey("deflated.dcm", s16, syntax=DeflatedExplicitVRLittleEndian, **window)
    reference("deflated_rgb.dcm", pixel_array(dicom("deflated_rgb.dcm", a, syntax=DeflatedExplicitVRLittleEndian)))
    with open(path("deflated.dcm"), "rb") as f:
        whole = f.read()
    start = 144 + struct.unpack("<I", whole[140:144])[0]
    for name, end in (("cut_deflated.dcm", len(whole) // 2), ("empty_deflated.dcm", start)):
        with open(path(name), "wb") as f:
            f.write(whole[:end])
    # A data set of 300 MiB in a file of 300 KiB.
    with open(path("bomb_deflated.dcm"), "wb") as f:
        pack = zlib.compressobj(9, zlib.DEFLATED, -15)
        f.write(whole[:start] + b"".join(pack.compress(bytes(1 << 20)) for _ in range(300)) + pack.flush())
    odd = u8[:7, :9]
    for form, syntax, encode in (
        ("encapsulated", ENCAPSULATED_UNCOMPRESSED, lambda data: data),
        ("deflated_frame", DEFLATED_FRAMES, deflated),
    ):
        for kind, array, elements in (("grey", u12, {"BitsStored": 12, **window}), ("odd", odd, {}), ("rgb", a, {})):
            name = f"{form}_{kind}.dcm"
            ds = dicom(name, array, syntax=JPEG2000, fragments=[encode(np.ascontiguousarray(array).tobytes())], **elements)
            again(name, name, lambda d: relabelled(d, JPEG2000, syntax), pixels=array if array.ndim == 3 else shown(ds, array))
        short = f"{form}_short.dcm"
        dicom(short, u8, syntax=JPEG2000, fragments=[encode(u8.tobytes()[:-2])])
        again(short, short, lambda d: relabelled(d, JPEG2000, syntax), pixels=a)
        out.pop()
    bomb = "bomb_deflated_frame.dcm"
    dicom(bomb, u8, syntax=JPEG2000, fragments=[deflated(bytes(100 << 20))])
    again(bomb, bomb, lambda d: relabelled(d, JPEG2000, DEFLATED_FRAMES), pixels=np.zeros((*u8.shape, 3)))
    levels = sum(np.mgrid[0:8, 0:16] * np.array([15, 9]).reshape(2, 1, 1)).astype("u1")
    with Image.open(io.BytesIO(HTJ2K_STREAM)) as back:
        assert np.array_equal(np.asarray(back), levels), "Pillow takes the stream's word"
    for name, syntax in (("htj2k_lossless.dcm", HTJ2KLossless), ("htj2k_rpcl.dcm", HTJ2KLosslessRPCL), ("htj2k.dcm", HTJ2K)):
        reference(name, shown(dicom(name, levels, syntax=syntax, fragments=[HTJ2K_STREAM], WindowCenter=128, WindowWidth=256), levels))
    dicom("cut_htj2k.dcm", levels, syntax=HTJ2K, fragments=[HTJ2K_STREAM[:-40]])
    dicom("jpeg_ls.dcm", u8, syntax=JPEGLSLossless, fragments=[u8.tobytes()])


def random(low, high, dtype, shape=(21, 34)):
    return rng.integers(low, high, shape).astype(dtype)


def lossless_jpeg(array, bits, predictor=1):
    """Returns a JPEG lossless stream (process 14) with one Huffman code of five bits per category."""
    predict = {1: lambda left, up, corner: left, 4: lambda left, up, corner: left + up - corner, 7: lambda left, up, corner: (left + up) // 2}
    h, w = array.shape
    stream = bytearray(b"\xff\xd8\xff\xc3" + struct.pack(">HBHHB3B", 11, bits, h, w, 1, 1, 0x11, 0))
    stream += b"\xff\xc4" + struct.pack(">HB16B", 2 + 17 + 17, 0, *[0, 0, 0, 0, 17] + [0] * 11) + bytes(range(17))
    stream += b"\xff\xda" + struct.pack(">HB2B3B", 8, 1, 1, 0, predictor, 0, 0)
    digits = []
    a = array.astype(int)
    for y in range(h):
        for x in range(w):
            if x and y:
                before = predict[predictor](a[y, x - 1], a[y - 1, x], a[y - 1, x - 1])
            else:
                before = a[y, x - 1] if x else a[y - 1, x] if y else 1 << (bits - 1)
            d = (a[y, x] - before + 32768) % 65536 - 32768
            size = int(abs(d)).bit_length()
            digits.append(format(size, "05b"))
            if 0 < size < 16:
                digits.append(format(d if d > 0 else d + (1 << size) - 1, f"0{size}b"))
    text = "".join(digits)
    text += "1" * (-len(text) % 8)
    stream += bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8)).replace(b"\xff", b"\xff\0")
    return bytes(stream + b"\xff\xd9")


def dicoms():
    u8, u12, s16 = random(3, 250, "u1"), random(0, 4096, "<u2"), random(-32768, 32768, "<i2")
    window = {"WindowCenter": 600, "WindowWidth": 900}
    hounsfield = {"RescaleSlope": "1.5", "RescaleIntercept": "-1024"}
    grey("u8.dcm", u8)
    grey("u8_odd.dcm", random(0, 256, "u1", (7, 9)))
    grey("u12.dcm", u12, BitsStored=12)
    grey("u12_window.dcm", u12, BitsStored=12, **window)
    grey("u12_rescaled.dcm", u12, BitsStored=12, **window, **hounsfield)
    grey("u12_minmax.dcm", u12, BitsStored=12, **hounsfield)
    grey("negative_slope.dcm", u12, BitsStored=12, RescaleSlope="-2", RescaleIntercept="7")
    grey("narrow.dcm", u12, BitsStored=12, WindowCenter=2000, WindowWidth=1)
    grey("u16.dcm", random(0, 65536, "<u2"))
    grey("s16.dcm", s16)
    grey("s16_window.dcm", s16, WindowCenter="40.5", WindowWidth="20000", **hounsfield)
    grey("windows.dcm", s16, WindowCenter=["-600", "40"], WindowWidth=["1500", "400"])
    s12 = random(-2048, 2048, "<i2")
    grey("s12.dcm", s12, BitsStored=12, WindowCenter=40, WindowWidth=400)
    grey("s12_masked.dcm", s12 & 0xFFF, stored=s12, BitsStored=12, WindowCenter=40, WindowWidth=400)
    grey("high_bits.dcm", u12 << 4, stored=u12, BitsStored=12, HighBit=15, **window)
    for kind in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        grey(f"{kind}.dcm", u12, BitsStored=12, VOILUTFunction=kind, **window)
    grey("mono1.dcm", u12, BitsStored=12, PhotometricInterpretation="MONOCHROME1")
    grey("mono1_window.dcm", u12, BitsStored=12, PhotometricInterpretation="MONOCHROME1", **window, **hounsfield)
    grey("implicit.dcm", s16, syntax=ImplicitVRLittleEndian, **window)
    grey("big_endian.dcm", s16, syntax=ExplicitVRBigEndian, **window)
    grey("rle8.dcm", u8, syntax=RLELossless)
    grey("rle16.dcm", np.repeat(u12, 9, 1), syntax=RLELossless, BitsStored=12, **window)
    grey("lossless.dcm", u12, syntax=JPEGLosslessSV1, fragments=[lossless_jpeg(u12, 12)], BitsStored=12, **window)
    grey("lossless16.dcm", u16 := random(0, 65536, "<u2"), syntax=JPEGLosslessSV1, fragments=[lossless_jpeg(u16, 16)])
    for predictor in (1, 4, 7):
        grey(f"lossless_{predictor}.dcm", u12, syntax=JPEGLossless, fragments=[lossless_jpeg(u12, 12, predictor)], BitsStored=12, **window)
    a = np.ascontiguousarray(colours()[..., :3])
    reference("rgb.dcm", pixel_array(dicom("rgb.dcm", a)))
    planes = np.ascontiguousarray(a.transpose(2, 0, 1)).tobytes()
    reference("planar.dcm", pixel_array(dicom("planar.dcm", a, raw=planes, PlanarConfiguration=1)))
    reference("ybr.dcm", pixel_array(dicom("ybr.dcm", a, PhotometricInterpretation="YBR_FULL")))
    half = np.stack([a[:, 0::2, 0], a[:, 1::2, 0], a[:, 0::2, 1], a[:, 0::2, 2]], -1).tobytes()
    reference("ybr422.dcm", pixel_array(dicom("ybr422.dcm", a, raw=half, PhotometricInterpretation="YBR_FULL_422")))
    dicom("rle_rgb.dcm", a, syntax=RLELossless)
    reference("rle_rgb.dcm", a)
    for name, image, photometric in [
        ("jpeg_grey.dcm", Image.fromarray(u8), "MONOCHROME2"),
        ("jpeg_colour.dcm", Image.fromarray(a), "YBR_FULL"),
    ]:
        image.save(path("stream.jpg"), quality=95, subsampling=0)
        with open(path("stream.jpg"), "rb") as f:
            stream = f.read()
        ds = dicom(name, np.asarray(image), syntax=JPEGBaseline8Bit, fragments=[stream], PhotometricInterpretation=photometric)
        with Image.open(path("stream.jpg")) as back:
            pixels = np.asarray(back)
        reference(name, shown(ds, pixels) if pixels.ndim == 2 else pixels)
    broken_headers(u12, s16)
    tables(u8, u12, s16)
    streams(u8, u12, s16, a)
    rare_syntaxes(u8, u12, s16, a)
    # Files that must be refused.
    odd = random(0, 256, "u1", (9, 9, 3))
    dicom("odd422.dcm", odd, PhotometricInterpretation="YBR_FULL_422")
    dicom("odd422_short.dcm", odd, raw=odd.tobytes()[:162], PhotometricInterpretation="YBR_FULL_422")
    dicom("odd422_even_area.dcm", odd[:8], raw=odd.tobytes()[:144], PhotometricInterpretation="YBR_FULL_422")
    dicom("frames.dcm", u8, NumberOfFrames=12)
    dicom("cut.dcm", u8, raw=u8.tobytes()[:-2])
    dicom("huge.dcm", u8, Rows=65535, Columns=65535)
    dicom("area.dcm", u8, Rows=16000, Columns=16000)
    dicom("bomb_rle.dcm", u8, syntax=RLELossless)
    dicom("no_rows.dcm", u8, Rows=0)
    dicom("palette.dcm", u8, PhotometricInterpretation="PALETTE COLOR")
    dicom("deep.dcm", random(0, 9, "<u4"))
    dicom("jpeg2000.dcm", u8, syntax=JPEG2000Lossless, fragments=[b"\xff\x4f\xff\x51"])
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [4, 0, 8], "US", bytes(8)
    dicom("table.dcm", u8, ModalityLUTSequence=Sequence([table]))
    ds = dicom("no_pixels.dcm", u8)
    del ds.PixelData
    ds.save_as(path("no_pixels.dcm"), enforce_file_format=True)


rasters()
cut_short()
bombs()
dicoms()
with open(path("out.json"), "w", encoding="utf-8") as f:
    json.dump(out, f)
