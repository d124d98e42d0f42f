"""README.md, findings in nbs/index.ipynb, the table in nbs/chapters.ipynb and the chapters of _quarto.yml, all from the notebooks and the reference records; and uv's pins in pyproject.toml, from constraints.txt.

`make export` runs it; nothing of these is written by hand twice, and no number of the findings is written by hand at all.
"""

import base64
import json
import os
import re
from pathlib import Path

import pandas as pd
import yaml

from codetrace.core.stats import format_with_interval
from codetrace.patching.batches import program_means_table
from codetrace.phases.mechanism import read_mechanism_table
from codetrace.sae.score_tables import auroc_table, scores_beyond

HOME = Path(__file__).resolve().parents[1]
NOTEBOOKS = HOME / "nbs"
FOLDERS = {  # In the order in which they import from each other
    "core": "Core",
    "plots": "Plots",
    "sandbox": "Sandbox",
    "models": "Models",
    "tasks": "Tasks",
    "patching": "Activation patching",
    "sae": "Sparse autoencoders",
    "steering": "Steering",
    "planted": "Planted mechanisms",
    "runs": "Runs",
    "phases": "Phases",
    "app": "The page",
}
PAGES = ["index", "recipes", "chapters"]  # Notebooks without a module, in the order of the site
TABLE = "## The chapters"
FINDINGS = "## What it finds"
RECORDS = HOME / "runs" / "reference"
FIGURE = ("tracing/20261129T012836170Z-c99ded78", "c5bb26f9")  # A record, and the cell that shows it


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def chapters() -> dict[str, list[Path]]:
    "Notebooks by the title of their part, the command line last."
    parts = {title: sorted((NOTEBOOKS / folder).glob("*.ipynb")) for folder, title in FOLDERS.items()}
    pages = [NOTEBOOKS / f"{name}.ipynb" for name in PAGES]
    known = {*pages, *(path for part in parts.values() for path in part)}
    return parts | {"Command line": [path for path in sorted(NOTEBOOKS.rglob("*.ipynb")) if path not in known]}


def plain_line(path: Path) -> str:
    "What a notebook does: the line under its title."
    lines = "".join(read(path)["cells"][0]["source"]).splitlines()
    return next(line[1:].strip() for line in lines if line.startswith(">"))


def chapter_table() -> str:
    rows = ["| notebook | what it does |", "| --- | --- |"]
    for title, paths in chapters().items():
        rows.append(f"| **{title}** | |")
        for path in paths:
            name = path.relative_to(NOTEBOOKS).with_suffix("").as_posix()
            rows.append(f"| [{name}]({name}.ipynb) | {plain_line(path)} |")
    return "\n".join(rows)


def replace_cell(name: str, start: str, text: str) -> None:
    "Write the cell of a notebook that begins in some way; what follows its table stays."
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = read(path)
    cell = next(cell for cell in notebook["cells"] if "".join(cell["source"]).startswith(start))
    cell["source"] = f"{start}\n\n{text}".splitlines(True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_chapters() -> None:
    "Put the table of chapters into its page."
    hint = "A folder imports only from the folders above it in this table. Edit a notebook, never `codetrace/**/*.py`; then `make export`, `make test`."
    replace_cell("chapters", TABLE, f"{chapter_table()}\n\n{hint}")


def record(name: str) -> dict:
    "The manifest of a reference record."
    return read(RECORDS / name / "run.json")


def record_link(name: str, text: str) -> str:
    return f"[{text}](../runs/reference/{name}/notebook.ipynb)"


def beyond_rules(name: str) -> tuple[str, str, str]:
    "What a model says of values that no rule gives: accuracy, how many values, what the best constant gets."
    match = re.search(
        r"beyond rules ([\d.]+ \[[^\]]*\]) of (\d+)(?: in \d+ programs)? \((?:commonest value|the best constant) ([\d.]+)\)",
        record(name)["headline"],
    )
    return match[1], match[2], match[3]


def random_swap(name: str, place: str) -> tuple[float, int, int]:
    "What share of answers a random state of the same norm turns into the other run's, of how many, and at which layer."
    gains = pd.read_parquet(RECORDS / name / "swap_gains.parquet").set_index(["place", "control"])
    gain = gains.loc[(place, "random")]
    return float(gain["flips"]), int(gain["n"]), int(gain["layer"])


def last_token(name: str) -> str:
    "At the last token: the last layer at which fewer than half of the exchanged states bring the other run's value, and the first at which more do, intervals and all."
    used = pd.read_parquet(RECORDS / name / "used.parquet").query("place == 'final'").set_index("layer").sort_index()
    last_below = used.index[used["used_high"] < 0.5].max()
    first_above = used.index[used["used_low"] > 0.5].min()
    shares = [
        format_with_interval(*used.loc[layer, ["used", "used_low", "used_high"]]) for layer in (last_below, first_above)
    ]
    random, n_random, random_layer = random_swap(name, "final")
    return (
        f"layer {last_below}: {shares[0]}, layer {first_above}: {shares[1]} of {used.loc[first_above, 'n_used']:.0f} "
        f"({random:.2f} of {n_random}, layer {random_layer})"
    )


def in_program(name: str) -> tuple[str, str]:
    "At the line that set a value: what a probe reads beyond rules, and what swapping just that state changes beside a random state."
    used = pd.read_parquet(RECORDS / name / "used.parquet").set_index(["place", "layer"])
    for claim in read(RECORDS / name / "claims.json"):
        place = re.match(r"value read at (variable|line|line end), layer (\d+), .*, n = (\d+)", claim["claim"])
        if place and claim["verdict"] == "more than every baseline" and "held out" not in claim["claim"]:
            swap = used.loc[(place[1], int(place[2]))]
            share = format_with_interval(swap["used"], swap["used_low"], swap["used_high"])
            read_there = format_with_interval(claim["number"], claim["low"], claim["high"])
            random, n_random, layer = random_swap(name, place[1])
            of_random = f"{random:.2f} of {n_random}, layer {layer}"
            baseline = re.match(r"the strongest, (.*), ([\d.]+) where", claim["baseline"])
            read_there += f" of {place[3]}, layer {place[2]} ({baseline[1]} {baseline[2]}; control task {claim['null'].split()[0]})"
            return read_there, f"{share} of {swap['n_used']:.0f} ({of_random})"
    raise SystemExit(f"{name}: no probe reads a value at the line that set it")


def watch_row(model: str, name: str, is_taken_apart: bool = True) -> str:
    "What one model says, and which of its states the answer comes from."
    says, _, commonest = beyond_rules(name)
    cells = [f"{model} ({record_link(name, 'record')})", f"{says} ({commonest})"]
    if is_taken_apart:
        cells += [last_token(name), *in_program(name)]
    return "| " + " | ".join([*cells, *["–"] * (5 - len(cells))]) + " |"


def watch_finding(untaught: str, taught: str, code_model: str) -> str:
    "What SmolLM2 says of variables before and after it was taught, and a code model; and which states the answer comes from."
    lines = [
        "**A model that follows a variable looks its value up when asked, and not in the state of the line that set it.** Give it another run's state at the last token, and it says that run's value. At the line that set the variable a probe "
        "reads the value above its baselines, too; but with that very state exchanged, the answer stays. (Shares with 95% intervals; in brackets what the commonest value, a random state of the same place, or the strongest baseline of the probe gives, and how well such a probe learns a random digit for each letter: where it learns that as well, it may read the text and not the value.)",
        "",
        "| model | says what no shallow rule gives | last token exchanged: says the other value | where it was set, a probe reads | that state exchanged: says the other value |",
        "|---|---|---|---|---|",
        watch_row("SmolLM2", untaught, is_taken_apart=False),
        watch_row("SmolLM2, taught to follow references", taught),
        watch_row("Qwen2.5-Coder-0.5B-Instruct (4 bits), which nobody taught", code_model),
    ]
    return "\n".join(lines)


def heads_finding(name: str) -> str:
    "Which heads bring a value to the last token of a model that nobody taught."
    manifest = record(name) | {"folder": RECORDS / name}
    effects = program_means_table(read_mechanism_table(manifest, "swapped"), "effect").set_index("position_name")
    at_last_token = effects.loc["final"].set_index("kind")
    heads = [
        f"{row['layer']}.{row['head']}"
        for row in read(RECORDS / name / "mechanism.json")["heads"]
        if row["position_name"] == "final"
    ]
    brought, random = (
        format_with_interval(*at_last_token.loc[kind, ["effect", "low", "high"]]) for kind in ("chosen", "random heads")
    )
    return (
        f"In Qwen2.5-Coder-0.5B, which nobody taught, patching {len(heads)} heads alone ({', '.join(heads)}: layer and head) at the last token brings {brought} of a changed value's effect "
        f"(as many random heads {random}; {at_last_token.loc['chosen', 'n']} programs; {record_link(name, 'record')})."
    )


def seeds_finding(name: str) -> str:
    "What holds in every training of the model that follows references, and what does not."
    summary = [{"seeds": row.get("of")} | row for row in record(name)["summary"]]  # `of` in a record of before
    rows = {row["finding"]: row for row in summary}
    value = rows["a changed value passes from rhs 1 to the final token (layer)"]
    reference = rows["a changed reference passes from rhs 2 to the final token (layer)"]
    enough = rows["heads chosen at final for a changed value bring more than random heads (effect)"]
    needed = rows[
        "without the heads chosen at final for a changed value accuracy is lower than without random heads (accuracy)"
    ]
    return (
        f"SmolLM2 was taught to follow references {value['seeds']} times: a changed value passes from its constant to the "
        f"last token at layer {layers(value)} (of layers 0 to 29) in {share(value)}, a changed reference at layer {layers(reference)} in {share(reference)}; the heads found there bring more "
        f"than random heads in {share(enough)}, but are needed more than random heads in only {share(needed)} ({record_link(name, 'record')})."
    )


def layers(row: dict) -> str:
    "The layers at which something is found."
    low = int(row["smallest"])
    high = int(row["largest"])
    return f"{low}" if low == high else f"{low} to {high}"


def share(row: dict) -> str:
    "In how many trainings something is found, with the interval."
    return f"{row['in_seeds']} of {row['seeds']} [{row['low']:.2f}, {row['high']:.2f}]"


def stored_aurocs(name: str, set_name: str) -> dict[str, str]:
    "AUROCs of a record's stored scores, with intervals; also beyond prompt length and difficulty."
    scores = pd.read_parquet(RECORDS / name / "scores.parquet").query("set == @set_name").reset_index(drop=True)
    columns = scores[["probe", "entropy of the first token"]]
    beyond = scores_beyond(scores, columns, ["prompt_tokens", "difficulty"])
    texts = {"n": str(len(scores))}
    for measure, table in {"": columns, " beyond": beyond}.items():
        for row in auroc_table(scores, {measure: table}).itertuples():
            texts[f"{row.name}{measure}"] = format_with_interval(row.value, row.low, row.high)
    return texts


def pregeneration_finding(name: str) -> str:
    "What a state before the first token foretells."
    manifest = record(name)
    area = re.search(r"AUROC ([\d.]+ \[[^\]]*\]) on (\d+) tasks", manifest["headline"])
    difference = re.search(r"the strongest is (.*?), difference ([\d.]+ \[[^\]]*\])", manifest["headline"])
    elsewhere = stored_aurocs(name, "transfer")
    return (
        f"**A code model knows before it writes, on problems like those that a probe was fitted to.** The state of Qwen2.5-Coder-0.5B at the last token of a prompt foretells whether its answer will pass the tests: "
        f"AUROC {area[1]} on {area[2]} MBPP problems that had no part in the fit, {difference[2]} above {difference[1]}. On the {elsewhere['n']} problems of HumanEval, whose prompts are of another form, the same probe has {elsewhere['probe']}, "
        f"and {elsewhere['probe beyond']} beyond prompt length and difficulty; there the entropy of the first token, which needs no probe, has {elsewhere['entropy of the first token']} ({record_link(name, 'record')})."
    )


def ranking_finding(name: str) -> str:
    "What it is worth to choose among answers by what a probe reads."
    choices = pd.read_parquet(RECORDS / name / "choices.parquet")
    rows = {row["name"]: row for row in choices[choices["k"] == 5].to_dict("records")}
    probe, strongest = rows["probe"], rows["log-probability"]
    return (
        f"Of five sampled answers to each of {probe['problems']} problems, the one that a probe scores best is right in {interval_of(probe)}, the likeliest in {interval_of(strongest)}; "
        f"any of them in {interval_of(rows['random choice'])}, the best there is in {interval_of(rows['oracle'])} ({record_link(name, 'record')})."
    )


def interval_of(row: dict) -> str:
    return format_with_interval(row["value"], row["low"], row["high"])


def write_findings() -> None:
    "Put findings and their figure into the index, from reference records."
    name, cell_id = FIGURE
    notebook = read(RECORDS / name / "notebook.ipynb")
    cell = next(cell for cell in notebook["cells"] if cell["id"] == cell_id)
    image = next(output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output["data"])
    (NOTEBOOKS / "finding.png").write_bytes(base64.b64decode("".join(image)))
    findings = [
        watch_finding(
            "watch/20261130T154533959Z-fbb89dcb",
            "watch/20261130T202019703Z-844ae287",
            "watch/20261130T212713071Z-fb028413",
        ),
        f"**Few heads carry a value, and where it is learnt, it is learnt in the same place.** {heads_finding('mechanism/20261201T153057455Z-707cbac7')} {seeds_finding('seeds/20261128T121437000Z-d5d215a2')}",
        f"{pregeneration_finding('pregeneration/20261201T000100986Z-b9b6dcf6')} {ranking_finding('ranking/20261201T111024004Z-2f61d50a')}",
    ]
    count = re.match(r"n=(\d+)", record(name)["headline"])[1]
    caption = f"Share of {count} programs whose answer becomes the counterfactual's when one state of `binding` is put in its place, by layer"
    figure = f"![Where a value sits, by layer](finding.png)\n\n{caption}, at the constant (left) and at the last token (right), with 95% intervals and controls; {record_link(name, 'record')}."
    replace_cell("index", FINDINGS, "\n\n".join(findings) + f"\n\n{figure}")


def write_quarto() -> None:
    "Put the chapters into _quarto.yml; its other lines, and the records, stay."
    path = HOME / "_quarto.yml"
    text = path.read_text(encoding="utf-8")
    parts = yaml.safe_load(text)["book"]["chapters"]
    records = [part for part in parts if isinstance(part, dict) and part["part"] == "Records"]
    listed = [
        {"part": title, "chapters": [f"nbs/{path.relative_to(NOTEBOOKS).as_posix()}" for path in paths]}
        for title, paths in chapters().items()
    ]
    pages = [f"nbs/{name}.ipynb" for name in PAGES[1:]]
    block = yaml.safe_dump({"chapters": ["index.qmd", *pages, *listed, *records]}, sort_keys=False, width=200)
    block = re.sub(r"^", "  ", block, flags=re.M).rstrip() + "\n"
    head, _, tail = text.partition("  chapters:\n")
    after = tail[tail.index("\nformat:") :]
    path.write_text(head + block + after, encoding="utf-8")


def write_uv_pins() -> None:
    "Put the lines of constraints.txt into pyproject.toml, where uv reads them."
    lines = (HOME / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = "".join(f'    "{line}",\n' for line in lines if line and not line.startswith("#"))
    path = HOME / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    head, start, tail = re.split(r"(^constraint-dependencies = \[.*\n)", text, flags=re.M)
    updated = head + start + pins + tail[re.search(r"^\]", tail, re.M).start() :]
    if updated != text:  # `make` sets up .venv again whenever this file is newer
        path.write_text(updated, encoding="utf-8")


def linked(markdown: str, page: Path = HOME) -> str:
    "Links of the index, which stands in nbs/, as a page in another folder writes them."
    there = os.path.relpath(NOTEBOOKS, page)
    markdown = re.sub(r"\]\(([\w/]+\.(?:ipynb|png))\)", rf"]({there}/\1)", markdown)
    return markdown.replace("](../", "](")


def cell_markdown(cell: dict) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return linked(source)
    if re.search(r"^#\| *(hide|default_exp|exports?i?)\b", source, re.M):
        return ""
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|"))
    return f"```python\n{code}\n```\n\n{outputs(cell)}".strip()


def outputs(cell: dict) -> str:
    texts = ["".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in cell["outputs"]]
    return "```\n" + "\n".join(t.rstrip() for t in texts) + "\n```" if any(texts) else ""


def readme() -> str:
    cells = read(NOTEBOOKS / "index.ipynb")["cells"]
    return "\n\n".join(text for text in map(cell_markdown, cells) if text) + "\n"


if __name__ == "__main__":
    write_chapters()
    write_findings()
    write_quarto()
    write_uv_pins()
    (HOME / "README.md").write_text(readme(), encoding="utf-8")
