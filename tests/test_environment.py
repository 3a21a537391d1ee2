"""pip, conda and the README tell the same story."""

import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PINS = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split() if "==" in line)


def test_conda_takes_everything_but_python_from_the_pip_list():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda, pip = [d for d in dependencies if isinstance(d, str)], [d for d in dependencies if isinstance(d, dict)]
    assert {re.split("[=<>]", name)[0] for name in conda} == {"python", "pip"}
    assert pip == [{"pip": ["-r requirements.txt", "-e ."]}]


def test_every_requirement_is_pinned_exactly():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(PINS)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]+==[0-9.]+", line) for line in lines)


def test_the_package_needs_nothing_that_is_not_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["dev"][0] == "tdq-utils[lab,show,notebooks,onnx]"
    asked = [
        *project["dependencies"],
        *extras["dev"][1:],
        *(d for name in ("lab", "show", "notebooks", "onnx") for d in extras[name]),
    ]
    names = {re.split("[><=]", d)[0] for d in asked}
    assert names == set(PINS) | {"jinja2"}  # which notebooks bring, too
    assert "torchvision" not in names


@pytest.mark.parametrize("name", sorted(PINS))
def test_the_pinned_version_is_installed(name):
    assert version(name).split("+")[0] == PINS[name]


def test_the_readme_names_real_make_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"`?make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "data").rglob("*.md")), ids=lambda page: page.parent.name
)
def test_links_between_the_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_data_stays_within_its_budget():
    assert sum(p.stat().st_size for p in (ROOT / "data").rglob("*") if p.is_file()) <= 15 * 2**20


def test_data_checksums_match_the_readme():
    import hashlib

    text = (ROOT / "data" / "README.md").read_text()
    listed = {path: digest for digest, path in re.findall(r"^([0-9a-f]{64})  (\S+)$", text, flags=re.M)}
    binary = {".gz", ".xz", ".safetensors", ".npz"}
    present = {str(p.relative_to(ROOT / "data")) for p in (ROOT / "data").rglob("*") if p.suffix in binary}
    assert set(listed) == present
    for path, digest in listed.items():
        assert hashlib.sha256((ROOT / "data" / path).read_bytes()).hexdigest() == digest, path


def test_continuous_integration_runs_one_script():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"] and os.access(ROOT / ".ci" / "run", os.X_OK)


def test_hooks_before_a_commit_are_local():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert {hook["id"]: hook["language"] for hook in repo["hooks"]} == dict.fromkeys(
        ["ruff", "ruff-format", "notebooks"], "system"
    )


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"]["text"])
    assert project["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_what_contributors_are_told_to_edit_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:tdq_utils|tests|notebooks|data)/[\w/.]+)`", text)
    assert len(named) > 10 and [path for path in named if not (ROOT / path).exists() and "LESSON" not in path] == []
    for place, name in re.findall(r"`([A-Z]+)`[^`]*`(tdq_utils/[\w/]+\.py)`", text):
        assert re.search(rf"^{place}\b", (ROOT / name).read_text(), flags=re.M), (place, name)
