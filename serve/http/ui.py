"""The web page at `/`: one file that loads nothing from other hosts and runs only its own script."""

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import HTMLResponse

from refract.page_style import digest, styled

FILE = Path(__file__).with_name("page.html")


def add_page(app: FastAPI) -> None:
    """Add the route `/`, with a Content-Security-Policy that allows the script of the page only."""
    html = styled(FILE.read_text("utf-8"))
    headers = {
        "Content-Security-Policy": _policy(html),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)


def _policy(html: str) -> str:
    return (
        f"default-src 'none'; script-src {digest(html, 'script')}; style-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'; "
        "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
