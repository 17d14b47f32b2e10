"""`--to web`: a folder with a page that classifies images in the browser: model.onnx, ONNX Runtime for browsers, the preprocessing."""

from pathlib import Path

from refract.augment import Preprocess
from refract.page_style import digest, styled
from refract.pipeline.export.browser.runtime import runtime_files
from refract.pipeline.export.browser.script_check import check_script
from refract.pipeline.export.target import Job, Target
from refract.pipeline.export.targets import onnx

EXPORT = Path(__file__).parents[1]


def write(job: Job, folder: Path) -> None:
    """Write the model as `--to onnx` does, the page, and the files of the runtime."""
    script = EXPORT / "reference" / "preprocess.js"
    check_script(
        script, [each.data for each in job.bundle.golden_samples], Preprocess.from_dict(job.bundle.info.preprocess)
    )
    onnx.write(job, folder)
    for name, content in job.runtime.items():
        (folder / name).write_bytes(content)
    (folder / "index.html").write_text(page(), "utf-8")


def page() -> str:
    """Return the page with its style and its policy: it runs its own scripts and requests its own files only.

    WebAssembly needs 'wasm-unsafe-eval', which allows no JavaScript from texts.
    """
    html = styled((EXPORT / "browser" / "page.html").read_text("utf-8"))
    policy = (
        f"default-src 'none'; script-src 'self' {digest(html, 'script')} 'wasm-unsafe-eval'; style-src {digest(html, 'style')}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    return html.replace("POLICY", policy, 1)


TARGET = Target(
    "web",
    write,
    onnx.run,
    onnx.MODEL,
    onnx.TARGET.input,
    packages=onnx.TARGET.packages,
    extra=onnx.TARGET.extra,
    int8=True,
    runtime=runtime_files,
)
