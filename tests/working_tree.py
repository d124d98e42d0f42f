"A repository of its own with the working tree as it stands, for tests that change files."

import shutil
import subprocess
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]


def copy_working_tree(folder: Path) -> Path:
    "Copy what git would see if everything were added, and commit it there."
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=HOME, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        if (HOME / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HOME / name, folder / name, follow_symlinks=False)
    author = ("-c", "user.name=t", "-c", "user.email=t@t")
    for words in [("init", "-q"), ("add", "-A"), (*author, "commit", "-qm", "t")]:
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder
