"The page in a browser: each tab end to end, offline, for several people, with hostile text and programs."

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlencode

import pytest
from typer.testing import CliRunner

from codetrace.app.page import NoGradio
from codetrace.cli import app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
in_browser = pytest.mark.skipif(
    bool(MISSING),
    reason=f"no {', '.join(MISSING)}: pip install -c constraints.txt -e '.[app,browser]'; apt install chromium",
)
JOBS = 200  # Traces, one after the other
HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"


def test_without_gradio_one_line_says_what_to_install():
    with patch("importlib.util.find_spec", return_value=None):
        done = CliRunner().invoke(app, ["app"], env={"HF_HUB_OFFLINE": None})  # which the command sets
    assert isinstance(done.exception, NoGradio) and "pip install 'codetrace[app]'" in str(done.exception)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def address_of(page) -> str:
    return page.evaluate("location.href")


def wait_for(condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "Address of a page with a few runs, and the process that serves it."
    root = tmp_path_factory.mktemp("page") / "runs"
    environment = os.environ | {"CODETRACE_RUNS": str(root), "CODETRACE_MAX_MEMORY": "1"}
    command = [sys.executable, "-c", "from codetrace.cli import cli_main; cli_main()"]
    for phase in ("latents", "tuning"):
        subprocess.run([*command, "run", phase, "-q"], env=environment, check=True, capture_output=True)
    for number, headline in enumerate([HOSTILE, "accuracy 0.47 [0.42, 0.51] \udcff"]):
        folder = root / "tracking" / f"20260101T00000000{number}Z-aaaaaaa{number}"
        folder.mkdir(parents=True)
        manifest = {"run_id": folder.name, "phase": "tracking", "status": "complete", "headline": headline}
        manifest |= {"started": "2026-01-01T00:00", "parameters": {"seed": number}}
        (folder / "run.json").write_text(json.dumps(manifest))
    port = free_port()
    log = root.parent / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "app", "--model", "tiny:llama", "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(lambda: "the page is at" in log.read_text() or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}/", server
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture
def people(served, browser):
    "Opens pages, each of another person; in the end nobody has seen an error, or a request to another host."
    address, _ = served
    complaints = []
    contexts = []

    def open_page(query: str = ""):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or complaints.append(r.url))
        page.goto(address + query)
        contexts.append(context)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def type_into(page, label: str, text: str) -> None:
    "Replace what stands in a field, key by key."
    page.wait_for_timeout(1000)  # what opens the page fills in the fields
    field = page.get_by_label(label)
    field.click()
    page.keyboard.press("Control+A")
    field.press_sequentially(text)


def watched_cells(page) -> list[str]:
    page.wait_for_selector("#result_watch :text('done:')")
    return page.locator("#result_watch table.watch td").all_inner_texts()


def grid_of(page) -> list[str]:
    page.wait_for_selector("#result_trace :text('done: one program')")
    return page.locator("#result_trace table.grid td").all_inner_texts()


@pytest.mark.slow
@in_browser
def test_records_are_filtered_read_compared_and_taken_away(people):
    page = people("?view=records")
    page.wait_for_selector("#result_records tbody tr")
    assert page.locator("#result_records tbody tr").count() == 4
    assert HOSTILE in page.inner_text("#result_records") and page.title() == "codetrace"
    with page.expect_download() as download:
        page.click("text=Download as CSV")
    assert "accuracy 0.47" in Path(download.value.path()).read_text()
    with page.expect_download() as download:
        page.click("text=Download as JSON")
    taken = json.loads(Path(download.value.path()).read_text())
    assert {m["run_id"] for m in taken} > {f"20260101T00000000{n}Z-aaaaaaa{n}" for n in (0, 1)} and len(taken) == 4
    type_into(page, "Search", "0.47")
    wait_for(lambda: page.locator("#result_records tbody tr").count() == 1)
    wait_for(lambda: "search=0.47" in address_of(page))
    page = people("?" + address_of(page).partition("/?")[2])
    page.wait_for_selector("#result_records tbody a")
    assert page.locator("#result_records tbody tr").count() == 1
    page.locator("#result_records tbody a").click()
    page.wait_for_selector("#result_records h2")
    text = page.inner_text("#result_records")
    assert text.index("accuracy 0.47") < text.index("Parameters") < text.index("Inputs") < text.index("Method and code")
    page.click("#code_records")
    page.wait_for_selector("#snippet_records pre")
    assert "codetrace show 20260101T000000001Z-aaaaaaa1" in page.inner_text("#snippet_records")
    compared = people("?view=records&compare=20260101T000000000Z-aaaaaaa0,20260101T000000001Z-aaaaaaa1")
    compared.wait_for_selector("#result_records :text('What differs')")


@pytest.mark.slow
@in_browser
def test_a_program_is_watched_and_a_cell_opens_a_trace(people):
    page = people()
    watched_cells(page)  # what the page opens with
    assert "First divergence after line" in page.inner_text("#result_watch")
    type_into(page, "Python program", "a = 4\nb = 9\nc = a\n")
    page.get_by_label("Call, such as f(1)").fill("")
    page.click("#show_watch")
    page.wait_for_selector("#result_watch :text('done: 6 answers')")
    cells = watched_cells(page)
    assert [cell.split("\n")[0] for cell in cells if cell] == ["4", "4", "9", "4", "9", "4"]
    assert page.locator("#result_watch td.mistaken").count() == sum("✗" in cell for cell in cells) > 0
    second = people("?" + address_of(page).partition("/?")[2])
    assert watched_cells(second) == cells
    second.click("#code_watch")
    second.wait_for_selector("#snippet_watch pre")
    assert "codetrace watch 'a = 4\nb = 9\nc = a\n' --all --model tiny:llama" in second.inner_text("#snippet_watch")
    second.locator("#result_watch tbody tr").nth(2).locator("td a").last.click()
    assert grid_of(second) and "print(c)" in second.get_by_label("Program (last line").input_value()
    second.go_back()
    assert watched_cells(second) == cells


@pytest.mark.slow
@in_browser
def test_programs_that_fail_loop_or_hold_hostile_text_stay_text(people):
    watched = {
        "while True:\n    n = 1\n": "reached its limit",
        "a = 1\nb = 10 ** 10 ** 10\n": "out of wall or processor time",
        f"a = '<img src=x>'\nraise ValueError({HOSTILE!r})\n": "ValueError",
    }
    for program, reason in watched.items():
        page = people("?" + urlencode({"view": "watch", "program": program, "call": ""}))
        watched_cells(page)
        assert reason in page.inner_text("#result_watch"), program
        assert page.title() == "codetrace" and page.locator("#result_watch img, #result_watch script").count() == 0
    refused = [
        ("program", "a = ", "not Python"),
        ("program", "import os\nos.kill(os.getppid(), 9)\ncount_even = len", "tampering"),
        ("call", "f(", "not Python"),
        ("variables", "zz", "unknown variable"),
        ("style", "shout", "unknown style of the view watch"),
        ("model", "smollm2", "GB"),
    ]
    for name, value, reason in refused:
        page = people("?" + urlencode({"view": "watch", name: value}))
        page.wait_for_selector("[role=alert]")
        assert reason in page.inner_text("[role=alert]"), value
    watched_cells(people("?view=watch"))  # and the next one has its turn


@pytest.mark.slow
@in_browser
def test_a_link_brings_a_trace_back_and_the_keyboard_starts_one(people):
    first = people("?view=trace")
    first.wait_for_selector("#result_trace table.grid")
    type_into(first, "Program (last line", "a = 4\nb = 6\nc = a\nd = 1\n#c:")
    first.locator("#show_trace").focus()
    first.keyboard.press("Enter")
    wait_for(lambda: "c+%3D+a" in address_of(first))
    first.wait_for_selector("#result_trace :text('c = a')")
    cells = grid_of(first)
    assert "no interval" in first.inner_text("#result_trace") and "Controls" in first.inner_text("#result_trace")
    second = people("?" + address_of(first).partition("/?")[2])
    assert grid_of(second) == cells
    second.click("#code_trace")
    second.wait_for_selector("#snippet_trace pre")
    assert "run_sweep" in second.inner_text("#snippet_trace")


@pytest.mark.slow
@in_browser
def test_two_people_one_who_leaves_and_programs_that_do_not_end(people):
    pages = [people("?view=trace") for _ in range(2)]
    leaves = people("?view=trace&positions=all&head_position=final")
    leaves.wait_for_selector("#result_trace .note")
    leaves.close()
    assert grid_of(pages[0]) == grid_of(pages[1])
    loop = "x = 1\nfor i in range(1000000):\n  for j in range(1000000):\n    x = x + 1\n#x:"
    refused = {
        "?" + urlencode({"view": "trace", "program": loop}): "timeout",
        "?view=trace&program=import%20os%0A%23x%3A": "is not run here",
        "?view=trace&model=smollm2": "GB",
        "?view=trace&model=/etc": "unknown model of the view trace",
        "?view=nothing": "unknown view",
    }
    for query, reason in refused.items():
        page = people(query)
        page.wait_for_selector("[role=alert]")
        assert reason in page.inner_text("[role=alert]"), query
    assert grid_of(people("?view=trace"))


@pytest.mark.slow
@in_browser
def test_a_job_is_cancelled_and_the_next_one_has_its_turn(people):
    page = people("?view=trace&positions=all&head_position=final")
    page.wait_for_selector("#result_trace .note")
    page.click("#cancel_trace")
    page.wait_for_selector("#result_trace :text('cancelled')")
    page.wait_for_timeout(3000)
    assert page.inner_text("#result_trace").strip() == "cancelled"  # and nothing came after it
    assert grid_of(people("?view=trace"))


@pytest.mark.slow
@in_browser
def test_a_latent_and_a_push_are_shown(people):
    page = people("?view=latents")
    page.wait_for_selector("#result_latents h2")
    assert "by chance" in page.inner_text("#result_latents") and "made-up data" in page.inner_text("#result_latents")
    page = people("?view=steer")
    page.wait_for_selector("#result_steer a")
    page.locator("#result_steer a").first.click()
    page.wait_for_selector("#result_steer :text('done: one problem')")
    titles = page.locator("#result_steer .columns h3").all_inner_texts()
    assert titles == ["unpushed", "the frozen push", "a random push"]
    verdicts = page.locator("#result_steer .columns strong").all_inner_texts()
    assert len(verdicts) == 3 and set(verdicts) <= {"passed", "failed_assertion"}


@pytest.mark.slow
@in_browser
def test_everybody_can_read_and_use_it(people):
    axe = pytest.importorskip("axe_playwright_python", reason="no axe: pip install -e '.[browser]'")
    source = (Path(axe.__file__).parent / "axe.min.js").read_text()
    for view in ("watch", "trace", "records", "latents", "steer"):
        page = people(f"?view={view}")
        page.wait_for_selector(f"#result_{view} table")
        if view in ("watch", "trace"):
            page.wait_for_selector(f"#result_{view} :text('done:')")
        page.evaluate(source)
        violations = page.evaluate("axe.run()")["violations"]
        assert [(v["id"], v["nodes"][0]["html"]) for v in violations] == [], view


@pytest.mark.slow
@in_browser
def test_memory_stays_where_it_was(served, people):
    import psutil

    _, server = served
    page = people("?view=trace")
    grid_of(page)
    sizes = []
    for number in range(JOBS):
        type_into(page, "Program (last line", f"a = {number % 9}\nc = a\nd = {1000 + number}\n#c:")
        page.click("#show_trace")
        page.wait_for_selector(f"#result_trace :text('d = {1000 + number}')")
        grid_of(page)
        sizes.append(psutil.Process(server.pid).memory_info().rss / 1e6)
    late = sum(sizes[-10:]) / 10
    early = sum(sizes[10:20]) / 10
    print(f"{early:.0f} MB after 20 jobs, {late:.0f} MB after {JOBS}")
    assert late - early < 60, f"{early:.0f} MB after 20 jobs, {late:.0f} MB after {JOBS}"
