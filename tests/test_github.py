"""The workflow of CI, the forms of issues, and the citation agree with the project."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[0-9]*.yml"))


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text("utf-8"))


def test_the_workflow_of_ci_runs_its_script_with_every_python():
    workflow = read(ROOT / ".github" / "workflows" / "ci.yml")
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as True
    steps = workflow["jobs"]["run"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    (pythons,) = (step["with"]["python-version"] for step in steps if "with" in step)
    assert set(pythons.split()) == set(re.findall(r":: (3\.\d+)", str(PROJECT["classifiers"])))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_asks_for_the_versions_and_for_the_way_to_see_it(form):
    fields = {field["id"]: field for field in read(form)["body"]}
    assert len(fields) == len(read(form)["body"])
    assert "versions" in fields
    assert {"script", "message"} & set(fields)
    assert all(field["attributes"]["label"] for field in fields.values())


def test_the_citation_is_of_this_project():
    citation = read(ROOT / "CITATION.cff")
    assert citation["title"].startswith(f"{PROJECT['name']}: ")
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
