"""``sage-llm top``: a running server, seen every second: engines, queue, KV blocks, rates."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Annotated, Any

import typer

from sagellm.cli.admin import ApiKey, Url, call
from sagellm.cli.common import JsonOption, print_json, single

_CLEAR = "\x1b[H\x1b[2J"


def top(
    url: Url = None,
    api_key: ApiKey = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look once and leave; so does output that is no terminal.")
    ] = False,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Watch a running server; Ctrl-C leaves."""
    status = call("GET", "/management/status", url=url, api_key=api_key)
    if as_json:
        print_json(status)
        return
    if once or not sys.stdout.isatty():
        print(screen(status, None, 0.0))
        return
    before, at, seconds = None, time.monotonic(), 0.0
    try:
        while True:
            sys.stdout.write(_CLEAR + fitted(screen(status, before, seconds)) + "\n")
            sys.stdout.flush()
            time.sleep(every)
            before, status = status, call("GET", "/management/status", url=url, api_key=api_key)
            at, seconds = time.monotonic(), time.monotonic() - at
    except KeyboardInterrupt:
        return


def fitted(picture: str) -> str:
    """Cut `picture` to the terminal as it is now, so that nothing wraps or scrolls."""
    columns, lines = shutil.get_terminal_size()
    return "\n".join(line[:columns] for line in picture.splitlines()[: max(1, lines - 1)])


def screen(status: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> str:
    """Return one picture of the server; rates are those since `before`, `seconds` ago."""
    metrics, scheduling = status["metrics"], status["scheduling"]

    def rate(name: str) -> str:
        if before is None or seconds <= 0:
            return "-"
        return f"{(metrics[name] - before['metrics'][name]) / seconds:.1f}/s"

    lines = [
        f"up {status['uptime_s']:.0f} s   policy {status['scheduling_policy']}   routing {status['routing_strategy']}",
        f"requests  {metrics['active_requests']} running, {metrics['waiting_requests']} waiting, {metrics['completed_requests']} done "
        f"({rate('completed_requests')}), {metrics['failed_requests']} failed, {metrics['rejected_requests']} refused",
        f"tokens    {metrics['output_tokens']} out ({rate('output_tokens')}), {metrics['prompt_tokens']} in ({rate('prompt_tokens')})",
        f"latency   TTFT p50 {metrics['p50_ttft_ms']:.0f} ms, p99 {metrics['p99_ttft_ms']:.0f} ms; TPOT {metrics['avg_tpot_ms']:.1f} ms",
        f"control   prefix hits {scheduling['prefix_hit_rate']:.0%}, retries {scheduling['retries']}, migrations "
        f"{scheduling['migrations']}, sheds {scheduling['sheds']}, decision {scheduling['mean_decision_us']:.0f} µs",
        "",
        f"{'ENGINE':<20} {'STATE':<9} {'PID':>7} {'RUN':>4} {'LOAD':>6}  KV BLOCKS",
    ]
    for engines in status["cluster"]["models"].values():
        for e in engines:
            used, whole = e["kv_blocks_used"], max(1, e["kv_blocks_total"])
            bar = "#" * round(10 * used / whole)
            lines.append(
                f"{e['instance_id'][:20]:<20} {e['state']:<9} {e['pid'] or '-':>7} {e['active_requests']:>4} "
                f"{e['current_load']:>6.0%}  [{bar:<10}] {used} of {whole}"
            )
    return "\n".join(lines)


app = single(top)
