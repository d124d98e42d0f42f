"""Make a run a reference record: a copy under runs/reference/ that git keeps.

python scripts/reference.py RUN [--leave-out PATTERN ...] [--to FOLDER]

What is left out (large weights, say) stays listed in the manifest with its hash, under `left_out`.
"""

import argparse
import fnmatch
import shutil
from pathlib import Path

from codetrace.core.files import write_json
from codetrace.runs.manifest import resolve_run

HOME = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run id or folder of a complete run")
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="PATTERN", help="outputs that are not copied")
    parser.add_argument("--to", type=Path, default=HOME / "runs" / "reference", help="default: %(default)s")
    options = parser.parse_args()
    manifest = resolve_run(options.run)
    source = Path(manifest["folder"])
    target = options.to / manifest["phase"] / manifest["run_id"]
    left_out = [name for name in manifest["outputs"] if any(fnmatch.fnmatch(name, p) for p in options.leave_out)]
    skipped = {source / name for name in left_out}

    def ignore(folder, names):
        return [n for n in names if Path(folder) / n in skipped or n.startswith(".")]

    shutil.copytree(source, target, ignore=ignore)
    for folder in sorted((p for p in target.rglob("*") if p.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    stored = {key: value for key, value in manifest.items() if key != "folder"}
    write_json(target / "run.json", stored | ({"left_out": left_out} if left_out else {}))
    print(target)


if __name__ == "__main__":
    main()
