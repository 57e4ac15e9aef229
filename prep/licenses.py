"""What the product is made of, with licenses: packages of the environments, models, data; an SBOM
(CycloneDX) of each.

    python -m prep.licenses

sbom/train.cdx.json holds .venv's packages and the models and data that the experiments name,
sbom/serve.cdx.json and sbom/ray.cdx.json those of .venv-serve and .venv-ray where they are built;
sbom/LICENSES.md lists all by license. cyclonedx-py, in an environment of its own, reads the
packages and checks what is written against CycloneDX's schema.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from letterhead.config.experiment import load_experiment
from letterhead.config.models import Model, Parts, is_fetched
from letterhead.files import LetterheadError, atomic_open, write_json
from letterhead.runs.stage import telling
from prep.shape import QWEN_VOCABULARY

FOLDER = Path("sbom")
TOOLS = Path(".venv-sbom/bin")
ENVIRONMENTS = {"train": Path(".venv"), "serve": Path(".venv-serve"), "ray": Path(".venv-ray")}
NOT_DECLARED = "not declared"
# Exit code 1, and what is wrong, where it is given something that is not CycloneDX.
VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
sys.exit(str(JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read()) or "") or 0)
"""
SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT"}  # as hubs write them, and as SPDX does


def main() -> None:
    """Write the SBOMs and the list, and print how many packages have which license.

    Raises
    ------
    LetterheadError : an environment can't be read, or what was made is not CycloneDX
    """
    lines = []
    for name, environment in ENVIRONMENTS.items():
        path = FOLDER / f"{name}.cdx.json"
        if not list(environment.glob(".ready-*")):
            path.unlink(missing_ok=True)
            print(f"{environment} is not built: not listed")
            continue
        bom = json.loads(
            call("cyclonedx-py", "environment", environment / "bin/python", "--output-reproducible")
        )
        # .venv-ray sees the packages of .venv, of which some are in both.
        once = {part["bom-ref"]: part for part in bom["components"]}
        packages = [with_said_license(part, environment) for part in once.values()]
        groups = {f"packages of {environment}": packages}
        if name == "train":
            groups["models and data"] = list(named_by_experiments())
        bom["components"] = [part for components in groups.values() for part in components]
        call("python", "-c", VALIDATE, stdin=json.dumps(bom))
        write_json(path, bom)
        print(f"{path}: {len(bom['components'])} components")
        lines += [
            line for title, components in groups.items() for line in listed(title, components)
        ]
    with atomic_open(FOLDER / "LICENSES.md") as file:
        file.write("\n".join(lines))
    print("\n".join(lines))


def call(program: str, *arguments: Any, stdin: str = "") -> str:
    """Run one of the SBOM environment's programs; gives what it writes.

    Raises
    ------
    LetterheadError : it is not there, or it failed; its own last line says why
    """
    if not (TOOLS / program).exists():
        raise LetterheadError(f"{TOOLS / program}: not there; run: make licenses")
    finished = subprocess.run(
        [TOOLS / program, *map(str, arguments)], input=stdin, capture_output=True, text=True
    )
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LetterheadError(
            f"{program}: no SBOM ({reason}); remove .venv-sbom, and run: make licenses"
        )
    return finished.stdout


def with_said_license(component: dict, environment: Path) -> dict:
    """A package with the license that its metadata say in free text, of which cyclonedx-py knows
    nothing."""
    if component.get("licenses"):
        return component
    folders = [str(part) for part in environment.glob("lib/python*/site-packages")]
    for package in metadata.distributions(name=component["name"], path=folders):
        if license_name := (package.metadata.get("License") or "").strip().splitlines():
            return component | {"licenses": [{"license": {"name": license_name[0]}}]}
    return component


def license_of(component: dict) -> str:
    """What a component declares, by SPDX's names where it uses them."""
    license_name = [
        part.get("expression") or part["license"].get("id") or part["license"]["name"]
        for part in component.get("licenses", [])
    ]
    known = [part for part in license_name if not part.startswith("License :: ")]
    return (
        " / ".join(sorted(set(known or [part.rpartition(" :: ")[2] for part in license_name])))
        or NOT_DECLARED
    )


def listed(title: str, components: list[dict]) -> list[str]:
    """Markdown: the components by license, those that declare none at the end."""
    by: dict[str, list[str]] = {}
    for part in components:
        by.setdefault(license_of(part), []).append(
            " ".join(filter(None, [part["name"], part.get("version")]))
        )
    lines = [f"## {title} ({len(components)})", ""]
    for license_name, names in sorted(
        by.items(), key=lambda item: (item[0] == NOT_DECLARED, -len(item[1]), item[0])
    ):
        lines.append(
            f"- **{license_name}** ({len(names)}): {', '.join(sorted(names, key=str.lower))}"
        )
    return [*lines, ""]


def named_by_experiments() -> Iterator[dict]:
    """A component for each model and data set that the experiments name, and Qwen's vocabulary,
    once each, with its license and the packages' sha256."""
    yield component("data", QWEN_VOCABULARY, "Apache 2.0")
    seen = set()
    for path in sorted(Path("experiments").glob("*.yaml")):
        experiment = load_experiment(path.stem)
        for kind, source, license_name in (
            ("machine-learning-model", experiment.decoder.model, experiment.decoder.license),
            ("machine-learning-model", experiment.encoder.model, experiment.encoder.license),
            ("data", experiment.data.source, experiment.data.license),
        ):
            ours = kind != "data" and not is_fetched(source)
            if not ours and (key := str(source)) not in seen:
                seen.add(key)
                yield component(kind, source, license_name)


def component(kind: str, source: Model, license_name: str | None) -> dict:
    """A model or data set as CycloneDX describes one; `source` as an experiment names it."""
    parts = [*source.parts, source.whole] if isinstance(source, Parts) else [source]
    name, _, revision = (
        (source.whole if isinstance(source, Parts) else source).partition("#")[0].partition("@")
    )
    hashes = [
        {"alg": "SHA-256", "content": part}
        for part in parts
        for part in re.findall(r"#sha256=([0-9a-f]{64})", part)
    ]
    entry: dict[str, Any] = {"type": kind, "bom-ref": f"{kind}:{name}", "name": name}
    if revision:
        entry["version"] = revision
    if hashes:
        entry["hashes"] = hashes
    if license_name:
        entry["licenses"] = [
            {
                "license": {"id": SPDX[license_name]}
                if license_name in SPDX
                else {"name": license_name}
            }
        ]
    return entry


if __name__ == "__main__":
    with telling():
        main()
