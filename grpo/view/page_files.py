"""The files of the page: one by one for the server, in one for an export."""

import base64
import hashlib
from importlib import resources

SCRIPTS = (
    "dom.js",
    "maths.js",
    "source.js",
    "table.js",
    "curves.js",
    "overview.js",
    "tokens.js",
    "rollouts.js",
    "compare.js",
    "main.js",
)
STYLES = ("style.css",)
PARTS = {*SCRIPTS, *STYLES}
TYPES = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
HEAD, BODY = "<!-- head -->", "<!-- body -->"  # places in index.html


def part(name: str) -> bytes:
    """A file of the page."""
    assert name in PARTS or name == "index.html"
    return (resources.files("grpo.view") / "page" / name).read_bytes()


def index() -> bytes:
    """The page that loads its parts from the server."""
    head = "".join(f'<link rel="stylesheet" href="/page/{name}">\n' for name in STYLES)
    head += "".join(f'<script src="/page/{name}" defer></script>\n' for name in SCRIPTS)
    return part("index.html").replace(HEAD.encode(), head.encode())


def page_with(data: bytes) -> bytes:
    """The page with its parts and gzipped data in one file. Only these very scripts and styles may act in it."""
    style = b"\n".join(part(name) for name in STYLES)
    script = b"\n".join(part(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = b'<meta http-equiv="Content-Security-Policy" content="%s">\n<style>%s</style>\n' % (policy.encode(), style)
    block = b'<script type="application/octet-stream" id="data">%s</script>\n' % base64.b64encode(data)
    body = block + b"<script>%s</script>\n" % script
    return part("index.html").replace(HEAD.encode(), head).replace(BODY.encode(), body)


def _source(content: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
