"""What does it cost that values keep their identity across the two processes? The last line is JSON.

    python bench/copy_restore.py               21 rounds of 200 calls of each kind

Two connections to the same function alternate in one process: the judge's own, and one that is the same but for copy-restore: each value crosses as JSON with its type, as
it did before, and nobody takes note of it. The ratio is that of the medians over rounds; the arguments are made anew for each call, as tests make them. All processes share
one processor: which one the system had put a process on would else be most of the difference.
"""

import argparse
import json
import math
import os
import socket
import statistics
import time

from codetrace.sandbox import candidate_connection
from codetrace.sandbox.candidate_connection import CandidateConnection, serve_requests
from codetrace.sandbox.connection import Connection
from codetrace.sandbox.remote_objects import is_remote
from codetrace.sandbox.shared_state import SharingConnection
from codetrace.sandbox.stand_in_classes import with_temporaries

CODE = """
def f(x):
    return [f(item) for item in x] if isinstance(x, list) else x
"""
MADE = {
    "integer": int,
    "text": str,
    "10 integers": lambda i: list(range(i, i + 10)),
    "100 integers": lambda i: list(range(i, i + 100)),
    "1,000 integers": lambda i: list(range(i, i + 1000)),
    "10 floats": lambda i: [(i + j) / 3 for j in range(10)],
    "10 texts": lambda i: [str(i + j) for j in range(10)],
    "10 lists of 10": lambda i: [list(range(i, i + 10)) for _ in range(10)],
}


def tagged(value):
    "JSON for a value, with its type where JSON has another."
    kind = type(value)
    if kind is str or kind is bool or value is None or (kind is int and -(1 << 63) < value < 1 << 63):
        return value
    if kind is float and math.isfinite(value):
        return ["float", value]
    return ["list", [tagged(item) for item in value]]


def untagged(data):
    "The value that JSON stands for; whoever reads believes nothing."
    if type(data) is not list:
        if type(data) not in (str, bool, int, type(None)):
            raise ValueError("not a value")
        return data
    kind, held = data
    if kind == "float" and type(held) is float:
        return held
    if kind != "list" or type(held) is not list:
        raise ValueError("not a value")
    return [untagged(item) for item in held]


class PlainSending:
    "Values by content, functions by number."

    def send(self, kind, values, names):
        if not self.is_plain:
            return super().send(kind, values, names)
        numbered = [[self.graph.numbers[id(v)]] if is_remote(v) else tagged(v) for v in values]
        return self.send_message(kind, numbered, names, {})


class PlainReading(Connection):
    "Behind the judge's checks of a message, which have nothing to do with copy-restore."

    is_plain = False

    def decode(self, message):
        if not self.is_plain:
            self.is_plain = message["kind"] != "load"
            return super().decode(message)
        target, *values = message["values"]
        if message["kind"] == "call":
            return [self.graph.objects[target[0]], *map(untagged, values)], {}
        return [untagged(target)], {}


class PlainJudge(PlainSending, SharingConnection, PlainReading):
    "A judge without copy-restore."


class PlainCandidate(PlainSending, CandidateConnection, PlainReading):
    "A candidate without copy-restore."


def served(judge_class: type, candidate_class: type):
    "The function of a new process."
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        candidate_connection.CandidateConnection = candidate_class
        try:
            serve_requests(theirs.fileno(), 1 << 23)
        finally:
            os._exit(0)
    theirs.close()
    judge = judge_class(ours.detach(), 1 << 23, print)
    judge.send_message("load", [CODE, "f"], {}, {})
    (function,), _ = judge.decode(judge.receive())
    return function


def seconds(function, make, calls: int) -> float:
    "For so many calls."
    began = time.perf_counter()
    for i in range(calls):
        with_temporaries(function)(make(i))
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--calls", type=int, default=200)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    by_copying = served(SharingConnection, CandidateConnection)
    plain = served(PlainJudge, PlainCandidate)
    ratios = {}
    for name, make in MADE.items():
        assert by_copying(make(3)) == plain(make(3))
        times = {by_copying: [], plain: []}
        for round_number in range(options.rounds):
            for function in (by_copying, plain) if round_number % 2 else (plain, by_copying):
                times[function].append(seconds(function, make, options.calls))
        microseconds = [1e6 * statistics.median(times[function]) / options.calls for function in (plain, by_copying)]
        ratios[name] = round(microseconds[1] / microseconds[0], 2)
        print(
            f"{name:15} plain {microseconds[0]:6.1f} us, copy-restore {microseconds[1]:6.1f} us, {ratios[name]:.2f}",
            flush=True,
        )
    print(json.dumps({"calls": options.calls, "rounds": options.rounds, "ratios": ratios}))


if __name__ == "__main__":
    main()
