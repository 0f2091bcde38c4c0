"""Every notebook in JupyterLab in a real browser, top to bottom, the explorer, and the book (`make test-browser`).

Headless Chromium, the one that is installed (Debian's package, or CHROMIUM=/path/to/it), driven by Playwright. The notebooks run
in a copy at smoke size, in the order of the chain, for each needs what the earlier ones wrote; the committed ones stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from elva_core import files
from elva_core.experiments import chain

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
MINUTES = 15  # that a notebook may take; on two quiet cores the slowest takes one
RUN = "outputs/smoke/seed-17"
PARTS = ("elva_core", "notebooks", "params", "outputs/backbone", "pyproject.toml")
# resolves when the last cell has ended, or the first one has failed; rejects where the kernel died
RUN_ALL = """async minutes => {
    const app = window.jupyterapp, late = new Promise((_, fail) => setTimeout(() => fail(new Error("no end")), minutes * 60000));
    await app.shell.currentWidget.sessionContext.ready;
    await Promise.race([app.commands.execute("notebook:run-all-cells"), late]);
    return JSON.stringify(app.shell.currentWidget.content.model.toJSON());
}"""
IS_OPEN = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus === 'connected'"
IS_IDLE = "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'"
CELL = "() => (({activeCellIndex, widgets}) => [activeCellIndex, widgets.length])(window.jupyterapp.shell.currentWidget.content)"
TOO_WIDE = """() => [...document.querySelectorAll("html, .elva, .elva *")]
    .filter(e => e.clientWidth && !e.closest("select") && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 200))"""
SCROLL = "index => window.jupyterapp.shell.currentWidget.content.scrollToItem(index, 'start')"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab of our own, started as `make lab` does; the token it asks for; and the copy it runs on."""
    folder, token = tmp_path_factory.mktemp("workbook"), secrets.token_hex(16)
    for name in PARTS:
        source = files.REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "scratch"))
        else:
            shutil.copy(source, folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*as_make_starts_it(), "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", "--expose-app-in-browser"]
    command += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # no network
    own = {name: str(folder / "jupyter" / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    environment = {**os.environ, **chain.KERNEL_ENVIRONMENT, **own, "PYTHONPATH": str(folder), "TQDM_DISABLE": "1"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, server, folder / "server.log")
        yield address, token, folder
    finally:
        server.terminate()
        server.wait(60)


def as_make_starts_it() -> list[str]:
    """The command of `make lab`, with the programs of this environment."""
    make = ["make", "--dry-run", "--old-file=.venv/ready", "lab", f"BIN={Path(sys.executable).parent}"]
    lines = subprocess.run(make, cwd=files.REPOSITORY, capture_output=True, text=True, check=True).stdout
    return shlex.split(next(line for line in lines.splitlines() if "jupyter lab" in line))


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/api", timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()[-2000:]}"
            time.sleep(0.5)
    pytest.fail(f"JupyterLab does not answer:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail("no Chromium found; `make test-browser` installs Debian's, CHROMIUM=/path names another")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox refuses to run as root, as in most containers
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, lab):
    """A page that is signed in; every kernel it started is shut down with it."""
    address, token, _ = lab
    context = browser.new_context(
        viewport={"width": 1400, "height": 1000}, base_url=address, extra_http_headers={"Authorization": f"token {token}"}
    )
    context.set_default_timeout(120_000)
    opened = context.new_page()
    opened.goto(f"/lab?token={token}&reset")
    yield opened
    for session in context.request.get("/api/sessions").json():
        context.request.delete(f"/api/sessions/{session['id']}", headers={"Authorization": f"token {token}"})
    context.close()


def ran(page, stage: str) -> dict:
    """A notebook that was opened and run from top to bottom."""
    page.goto(f"/lab/tree/{stage}.ipynb?reset")
    page.wait_for_function(IS_OPEN)
    return json.loads(page.evaluate(RUN_ALL, MINUTES))


@pytest.mark.parametrize("stage", chain.STAGES)
def test_a_notebook_runs_from_top_to_bottom(page, lab, stage, tmp_path):
    notebook = ran(page, stage)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    errors = [
        f"{''.join(cell['source'])}\n{out['ename']}: {out['evalue']}"
        for cell in code
        for out in cell["outputs"]
        if out["output_type"] == "error"
    ]
    assert not errors, errors[0]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert page.get_by_text("Error displaying widget").count() == 0
    files.write_whole(lab[2] / RUN / f"executed/{stage}.ipynb", json.dumps(notebook))
    places = [i for i, cell in enumerate(notebook["cells"]) if "explorer.Explorer(" in "".join(cell["source"])]
    for place in places:
        the_explorer_fits(page, place, tmp_path)
        the_explorer_answers_a_click(page)
        the_explorer_is_used_by_keyboard(page)


def the_explorer_fits(page, place: int, folder: Path) -> None:
    """Two queries side by side or one below the other, as there is room; every answer with its picture, what is wrong is marked."""
    from playwright.sync_api import expect

    columns, pictures = page.locator(".elva-column"), page.locator(".elva li img")
    for width, side_by_side in ((1280, True), (800, False)):
        page.set_viewport_size({"width": width, "height": 1600})
        page.evaluate(SCROLL, place)
        expect(page.locator(".elva ol")).to_have_count(4)  # two queries, two models
        left, right = (columns.nth(i).bounding_box() for i in range(2))
        assert (left["y"] == right["y"], left["x"] < right["x"]) == (side_by_side, side_by_side)
        assert page.evaluate(TOO_WIDE) == []
        page.screenshot(path=folder / f"explorer_{width}.png")
    widths = pictures.evaluate_all("all => all.map(picture => picture.naturalWidth)")
    assert len(widths) == 20 and min(widths) > 0
    assert page.locator(".elva li").filter(has_text="✗").locator("del").count() > 0


def the_explorer_answers_a_click(page) -> None:
    """In one column grain after grain is unticked and the rankings change, not the other's; ticked again, they are as before."""
    from playwright.sync_api import expect

    left, right = (page.locator(".elva-column").nth(i) for i in range(2))
    boxes, panels, read = left.locator("input[type=checkbox]:enabled"), left.locator("ol"), left.get_by_text("Query as read: ")
    first, before, other = read.inner_text(), panels.all_inner_texts(), right.inner_text()
    assert boxes.count() >= 2
    for box in boxes.all():
        earlier = read.inner_text()
        box.uncheck()
        expect(read).not_to_have_text(earlier, use_inner_text=True)
    for place in range(2):
        expect(panels.nth(place)).not_to_have_text(before[place], use_inner_text=True)
    page.wait_for_function(IS_IDLE)
    assert right.inner_text() == other
    for box in boxes.all():
        box.check()
    expect(read).to_have_text(first, use_inner_text=True)
    for place in range(2):
        expect(panels.nth(place)).to_have_text(before[place], use_inner_text=True)


def the_explorer_is_used_by_keyboard(page) -> None:
    """An arrow key chooses, Enter searches, Space unticks, Tab goes from one to the next; no key is a command of JupyterLab."""
    from playwright.sync_api import expect

    column, before = page.locator(".elva-column").first, page.evaluate(CELL)
    read = column.get_by_text("Query as read: ")
    column.locator("select").first.focus()
    for keys in (["Tab", "ArrowDown"], ["Tab", *"woman running", "Enter"], ["Tab", "Space"]):
        earlier = read.inner_text()
        for key in keys:
            page.keyboard.press(key)
        expect(read).not_to_have_text(earlier, use_inner_text=True)
    expect(read).to_have_text(re.compile(r"[.?] Running\.$"))
    for key in "dd":
        page.keyboard.press(key)
    page.wait_for_function(IS_IDLE)
    assert page.evaluate(CELL) == before


def test_the_book_of_these_notebooks_is_read_and_searched_without_a_server(browser, lab):
    from playwright.sync_api import expect

    folder = lab[2]
    made = [sys.executable, "-m", "elva_core", "book", "smoke"]
    subprocess.run(made, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, check=True)
    page, outside = browser.new_page(viewport={"width": 1280, "height": 1000}), []
    page.on("request", lambda request: outside.append(request.url) if request.url.startswith("http") else None)
    for stage in (*chain.STAGES, "report"):
        page.goto((folder / RUN / "book/index.html").as_uri())
        page.locator(f"article a[href='{stage}.html']").click()
        page.wait_for_url(f"**/{stage}.html")
        expect(page.locator("h1")).to_have_count(1)
        page.locator("img").evaluate_all("all => Promise.all(all.map(image => image.decode()))")  # fails on one that is not there
    page.locator("input[name=q]").fill("grain")
    page.keyboard.press("Enter")
    page.locator("#search-results li").first.wait_for()
    assert not outside
    page.close()
