"The page in a browser: each tab end to end, offline, for several people, with hostile text and programs."

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from codetrace.app.page import NoGradio
from codetrace.cli import app
from codetrace.core.files import write_json

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
HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"


def test_without_gradio_one_line_says_what_to_install():
    with patch("importlib.util.find_spec", return_value=None):
        done = CliRunner().invoke(app, ["app"])
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
    for number, headline in enumerate([HOSTILE, "accuracy 0.47 [0.42, 0.51]"]):
        folder = root / "tracking" / f"20260101T00000000{number}Z-aaaaaaa{number}"
        folder.mkdir(parents=True)
        manifest = {"run_id": folder.name, "phase": "tracking", "status": "complete", "headline": headline}
        write_json(folder / "run.json", manifest | {"started": "2026-01-01T00:00", "parameters": {"seed": number}})
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
    type_into(page, "Search", "0.47")
    wait_for(lambda: page.locator("#result_records tbody tr").count() == 1)
    wait_for(lambda: "search=0.47" in address_of(page))
    page.reload()
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
