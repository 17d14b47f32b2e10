"""What the pages that classify images share: their style, and the digests of a Content-Security-Policy."""

import base64
import hashlib
import re
from pathlib import Path

PLACE = "/* page.css */"
"""Replaced in the `<style>` of a page."""


def styled(html: str) -> str:
    """Return the page with the shared style in the place of PLACE."""
    return html.replace(PLACE, Path(__file__).with_name("page.css").read_text("utf-8").rstrip("\n"))


def digest(html: str, element: str) -> str:
    """Return the policy's source for the page's only inline element of this name, `script` or `style`: `'sha256-…'`."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
