"""Pages as people with other eyes, hands and screens get them: axe-core's rules, both colour schemes, a phone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

PHONE = {"width": 390, "height": 844}
# WCAG 2.2 and axe's own best practices; the rules of "experimental" aren't settled.
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def axe() -> str:
    """axe-core's script, which a Python package carries."""
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(browser: Any, url: str, ready: Callable[[Any], None]) -> list[str]:
    """The violations in both colour schemes and widths, each with its place. `ready` brings the page into the state
    that is looked at."""
    found = []
    for scheme in ("light", "dark"):
        # The page's policy forbids scripts from elsewhere, such as axe.
        context = browser.new_context(color_scheme=scheme, bypass_csp=True)
        page = context.new_page()
        page.goto(url)
        ready(page)
        page.evaluate(axe())
        for width in (1280, PHONE["width"]):
            page.set_viewport_size({"width": width, "height": PHONE["height"]})
            told = page.evaluate(f"axe.run({{runOnly: {TAGS}}})")
            assert len(told["passes"]) > 10, "axe has looked"
            for each in told["violations"]:
                found += [f"{scheme} {width} {each['id']}: {node['html'][:200]}" for node in each["nodes"]]
        if page.evaluate("document.documentElement.scrollWidth") > PHONE["width"]:
            found.append(f"{scheme}: the page scrolls sideways on a phone")
        context.close()
    return found
