"""How many small faults in the package its own tests see: a sample, each judged in a copy of the tree."""

import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from torture.mutants import Mutant, sample

ROOT = Path(__file__).parents[2]
COPIED = ("lightning_plasticity", "tests", "examples", "docs", "pyproject.toml", "README.md", "CONTRIBUTING.md")
CONTRACT = [f"tests/contract/test_{name}.py" for name in ("loops", "steps", "resume", "statistics")]
SOME_METHODS = ("ContinualBackprop", "L2Init", "NoisyUnits", "SelectiveReinit", "SoftWeightRescaling")
SETTINGS = ["tests/test_checks.py", "tests/test_defaults.py"]
MEASURES = ("metrics", "monitoring")  # of which the contract of methods asks nothing
BROKEN = 99  # what a process ends with that could not run pytest
LIMIT = 1800  # seconds for a stage: a fault that makes tests hang is seen
# On a busy machine a test may take long, which is no sign of a fault.
OPTIONS = ("-W", "ignore::pytest.PytestAssertRewriteWarning", "-o", f"timeout={LIMIT}")
# Imported once, before the processes that judge are forked: this takes longer than many a test.
IMPORTED = ("hypothesis", "torch", "lightning.pytorch", "pytorch_lightning", "torchmetrics", "scipy.stats")


def stages(file: str) -> list[list[str]]:
    """The tests of a file, those of its room and of the methods that import it, then what every method must hold.

    What nobody has seen by then is judged by all of the contract, with its many ranks.
    """
    room, name = os.path.split(file)
    stem = name.removesuffix(".py")
    own = [*(ROOT / "tests").glob(f"*/test_{stem}.py"), *(ROOT / "tests").glob(f"test_{stem}.py")]
    found = [[f"lightning_plasticity/{file}", *sorted(path.relative_to(ROOT).as_posix() for path in own)]]
    is_method = (ROOT / "lightning_plasticity" / "callbacks" / name).exists() and stem != "monitor"
    if room and not is_method:
        found.append(of_room(room))
    if tests := [*of_users(file)]:
        found.append(tests)
    if room in MEASURES:
        monitors = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("c*/test_monitor*.py"))
        return [*found, monitors, ["tests/faults/test_measures.py", *SETTINGS]]
    # A method's class has the file's name; what serves all methods is asked of some.
    methods = ["-k", stem.replace("_", "") if is_method else " or ".join(SOME_METHODS)]
    return [*found, [*CONTRACT, *methods], ["tests/faults", *methods], SETTINGS, ["tests/contract"]]


def of_room(room: str) -> list[str]:
    """The tests of a room; where it has none of its own, those of the rooms that import it."""
    if (ROOT / "tests" / room).is_dir():
        return [f"tests/{room}"]
    package, name = ROOT / "lightning_plasticity", f"lightning_plasticity.{room}"
    rooms = {path.parent.name for path in package.glob("*/*.py") if f"from {name}" in path.read_text()}
    return [f"tests/{other}" for other in sorted(rooms - {room, "callbacks"}) if (ROOT / "tests" / other).is_dir()]


def of_users(file: str) -> Iterator[str]:
    """The tests of the callbacks that import a file."""
    name = f"lightning_plasticity.{file.removesuffix('.py').replace(os.sep, '.')} import"
    for path in sorted((ROOT / "lightning_plasticity" / "callbacks").glob("*.py")):
        tests = f"tests/callbacks/test_{path.name}"
        if name in path.read_text() and (ROOT / tests).exists():
            yield tests


def judged(mutant: Mutant) -> str:
    """The test that sees a fault; empty if none does."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, tree / name)
        target = tree / "lightning_plasticity" / mutant.file
        target.write_bytes(mutant.of(target.read_bytes()))
        return next(filter(None, (first_failure(tree, tests) for tests in stages(mutant.file))), "")


def first_failure(tree: Path, tests: Sequence[str]) -> str:
    """The name of the first test that fails in a tree; empty if all pass."""
    output = tree / "output.txt"
    child = os.fork()
    if child == 0:
        run_tests(tree, tests, output)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "tests that did not end"
    code = os.waitstatus_to_exitcode(status)
    said = output.read_text(errors="replace")
    if code == BROKEN:
        raise SystemExit(said)
    if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return found[1] if found else f"pytest, which ended with {code}"


def run_tests(tree: Path, tests: Sequence[str], output: Path) -> None:
    """In a process of its own: pytest in a tree, up to the first failure."""
    os.setpgid(0, 0)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests"))]
    os.environ["PYTHONPATH"] = str(tree)
    for name in [name for name in sys.modules if name.split(".")[0] in ("torture", "lightning_plasticity")]:
        del sys.modules[name]
    code = BROKEN
    try:
        code = int(pytest.main(["-x", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider", *OPTIONS, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(count: int, seed: int = 0) -> str:
    """Judges so many faults, and says so in Markdown."""
    for name in IMPORTED:
        __import__(name)
    verdicts = []
    for mutant in sample(count, seed):
        seen = judged(mutant)
        verdicts.append((mutant, seen))
        print(f"{mutant.file}:{mutant.line}: `{mutant.before}` -> `{mutant.after}`: {seen or 'NOT SEEN'}", flush=True)
    survivors = [mutant for mutant, seen in verdicts if not seen]
    lines = [
        f"{count} small faults, drawn with a fixed seed from all places of the package, put in one at a time and",
        "judged by the tests of the file, of its room, `tests/faults`, and the contract.",
        "",
        f"- seen: {count - len(survivors)} of {count}",
        *(f"- not seen: `{m.file}`, line {m.line}: `{m.before}` became `{m.after}`" for m in survivors),
    ]
    return "\n".join(lines)
