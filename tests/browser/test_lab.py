"""JupyterLab itself, with a kernel: a lesson's kind of slider panel runs, and moves its picture."""

import os
import socket
import subprocess
import sys
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

PANEL = """import matplotlib.pyplot as plt
from tdq_utils.show import widgets
widgets.frames(lambda t: plt.figure(figsize=(1 + t, 1)), [1, 2, 3])"""


@pytest.fixture
def lab(tmp_path):
    """The address of a server of our own, over a folder with one notebook."""
    nbformat.write(new_notebook(cells=[new_code_cell(PANEL)], metadata={"kernelspec": {"name": "python3", "display_name": "p",
                   "language": "python"}}), tmp_path / "panel.ipynb")  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = {name: str(tmp_path / "home") for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    options = ["--no-browser", "--allow-root", f"--port={port}", "--port-retries=0", "--IdentityProvider.token=t",
               f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", *options]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | home, stdout=log, stderr=log)
        try:
            for _ in range(240):
                if server.poll() is not None:
                    pytest.fail((tmp_path / "log").read_text()[-2000:])
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.25)
            yield f"http://127.0.0.1:{port}/lab/tree/panel.ipynb?token=t"
        finally:
            server.terminate()
            server.wait(20)


def test_a_slider_moves_in_jupyterlab(chromium, lab):
    page = chromium.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(lab)
    page.locator(".jp-Cell .cm-content").first.click(timeout=60_000)
    page.keyboard.press("Shift+Enter")
    knob = page.locator(".jp-OutputArea [role=slider]").first
    knob.wait_for(timeout=90_000)
    shown = "[...document.querySelectorAll('.jp-OutputArea img')].filter(i => i.offsetParent).map(i => i.src).join()"
    page.wait_for_function(f"{shown}.length > 0")
    before = page.evaluate(shown)
    knob.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"{shown} !== {before!r}")
    page.close()
    here = lab.partition("/lab")[0].removeprefix("http")
    assert all(url.startswith(("data:", "blob:", f"http{here}", f"ws{here}")) for url in asked)
