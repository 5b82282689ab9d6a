"""One HTML file from template files and data, under a policy that lets nothing else in."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

import vl_convert

SCRIPTS = ("base", "table", "plots", "browser", "latent", "routing", "main")
"""Files of the page's script, in the order in which they are joined."""


def render(parts: Mapping[str, Any]) -> str:
    """The page.

    Args:
        parts: data by name, of what JSON has. Each becomes a script element that is never run,
            `data-NAME`, and the page reads it only when it is needed.
    """
    style = _template("style.css")
    scripts = {"plotting": vega(), "page": script()}
    data = "\n".join(
        f'<script type="application/json" id="data-{name}">{embedded(value)}</script>'
        for name, value in parts.items()
    )
    fields = {
        "policy": policy(list(scripts.values()), style),
        "style": style,
        "data": data,
        **scripts,
    }
    # in one pass: what was put in is never looked at again
    pieces = _template("page.html").split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [fields[name], rest]
    return "".join(filled)


def policy(scripts: list[str], style: str) -> str:
    """The content security policy: these scripts, this style, and nothing from anywhere."""
    allowed = " ".join(_hash(script) for script in scripts)
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {allowed}",
            f"style-src {_hash(style)}",
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def embedded(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def script() -> str:
    """The page's own script: its files joined, sharing one scope that is not the page's."""
    files = "\n".join(_template(f"{name}.js") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{files}\n}})();'


@functools.cache
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed, as the package has them."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")


def _template(name: str) -> str:
    return (resources.files("routesae_cache.report") / "page" / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _finite(value: Any) -> Any:
    """The same without what JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
