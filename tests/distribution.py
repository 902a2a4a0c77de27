"""What `make dist` has built is looked at, and the wheel is tried in an environment that has nothing else.

    python tests/distribution.py dist

It holds the files and the metadata to what they must be, installs the wheel without extras into a fresh environment
(PyTorch is large: some minutes and gigabytes, which are removed again) and runs the uses of the README there.
"""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("lightning_plasticity/**/*.py")}
IN_SOURCE = ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "Makefile", "pyproject.toml")


def check_wheel(path: Path) -> None:
    """All of the package is in it, and nothing else; the metadata say what a package index shows."""
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        said = email.message_from_bytes(wheel.read(metadata))
    info = metadata.removesuffix("METADATA")
    files = {f"{info}{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    _equal("files of the wheel", names, PACKAGE | {"lightning_plasticity/py.typed"} | files)
    for key, value in {
        "Name": "lightning-plasticity",
        "License-Expression": "Apache-2.0",
        "Requires-Python": ">=3.10",
        "Description-Content-Type": "text/markdown",
    }.items():
        _equal(key, said[key], value)
    required = {line.split(">")[0] for line in said.get_all("Requires-Dist", []) if "extra ==" not in line}
    _equal("what it requires", required, {"torch", "lightning", "torchmetrics"})
    assert said["Summary"], "the wheel has no summary"
    _equal("the description", str(said.get_payload()).strip(), (ROOT / "README.md").read_text().strip())


def check_source(path: Path) -> None:
    """The package, its tests, pages and examples are in it, and nothing that git ignores."""
    with tarfile.open(path) as source:
        names = {name.split("/", 1)[1] for name in source.getnames() if "/" in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    _equal("files that git does not have", names - {*tracked, "PKG-INFO"}, set())
    _equal("missing files of the package", (PACKAGE | {*IN_SOURCE}) - names, set())
    for folder in ("tests", "docs", "examples"):
        assert any(name.startswith(f"{folder}/") for name in names), f"the source distribution has no {folder}"


def _equal(what: str, got: object, must_be: object) -> None:
    if got != must_be:
        difference = got ^ must_be if isinstance(got, set) and isinstance(must_be, set) else got
        raise SystemExit(f"{what} must be {must_be if difference is got else 'others'}, differing: {difference}")


def try_wheel(path: Path) -> None:
    """Installs it without extras where nothing is installed, and runs the uses of the README."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-input", str(path)], check=True)
        subprocess.run([python, "-m", "pip", "check"], check=True)
        # Isolated, so that it is the installed package that is imported, and not the one in this folder.
        program = [python, "-I", str(ROOT / "tests" / "readme_uses.py"), str(ROOT / "README.md")]
        out = subprocess.run(program, cwd=folder, check=True, capture_output=True, text=True).stdout
    last = out.strip().splitlines()[-1]
    assert folder in last, f"the package in the environment must be the one that runs, got: {last}"
    print(last)


def main() -> None:
    [wheel], [source] = (list(Path(sys.argv[1]).glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    check_wheel(wheel)
    check_source(source)
    print(f"{wheel.name} and {source.name} hold what they must.")
    try_wheel(wheel)


if __name__ == "__main__":
    main()
