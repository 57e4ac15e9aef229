"""Every model and data set that an experiment names stands in the SBOM, with its license and the
packages' sha256."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from prep.licenses import (
    NOT_DECLARED,
    component,
    license_of,
    listed,
    named_by_experiments,
    with_said_license,
)
from tests.conftest import ROOT


def test_models_and_data_carry_licenses_and_hashes(workplace):
    shipped = subprocess.run(
        ["git", "ls-files", "experiments"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for path in shipped.split():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, path)
    os.symlink(ROOT / "llamafactory_configs", "llamafactory_configs")
    found = {of["name"]: of for of in named_by_experiments()}
    assert NOT_DECLARED not in {license_of(of) for of in found.values()}
    models = {name for name, of in found.items() if of["type"] == "machine-learning-model"}
    assert {"hf:Qwen/Qwen3-0.6B", "all-mpnet-base-v2.zip/all-mpnet-base-v2"} <= models and len(
        found
    ) - len(models) >= 7
    mpnet = Path("experiments/models/mpnet_base.yaml").read_text()
    assert (
        len(found["all-mpnet-base-v2.zip/all-mpnet-base-v2"]["hashes"])
        == mpnet.count("#sha256=")
        == 6
    )
    assert all(of.get("hashes") for name, of in found.items() if name.startswith("pypi:"))
    assert all(
        of.get("version") for name, of in found.items() if name.startswith("hf:")
    )  # a revision


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (
            [
                {"license": {"id": "MIT"}},
                {"license": {"name": "License :: OSI Approved :: MIT License"}},
            ],
            "MIT",
        ),
        ([{"license": {"name": "License :: OSI Approved :: BSD License"}}], "BSD License"),
        ([{"expression": "Apache-2.0 OR MIT"}], "Apache-2.0 OR MIT"),
        ([], NOT_DECLARED),
    ],
)
def test_a_license_is_called_by_its_spdx_name_where_it_has_one(said, name):
    assert license_of({"name": "a", "licenses": said}) == name


def test_those_without_a_license_stand_at_the_end():
    parts = [
        component("data", "pypi:b==1/x#sha256=" + "0" * 64, None),
        component("data", "hf:a@1", "MIT"),
    ]
    assert [line for line in listed("all", parts) if line.startswith("-")] == [
        "- **MIT** (1): hf:a 1",
        "- **not declared** (1): pypi:b==1/x",
    ]


def test_a_license_in_free_text_is_read_from_the_metadata(tmp_path):
    packages = tmp_path / "lib/python3.11/site-packages"
    for name, line in (("said", "License: Apache 2.0 License\n"), ("unsaid", "")):
        (packages / f"{name}-1.0.dist-info").mkdir(parents=True)
        (packages / f"{name}-1.0.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{line}"
        )
    found = [
        license_of(with_said_license({"name": name, "version": "1.0"}, tmp_path))
        for name in ("said", "unsaid")
    ]
    assert found == ["Apache 2.0 License", NOT_DECLARED]
