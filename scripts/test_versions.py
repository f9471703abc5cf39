"""
Run the core tests with the oldest and with the newest supported versions, each in a virtual environment of its own.

    python scripts/test_versions.py                      # both, as `make test-versions`
    python scripts/test_versions.py newest --newest-python python3.13
    python scripts/test_versions.py --table              # run nothing, write the table

"oldest" is every dependency at the lower bound that pyproject.toml declares, on this Python; "newest" what pip takes
by itself, on the newest Python at hand. What passed is written to docs/versions.json, and from there to the table in
docs/compatibility.md. The environments stand in build/versions and hold gigabytes of torch each.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from datetime import date
from pathlib import Path


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "versions.json"
DOCUMENT = ROOT / "docs" / "compatibility.md"
ENVIRONMENTS = ROOT / "build" / "versions"
CORE_TESTS = ["tests/losses", "tests/configs", "tests/compat", "tests/trainers/test_dpo_trainer.py"]
EXTRAS = ("peft",)  # of which the core tests train adapters
TOOLS = ["pytest", "vaderSentiment"]


def declared() -> dict[str, str]:
    """The declared requirements, by package: `{"trl": ">=1.16,<1.17", ...}`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]
    return dict(re.fullmatch(r"([\w-]+)(.*)", text).groups() for text in texts)


def lower_bounds() -> dict[str, str]:
    return {name: re.match(r">=([\d.]+)", specifier).group(1) for name, specifier in declared().items()}


def newest_python() -> str:
    """The newest `python3.N` on the path."""
    return next(found for minor in range(30, 10, -1) if (found := shutil.which(f"python3.{minor}")))


def install(name: str, python: str) -> Path:
    """Make the environment or bring it up to date, and return its interpreter."""
    directory = ENVIRONMENTS / name
    subprocess.run([python, "-m", "venv", directory], check=True)
    interpreter = directory / "bin" / "python"
    requirements = [*TOOLS, "--editable", f"{ROOT}[{','.join(EXTRAS)}]"]
    if name == "oldest":
        requirements += [f"{package}=={version}" for package, version in lower_bounds().items()]
    else:
        requirements += ["--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *requirements], check=True)
    return interpreter


def installed(interpreter: Path) -> dict[str, str]:
    listed = subprocess.run(
        [interpreter, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True
    )
    versions = {entry["name"].lower(): entry["version"] for entry in json.loads(listed.stdout)}
    return {name: versions[name] for name in declared()}


def run_tests(name: str, interpreter: Path) -> dict[str, int]:
    """The numbers of tests that ran, failed and were skipped."""
    report = ENVIRONMENTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    subprocess.run(
        [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *CORE_TESTS], cwd=ROOT
    )
    if not report.exists():
        sys.exit(f"{name}: pytest ended before the first test; its message stands above")
    suite = ET.parse(report).getroot().find("testsuite")
    return {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}


def table(results: dict[str, dict]) -> str:
    """What ran, as a Markdown table: a row for each package, a column for each set."""
    rows = [["", *results], ["---"] * (1 + len(results))]
    packages = next(iter(results.values()))["versions"]
    rows += [[package, *(entry["versions"][package] for entry in results.values())] for package in packages]
    rows.append(["tests", *(f"{e['tests'] - e['skipped']} passed, {e['skipped']} skipped" for e in results.values())])
    rows.append(["on", *(f"{entry['system']}, {entry['date']}" for entry in results.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_table(results: dict[str, dict]) -> None:
    start, end = "<!-- versions -->\n", "\n<!-- /versions -->"
    before, rest = DOCUMENT.read_text().split(start)
    DOCUMENT.write_text(before + start + table(results) + end + rest.split(end)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="oldest|newest", help="which sets (default: both)")
    parser.add_argument("--oldest-python", default=sys.executable)
    parser.add_argument("--newest-python", default=newest_python())
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    pythons = {"oldest": args.oldest_python, "newest": args.newest_python}
    unknown = set(args.names) - pythons.keys()
    if unknown:
        parser.error(f"no set is called {', '.join(sorted(unknown))}: there are oldest and newest")

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if args.table else args.names or pythons:
        interpreter = install(name, pythons[name])
        python = subprocess.run([interpreter, "-V"], check=True, capture_output=True, text=True).stdout.split()[1]
        outcome = run_tests(name, interpreter)
        results[name] = {
            "date": date.today().isoformat(),
            "system": f"{platform.system()} {platform.machine()}",
            "versions": {"python": python, **installed(interpreter)},
            **outcome,
        }
        if outcome["failures"] or outcome["errors"]:
            sys.exit(f"{name}: {outcome['failures']} tests failed, {outcome['errors']} could not run")
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    write_table(results)


if __name__ == "__main__":
    main()
