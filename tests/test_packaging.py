"""The files around the code agree with each other and with the tree."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version():
    """The changelog's first heading, the citation and the project have the same."""
    newest = re.search(r"^## \[([^]]+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert newest[1] == PROJECT["version"]
    assert yaml.safe_load(read("CITATION.cff"))["version"] == PROJECT["version"]


def test_the_workflow_runs_what_is_declared():
    job = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]
    declared = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if ":: 3." in name]
    assert job["strategy"]["matrix"]["python-version"] == declared
    assert {"run": ".ci/run"} in job["steps"]


def test_contributing_is_one_page_about_files_that_exist():
    text = read("CONTRIBUTING.md")
    assert len(text.splitlines()) <= 90
    paths = re.findall(r"`((?:\w[\w.-]*/)+[\w.-]*\w|\w+\.md|\.ci/run)`", text)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
