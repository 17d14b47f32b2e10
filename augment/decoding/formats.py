"""Detect the format of encoded bytes by their first bytes: the formats that Refract decodes, and the names of others for errors."""

from types import MappingProxyType

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".hif",
)  # fmt: skip
"""Lower-case suffixes of the files that folder scans treat as images."""

READ = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIC")
"""Names of the decoded formats. HEIC needs the extra `heif`."""

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00\x10\x00\x00\x00CR", "camera raw (Canon CR2)"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"8BPS", "Photoshop (PSD)"),
    (b"gimp xcf", "GIMP (XCF)"),
    (b"FUJIFILMCCD-RAW", "camera raw (Fujifilm)"),
    (b"IIRO", "camera raw (Olympus)"),
    (b"IIRS", "camera raw (Olympus)"),
    (b"MMOR", "camera raw (Olympus)"),
    (b"IIU\x00", "camera raw (Panasonic)"),
    (b"FOVb", "camera raw (Sigma)"),
    (b"\x00MRM", "camera raw (Minolta)"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"\x00\x00\x01\x00", "Windows icon (ICO)"),
    (b"icns", "Apple icon (ICNS)"),
    (b"DDS ", "DirectDraw surface (DDS)"),
    (b"qoif", "QOI"),
    (b"BPG\xfb", "BPG"),
    (b"FLIF", "FLIF"),
    (b"SIMPLE  =", "FITS"),
    (b"\x93NUMPY", "NumPy array"),
    (b"\xd7\xcd\xc6\x9a", "Windows metafile"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1f\x8b", "gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (b"Rar!\x1a\x07", "RAR archive"),
    (b"\x1a\x45\xdf\xa3", "video"),
    (b"FLV\x01", "video"),
    (b"OggS", "video"),
    (b"CWS", "Flash (SWF)"),
    (b"FWS", "Flash (SWF)"),
    (b"ZWS", "Flash (SWF)"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"version https://git-lfs", "Git LFS pointer"),
)
# Major and compatible brands of the ISO base media file format (ISO/IEC 14496-12, 4.3); the first match decides.
_BRANDS = (
    ({b"avif", b"avis"}, "AVIF"),
    ({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"}, "HEIC"),
    ({b"crx "}, "camera raw (Canon CR3)"),
    ({b"jxl "}, "JPEG XL"),
    ({b"jp2 ", b"jpx ", b"jph "}, "JPEG 2000"),
    ({b"mif1", b"msf1", b"mif2"}, "HEIC"),
)
_REMEDIES = MappingProxyType(
    {
        "SVG": "render it to PNG",
        "PDF": "render each page to PNG",
        "PostScript": "render it to PNG",
        "Git LFS pointer": "fetch the file with git lfs pull",
        "ZIP archive": "unpack it",
        "gzip archive": "unpack it",
        "7z archive": "unpack it",
        "RAR archive": "unpack it",
        "video": "save its frames as JPEG or PNG",
        "text": "remove the file, or replace it by an image",
        "HTML page": "download the image itself",
    }
)


def format_of(data: bytes) -> str | None:
    """Return the format's name, in `READ` or not; None if the first bytes are unknown."""
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "video"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124):
        return "BMP"
    if data[4:8] == b"ftyp":
        return _media_format(data)
    if data[:1] == b"P" and data[1:2] in b"1234567fF" and data[2:3].isspace():
        return "netpbm (PGM, PPM)"
    if data[128:132] == b"DICM":
        return "DICOM"
    return _text_format(data[:4096])


def unsupported_message(data: bytes, name: str | None) -> str:
    """Return the error message for a format that is not decoded: the reason, the remedy and the accepted formats."""
    accepted = ", ".join(READ)
    if name is None:
        return f"unknown image format (its first bytes are {data[:4].hex(' ')}); accepted: {accepted}"
    if name == "HEIC":
        return "HEIC needs an extra: pip install 'refract[heif]', or save the image as JPEG"
    if name == "text":
        return f"not an image: it looks like text; accepted: {accepted}"
    return f"{name} is not supported; {_REMEDIES.get(name, 'save the image as JPEG or PNG')}; accepted: {accepted}"


def _media_format(data: bytes) -> str:
    length = min(max(int.from_bytes(data[:4]), 16), 256)
    brands = {data[8:12]} | {data[start : start + 4] for start in range(16, length, 4)}
    for known, name in _BRANDS:
        if brands & known:
            return name
    return "video"


def _text_format(start: bytes) -> str | None:
    try:
        text = start.decode("utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", "strict")
    except UnicodeDecodeError as error:
        if len(start) < 4096 or error.start < 4090:  # the cut at 4096 bytes may split a valid character
            return None
        text = start[: error.start].decode("utf-8")
    if not text or "\x00" in text:
        return None
    lower = text.lower()
    if "<svg" in lower:
        return "SVG"
    return "HTML page" if "<html" in lower or "<!doctype html" in lower else "text"
