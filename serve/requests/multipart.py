"""Parse the files and texts of a multipart/form-data body.

Starlette's `request.form()` is not used: it writes every file over 1 MB to the disk, which fails in a read-only container, and it
parses on the event loop. Here the body is in memory already, and its size is limited.
"""

import logging
import re
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from refract.serve.errors import RequestError

MAX_OTHER_PARTS = 64
"""Most parts of a form in addition to its images: texts, and fields that are ignored."""

_PARAMETER = re.compile(r';\s*([^\s;=*]+)(?:\*([0-9]+))?(\*)?\s*=\s*("(?:\\.|[^"\\])*"|[^;]*)', re.DOTALL)
"""A parameter of Content-Disposition: name, continuation number, `*` if percent-encoded, value."""

# Clients control these warnings, and could fill the log with them.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


def parts_in(body: bytes, boundary: bytes, *, max_images: int) -> tuple[list[bytes], list[str]]:
    """Return (contents of all parts with a file name, contents of the fields `text`). Other fields are ignored.

    RequestError 413 beyond `max_images` files or texts, 400 for an invalid or incomplete form, or for a text that is not UTF-8.
    """
    if not boundary:
        raise RequestError(400, "invalid_form", "the Content-Type of the form has no boundary")
    form = _Form(max_images)
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as err:
        raise RequestError(400, "invalid_form", "the body is not valid multipart/form-data") from err
    if not form.complete:
        raise RequestError(400, "invalid_form", "the form ends before its closing boundary")
    try:
        return form.files, [text.decode("utf-8") for text in form.texts]
    except UnicodeDecodeError as err:
        raise RequestError(400, "invalid_text", "a field `text` of the form is not valid UTF-8") from err


class _Form:
    def __init__(self, max_images: int) -> None:
        self.max_images = max_images
        self.files: list[bytes] = []
        self.texts: list[bytes] = []
        self.complete = False
        self._parts = 0

    def callbacks(self) -> dict[str, object]:
        names = "part_begin part_data part_end header_begin header_field header_value header_end headers_finished end"
        return {f"on_{name}": getattr(self, f"_{name}") for name in names.split()}

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > self.max_images + MAX_OTHER_PARTS:
            limits = f"at most {self.max_images} images and {MAX_OTHER_PARTS} other parts are allowed"
            message = f"the form has more than {self.max_images + MAX_OTHER_PARTS} parts; {limits}"
            raise RequestError(413, "too_many_images", message)
        self._disposition, self._chunks = "", []  # type: str, list[bytes]

    def _header_begin(self) -> None:
        self._name, self._value = b"", b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value.decode("latin-1")

    def _headers_finished(self) -> None:
        options = parameters(self._disposition)
        self._is_file = "filename" in options
        self._is_text = not self._is_file and options.get("name") == b"text"
        if self._is_file and len(self.files) == self.max_images:
            raise RequestError(
                413, "too_many_images", f"the form has more than {self.max_images} images, the most allowed"
            )
        if self._is_text and len(self.texts) == self.max_images:
            raise RequestError(
                413, "too_many_images", f"the form has more than {self.max_images} texts, the most allowed"
            )

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file or self._is_text:
            self._chunks.append(data[start:end])

    def _part_end(self) -> None:
        if self._is_file:
            self.files.append(b"".join(self._chunks))
        elif self._is_text:
            self.texts.append(b"".join(self._chunks))

    def _end(self) -> None:
        self.complete = True


def parameters(disposition: str) -> dict[str, bytes]:
    """Parse the parameters of a Content-Disposition header. Keys are the names in lower case.

    Accepts plain values, RFC 8187's form (`filename*=UTF-8''%e2%82%ac.png`), which older clients send without a plain value, and RFC 2231's
    continuations (`filename*0=`). An extended value replaces a plain one.
    """
    plain: dict[str, bytes] = {}
    extended: dict[str, dict[int, bytes]] = {}
    for match in _PARAMETER.finditer(disposition):
        name, number, encoded, text = match[1].lower(), match[2], match[3], match[4].strip()
        if text.startswith('"'):
            text = re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)
        value = text.encode("latin-1")
        if encoded:
            if not number or not int(number[:9]):  # only the first part has a character set and a language
                value = value.rpartition(b"'")[2]
            value = unquote_to_bytes(value)
        if number or encoded:
            extended.setdefault(name, {})[int((number or "0")[:9])] = value
        else:
            plain.setdefault(name, value)
    return plain | {name: b"".join(values[i] for i in sorted(values)) for name, values in extended.items()}
