"""Python, forked from the process that has the library imported; where none waits, as usual.

python scripts/forked_python.py -c CODE          what comes before -c is not looked at
python scripts/forked_python.py FILE
"""

import os
import signal
import sys

from codetrace.runs.warm_kernels import fork_process

RUN_FILE = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"

if __name__ == "__main__":
    words = sys.argv[1:]
    code, *arguments = words[words.index("-c") + 1 :] if "-c" in words else [RUN_FILE, *words]
    process = fork_process(code, arguments, os.environ, os.getcwd())
    if process is None:
        os.execv(sys.executable, [sys.executable, *words])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.killpg(process.pid, number))
    sys.exit(process.wait())
