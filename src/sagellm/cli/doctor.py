"""``sage-llm doctor`` (also ``check``)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from sagellm.cli.common import JsonOption, print_json, single
from sagellm.doctor import examine

_MARK = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "skip"}


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the package index.")] = False,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Check the installation and the machine; every line that is not ok comes with its cure. Exit status 1 if one fails."""
    findings = examine(offline=offline)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        width = max(len(f.check) for f in findings)
        for f in findings:
            print(f"{_MARK[f.state]}  {f.check:<{width}}  {f.fact}")
            if f.cure and f.state != "ok":
                print(f"      {'':<{width}}  cure: {f.cure}")
        count = {state: sum(f.state == state for f in findings) for state in _MARK}
        print(f"\n{len(findings)} checks: {count['ok']} ok, {count['warn']} to improve, {count['fail']} failed")
    if any(f.state == "fail" for f in findings):
        raise typer.Exit(1)


app = single(doctor)
