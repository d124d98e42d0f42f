"""Make a rendered site need nothing from elsewhere: mathematics by the KaTeX that lies in scripts/katex, and a search that also works from a file.

smalldocs links KaTeX at a CDN, and its search fetches `search.json`, which a browser refuses for pages opened from a disk.
"""

import json
import os
import re
import shutil
from pathlib import Path

KATEX = Path(__file__).parent / "katex"
CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist/(?:contrib/)?")
FETCH = re.compile(r'const r = await fetch\(offset \+ "search\.json"\);\s*index = await r\.json\(\);')
LOAD = """await new Promise((done, fail) => {
        const script = document.createElement("script");
        Object.assign(script, { src: offset + "search.js", onload: done, onerror: fail });
        document.head.append(script);
      });
      index = window.siteSearchIndex;"""
ELSEWHERE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)=["']https?://[^"']+""")
IMPORT = re.compile(r"""@import\s+(?:url\(["']?https?://[^)]*\)|["']https?://[^"']*["'])[^;]*;""")


def vendor_katex(site: Path) -> None:
    "Copy KaTeX into the site, and point its pages there."
    shutil.copytree(KATEX, site / "site_libs" / "katex", dirs_exist_ok=True)
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        folder = os.path.relpath(site / "site_libs" / "katex", page.parent)
        if CDN.search(text):
            page.write_text(CDN.sub(f"{folder}/", text), encoding="utf-8")


def search_from_disk(site: Path) -> None:
    "Let the search load its index as a script."
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    text = json.dumps(index, ensure_ascii=False).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    (site / "search.js").write_text(f"window.siteSearchIndex = {text};\n", encoding="utf-8")
    script = site / "site_libs" / "smalldocs.js"
    text, count = FETCH.subn(lambda _: LOAD, script.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit("this version of smalldocs loads its search in another way: see scripts/offline.py")
    script.write_text(text, encoding="utf-8")


def drop_remote_fonts(site: Path) -> None:
    "Leave out what style sheets import from other hosts: the fonts of themes, for which a browser has its own."
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        if IMPORT.search(text):
            style.write_text(IMPORT.sub("", text), encoding="utf-8")


def loads_from_elsewhere(site: Path) -> list[str]:
    "What pages of the site would load from another host."
    loads = []
    for page in sorted(site.rglob("*.html")):
        matches = ELSEWHERE.findall(page.read_text(encoding="utf-8"))
        loads += [f"{page.relative_to(site)}: {match[-100:]}" for match in matches]
    return loads


def make_offline(site: Path) -> None:
    "All of it; raises where something is still loaded from elsewhere."
    vendor_katex(site)
    drop_remote_fonts(site)
    search_from_disk(site)
    if loads := loads_from_elsewhere(site):
        raise SystemExit("the site loads from other hosts: " + "; ".join(loads[:5]))
