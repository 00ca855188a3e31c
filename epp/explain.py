"""`epp explain`: asks a running picker why, and prints the table: endpoint by scorer, weights, totals, the winner."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from epp.errors import ConfigError, Problem, StartError

TIMEOUT_S = 10.0
DESCRIPTION = """\
Ask a running picker where a request would go now, and why. Nothing is sent to an engine, nothing is charged or counted.

  epp explain -d '{"model":"m","messages":[{"role":"user","content":"hi"}]}'
  epp explain -d @request.json --path /v1/completions -H 'x-session-id: 7'
  kubectl port-forward deploy/my-epp 9090 & epp explain -d @request.json
  epp explain --last 5                    the last five decisions it really made

Columns are the scorers with their weights; scores are in [0, 1] before the weight, TOTAL is the weighted sum, * marks the pick."""


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:9090", metavar="URL", help="the picker's metrics port (default: %(default)s)")
    parser.add_argument("-d", "--data", metavar="BODY", help="the request's body: JSON text, @FILE, or @- for standard input")
    parser.add_argument("-H", "--header", action="append", default=[], metavar="'NAME: VALUE'", help="a request header; repeat for more")
    parser.add_argument("--path", default="/v1/chat/completions", metavar="PATH", help="the request's path (default: %(default)s)")
    parser.add_argument("--subset", metavar="IP[:PORT],...", help="endpoints the gateway would allow")
    parser.add_argument("--last", type=int, metavar="N", help="instead: the last N decisions made for real requests")
    parser.add_argument("--json", action="store_true", help="the answer as it came")


def explain(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if the request would be refused."""
    base = args.url.rstrip("/")
    if args.last is not None:
        answer = _ask(f"{base}/debug/decisions?limit={max(0, args.last)}")
        tables: list[dict[str, Any]] = answer["decisions"]
    else:
        asked = {"path": args.path, "headers": _headers(args.header), "body": _body(args.data)}
        if args.subset is not None:
            asked["subset"] = [part.strip() for part in args.subset.split(",") if part.strip()]
        answer = _ask(f"{base}/debug/explain", asked)
        tables = [answer]
    if args.json:
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(line for table in tables for line in render(table)) + "\n")
    return 1 if args.last is None and "error" in answer else 0


def render(table: Mapping[str, Any]) -> Iterable[str]:
    """A decision as lines of text."""
    about = f"request {table['request_id']}  model {table['model'] or '-'}"
    if table["target_model"] != table["model"]:
        about += f" -> {table['target_model']}"
    if "age_s" in table:
        about += f"  {table['age_s']:g} s ago"
    yield f"{about}  about {table['prompt_tokens']} prompt tokens"
    for each in table.get("left_out", ()):
        yield f"{each['name']} ({each['address']}) is no candidate: {each['state']}"
    for profile in table["profiles"]:
        yield f"profile {profile['profile']}"
        for each in profile["filters"]:
            more = each["removed_count"] - len(each["removed"])
            yield f"  {each['filter']} removed {', '.join(each['removed'])}" + (f" and {more} more" if more else "")
        scorers = profile["scorers"]
        heads = ["", "ENDPOINT", "ADDRESS", *(f"{s['name']} x{s['weight']:g}" for s in scorers), "CACHED", "TOTAL"]
        rows = [
            [
                "*" if row["picked"] else "",
                row["name"],
                row["address"],
                *(f"{row['scores'][s['name']]:.3f}" for s in scorers),
                str(row["cached_tokens"]),
                f"{row['total']:.3f}",
            ]
            for row in profile["endpoints"]
        ]
        yield from _aligned([heads, *rows])
        left_out = profile["endpoints_count"] - len(rows)
        if left_out:
            yield f"  ... and {left_out} more endpoints"
    if "error" in table:
        yield f"refused: {table['error']}"
    else:
        targets = "".join(f", {name} on {endpoint}" for name, endpoint in table["targets"].items())
        yield f"-> {table['endpoint']} ({table['destination']}){targets}"
    yield ""


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        yield ("  " + "  ".join(cells)).rstrip()


def _ask(url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise ConfigError("command line", [Problem("--url", f"{url!r} is not an http or https address")])
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})  # noqa: S310 - checked above
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310 - as above
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        try:
            reason = json.load(error)["error"]
        except (ValueError, KeyError, TypeError):
            reason = "is this a picker's metrics port, with its debug paths on?"
        raise StartError(f"{url} answered {error.code}: {reason}") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise StartError(f"no picker answers at {url}: {getattr(error, 'reason', error)}") from None
    if not isinstance(answer, dict):
        raise StartError(f"{url} is no picker: it answered {type(answer).__name__}")
    return answer


def _headers(given: Sequence[str]) -> dict[str, str]:
    headers = {}
    for each in given:
        name, colon, value = each.partition(":")
        if not colon or not name.strip():
            raise ConfigError("command line", [Problem("--header", f"{each!r} is not 'NAME: VALUE'")])
        headers[name.strip().lower()] = value.strip()
    return headers


def _body(given: str | None) -> str | None:
    if given is None or not given.startswith("@"):
        return given
    try:
        return sys.stdin.read() if given == "@-" else Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("command line", [Problem("--data", f"{given[1:]} can't be read: {error}")]) from None
