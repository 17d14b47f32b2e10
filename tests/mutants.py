"""Measure which faults the tests catch: change one expression or statement of a copy of the repository, and run the tests of its module.

A seed draws the mutants. The test files of a mutant are those named after its module or folder, then those with a test named after it or
that import it, directly or through other modules; short files first, up to a minute in all. A mutant that survives them meets more files,
up to four minutes. A test that fails must pass without the change, else the mutant counts as `unclear`.
`tests/mutants.json` lists accepted survivors with their reason.
"""

import argparse
import ast
import contextlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain, zip_longest
from pathlib import Path

from mutations import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("augment", "models", "pipeline", "serve", "refract")
# Seconds of tests for each mutant, and for one that survives these, by tests/durations.json.
SECONDS, SURVIVOR_SECONDS = 60, 240
# A change may cause an endless loop: the tests of a mutant stop after 5 times their usual seconds, plus time for the imports.
SLOW_FACTOR, START_SECONDS = 5, 120


def draw(packages: list[str], count: int, seed: int) -> list[Mutant]:
    """Draw mutants from the packages in turn. A larger count extends the sample of a smaller one."""
    drawn = []
    for package in packages:
        mutants = [mutant for file in sources(package) for mutant in mutants_of(file, (ROOT / file).read_text("utf-8"))]
        drawn.append(random.Random(f"{seed} {package}").sample(mutants, min(count, len(mutants))))
    return [mutant for mutant in chain.from_iterable(zip_longest(*drawn)) if mutant][:count]


def sources(package: str) -> list[str]:
    paths = (ROOT / package).glob("*.py" if package == "refract" else "**/*.py")  # refract/ links the other packages
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def module_name(file: str) -> str:
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.split(".")[0] == "refract" else f"refract.{name}"


def imports(file: str) -> set[str]:
    """Return the names that a file imports, and the modules of Refract that it names in strings."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
            case ast.Constant(value=str() as text) if text.startswith("refract."):
                names.add(text)
    return names


class TestFiles:
    """The test files of a module: those with its name, then by the number of imports to it (1 for a test's name), then by their seconds."""

    def __init__(self) -> None:
        self.tests = [
            str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/*/test_*.py")) if path.parent.name != "gpu"
        ]
        self.seconds: dict[str, float] = json.loads((ROOT / "tests/durations.json").read_text("utf-8"))
        modules = {module_name(file): file for package in PACKAGES for file in sources(package)}
        # A package may import its modules by name.
        self.importers = {name: {name.rpartition(".")[0]} for name in modules}
        for name, file in [*modules.items(), *zip(self.tests, self.tests, strict=True)]:
            for imported in imports(file) & modules.keys():
                self.importers[imported].add(name)

    def of(self, file: str, seconds: float = SECONDS) -> list[str]:
        package, *folders = Path(file).with_suffix("").parts
        named = tuple(f"test_{package}_{name}_" for name in folders[-2:])  # the module, and the folder that it is in
        distances = {test: 0 for test in self.tests if f"{Path(test).stem}_".startswith(named)}
        test_name = re.compile(rf"^def test_(\w+_)?{Path(file).stem}_", re.MULTILINE)
        for test in self.tests:
            if Path(test).parts[1] == Path(file).parts[0] and test_name.search((ROOT / test).read_text("utf-8")):
                distances.setdefault(test, 1)
        reached = {module_name(file)}
        for distance in range(1, 6):
            reached |= set().union(*(self.importers.get(name, set()) for name in reached))
            distances = {**{name: distance for name in reached if name.endswith(".py")}, **distances}
            if sum(self.seconds.get(test, 0.0) for test in distances) > seconds:
                break
        files = sorted(distances, key=lambda test: (distances[test], self.seconds.get(test, 0.0), test))
        ends = accumulate(self.seconds.get(test, 0.0) for test in files)
        return files[: max(1, sum(end <= seconds for end in ends))]


def copy_tree(target: Path) -> Path:
    """Copy the tracked files, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        if name and os.path.lexists(ROOT / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def failing_test(tree: Path, tests: list[str], limit: float) -> str | None:
    """Run test files or single tests; return the first test that failed, `timeout` if they took too long, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        streams = {"stdout": output, "stderr": output}
        process = subprocess.Popen(command, cwd=tree, env=environment, start_new_session=True, **streams)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:  # servers that the tests started may outlive them
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        lines = [line.partition(" ")[2] for line in output if line.startswith(("FAILED ", "ERROR "))]
    failed = [re.split(r"\[| - ", line)[0].strip() for line in lines]  # without the values of a parametrised test
    return None if status in (0, 5) else (failed or tests)[0]  # 5: no test was selected


def examine(tree: Path, mutant: Mutant, test_files: TestFiles) -> tuple[str, str]:
    """Return caught or unclear with the test that failed, or survived with the test files that passed."""
    target = tree / mutant.file
    original = target.read_text("utf-8")
    first = test_files.of(mutant.file)
    more = [file for file in test_files.of(mutant.file, SURVIVOR_SECONDS) if file not in first]
    for files in filter(None, (first, more)):
        limit = SLOW_FACTOR * sum(test_files.seconds.get(file, 0.0) for file in files) + START_SECONDS
        target.write_text(mutant.apply(original), "utf-8")
        try:
            failed = failing_test(tree, files, limit)
        finally:
            target.write_text(original, "utf-8")
        if failed is not None:
            passes = failing_test(tree, files if failed == "timeout" else [failed], limit) is None
            return ("caught" if passes else "unclear"), failed
    return "survived", " ".join(first + more)


GOAL = 0.9
"""The fraction of the mutants, without accepted ones, that the tests must catch. With fewer, the exit code is 1."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="mutants to draw (40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (0)")
    parser.add_argument("--package", action="append", choices=PACKAGES, help="mutate only this package; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time, each in its own copy (1)")
    parser.add_argument("--json", type=Path, help="write the results to this file, after each mutant")
    args = parser.parse_args(argv)
    accepted = json.loads((ROOT / "tests/mutants.json").read_text("utf-8"))
    reasons = {(each["file"], each["line"], each["change"]): each["reason"] for each in accepted}
    test_files, results = TestFiles(), []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(args.jobs) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(args.jobs):
            trees.put(copy_tree(Path(folder, str(job))))

        def judge(mutant: Mutant) -> tuple[Mutant, str, str]:
            if reason := reasons.get((mutant.file, mutant.line, mutant.change)):
                return mutant, "accepted", reason
            tree = trees.get()
            try:
                return mutant, *examine(tree, mutant, test_files)
            finally:
                trees.put(tree)

        for mutant, status, detail in pool.map(judge, draw(args.package or list(PACKAGES), args.count, args.seed)):
            results.append({**mutant.place, "status": status, "detail": detail})
            print(f"{status:9}{mutant}\n{'':9}{detail}", flush=True)
            if args.json:
                args.json.write_text(json.dumps({"seed": args.seed, "mutants": results}, indent=1) + "\n", "utf-8")
    counts = Counter(str(result["status"]) for result in results)
    judged = counts["caught"] + counts["survived"]
    print(
        f"Seed {args.seed}: {counts['caught']} of {judged} caught ({counts['caught'] / max(judged, 1):.0%}).",
        dict(counts),
    )
    return int(counts["caught"] < GOAL * judged)


if __name__ == "__main__":
    sys.exit(main())
