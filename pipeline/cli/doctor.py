"""`refract doctor RUN`"""

import argparse
from pathlib import Path

from refract import output
from refract.pipeline import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract doctor",
        description="Diagnose a finished run: the problems, their evidence, and the changes to try.",
    )
    parser.add_argument("run", type=Path, help="run folder")
    args = parser.parse_args(argv)
    return console.run("doctor", lambda: _doctor(args.run))


def _doctor(run: Path) -> int:
    from refract.pipeline.doctor.stored import read_findings

    findings, record = read_findings(run)
    for finding in findings:
        print(f"{finding.name}\n  seen:  {finding.evidence}\n  try:   {finding.cure}")
    if not findings:
        print("no problem found")
    problems = [{"name": finding.name, "evidence": finding.evidence, "cure": finding.cure} for finding in findings]
    output.result({"run": run, "findings": problems, "seconds": record["seconds"]})
    if total := sum(record["seconds"].values()):  # a head that is fitted on embeddings has no steps
        parts = ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in record["seconds"].items())
        print(f"time: {parts} of {total:.1f} s")
    return 0
