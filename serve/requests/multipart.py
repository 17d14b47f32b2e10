"""Files and texts of a multipart/form-data body.

Not Starlette's `request.form()`: that spools every file over 1 MB to the disk, which a read-only container has not, and
parses on the event loop. The body is in memory already, and limited.
"""

import logging
import re
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from refract.serve.http.errors import RequestError

MAX_TEXT_FIELDS = 64

_PARAMETER = re.compile(r';\s*([^\s;=*]+)(?:\*([0-9]+))?(\*)?\s*=\s*("(?:\\.|[^"\\])*"|[^;]*)', re.DOTALL)
"""A parameter of Content-Disposition: name, number of a continuation, whether percent-encoded, value."""

# Its warnings are of what clients send, as often as they like.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


def parts_in(body: bytes, boundary: bytes, *, max_images: int) -> tuple[list[bytes], list[str]]:
    """(contents of the parts that have a file name, whatever their field; those of the fields `text`). Other fields are passed over.

    RequestError 413 beyond `max_images` of either, 400 for a body that is not a complete form, or a text that is not UTF-8.
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
        raise RequestError(400, "invalid_text", "a part `text` of the form is not UTF-8") from err


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
        if self._parts > self.max_images + MAX_TEXT_FIELDS:
            raise RequestError(413, "too_many_images", f"the form has too many parts; at most {self.max_images} images")
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
            raise RequestError(413, "too_many_images", f"the form has more than {self.max_images} images")
        if self._is_text and len(self.texts) == self.max_images:
            raise RequestError(413, "too_many_images", f"the form has more than {self.max_images} texts")

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
    """The parameters of a Content-Disposition header by their names in lower case: plain, in RFC 8187's form, which older clients send
    alone (`filename*=UTF-8''%e2%82%ac.png`), or in RFC 2231's continuations (`filename*0=`). An extended value replaces a plain one."""
    plain: dict[str, bytes] = {}
    extended: dict[str, dict[int, bytes]] = {}
    for match in _PARAMETER.finditer(disposition):
        name, number, encoded, text = match[1].lower(), match[2], match[3], match[4].strip()
        if text.startswith('"'):
            text = re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)
        value = text.encode("latin-1")
        if encoded:
            if not number or not int(number[:9]):  # the first alone names a character set and a language
                value = value.rpartition(b"'")[2]
            value = unquote_to_bytes(value)
        if number or encoded:
            extended.setdefault(name, {})[int((number or "0")[:9])] = value
        else:
            plain.setdefault(name, value)
    return plain | {name: b"".join(values[i] for i in sorted(values)) for name, values in extended.items()}
