"""A written page opened in headless Chromium, used by a script, and what that script saw."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_CATCHER = (
    "<script>window.seenErrors = []; addEventListener('error', (e) => seenErrors.push(String(e.message)));</script>"
)
_FRAME = """
<script>
addEventListener("load", () => {
  const grid = document.getElementById("grid"), detail = () => document.getElementById("detail").textContent;
  const press = (key) => grid.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  const underlined = () =>
    [...document.querySelectorAll("#text span")].map((s, i) => s.style.boxShadow ? i : -1).filter((i) => i >= 0);
  const seen = {width: document.documentElement.scrollWidth, viewport: innerWidth};
  SCRIPT
  seen.errors = window.seenErrors;
  const out = document.createElement("pre");
  out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
});
</script>
"""


def used_in_chromium(page: Path, script: str, width: int = 1200) -> dict[str, Any]:
    """Run ``script`` in the page of a token grid; it fills ``seen`` and may call ``press``, ``detail`` and ``underlined``."""
    assert CHROMIUM is not None
    text = page.read_text().replace("<head>", "<head>" + _CATCHER, 1)
    page.write_text(text.replace("</body>", _FRAME.replace("SCRIPT", script) + "</body>", 1))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={page.parent / 'profile'}",
             f"--window-size={width},2000", "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    assert seen["errors"] == []
    return seen
