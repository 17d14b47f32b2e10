"""Decompress `.tar.gz`, `.tar.bz2` and `.tar.xz`, whose members cannot be read at offsets."""

import bz2
import gzip
import lzma
import zlib
from io import FileIO

from refract.pipeline.data.cache import Writer
from refract.pipeline.data.errors import DataError

_BLOCK = 1 << 20
EXPANSION, ALLOWED = 200, 1 << 30
"""An archive that expands to more than EXPANSION times its size, and to more than ALLOWED bytes, is a decompression bomb."""


def unpack(archive: str, file: FileIO, target: Writer) -> None:
    """Write the uncompressed tar. DataError for a damaged archive and for a decompression bomb; CacheError if the cache is too small."""
    largest = max(EXPANSION * file.seek(0, 2), ALLOWED)
    file.seek(0)
    size = 0
    try:
        with _decompressing(archive, file) as stream:
            while data := stream.read(_BLOCK):
                size += len(data)
                if size > largest:
                    raise DataError(f"{archive}: expands to more than {largest:,} bytes, as a decompression bomb does")
                target.write(data)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of the cache
        raise DataError(
            f"{archive}: is damaged or incomplete ({error}); copy it again, and test it with `tar -tf`"
        ) from error


def _decompressing(archive: str, file: FileIO) -> gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile:
    lower = archive.lower()
    if lower.endswith("gz"):
        return gzip.open(file, "rb")
    return bz2.open(file, "rb") if lower.endswith("bz2") else lzma.open(file, "rb")
