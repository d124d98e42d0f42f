"README.md from nbs/index.ipynb: its prose, its code and its printed output, without nbdev's directives."

import json
import re
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]


def cell_markdown(cell: dict) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return re.sub(r"\]\((\d\w+\.ipynb)\)", r"](nbs/\1)", source)
    if re.search(r"^#\| *(hide|default_exp|exports?i?)\b", source, re.M):
        return ""
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|"))
    return f"```python\n{code}\n```\n\n{outputs(cell)}".strip()


def outputs(cell: dict) -> str:
    texts = ["".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in cell["outputs"]]
    return "```\n" + "\n".join(t.rstrip() for t in texts) + "\n```" if any(texts) else ""


def readme() -> str:
    cells = json.loads((HOME / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(text for text in map(cell_markdown, cells) if text) + "\n"


if __name__ == "__main__":
    (HOME / "README.md").write_text(readme(), encoding="utf-8")
