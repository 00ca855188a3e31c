"""`epp explain`: asks a running picker why, and prints the table: endpoint by scorer, weights, totals, the winner."""

from __future__ import annotations

import argparse
import http.client
import json
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from epp.config.flag_types import positive
from epp.errors import ConfigError, Problem, StartError

TIMEOUT_S = 10.0
"""Longer than the picker waits for a request's tokens."""
ERROR_BYTES_MAX = 1 << 20
DESCRIPTION = """\
Ask a running picker where a request would go now, and why; by its exact tokens where a tokenizer is configured, and with what flow
control would do with it. Nothing is charged, counted or sent to an engine, but the question for tokens where engines tokenize; tokens
may stay in caches.

  epp explain -d '{"model":"m","messages":[{"role":"user","content":"hi"}]}'
  epp explain -d @request.json --path /v1/completions -H 'x-session-id: 7'
  kubectl port-forward deploy/my-epp 9090 & epp explain -d @request.json
  epp explain --last 5                    the last five decisions it really made

A guarded metrics port wants a token whose owner may `get` and `post` the nonResourceURLs /debug/*:
  kubectl create token my-account > token; epp explain --token-file token --last 5

Columns are the scorers with their weights; scores are in [0, 1] before the weight, TOTAL is the weighted sum, * marks the pick."""


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:9090", metavar="URL", help="the picker's metrics port (default: %(default)s)")
    parser.add_argument("-d", "--data", metavar="BODY", help="the request's body: JSON text, @FILE, or @- for standard input")
    parser.add_argument("-H", "--header", action="append", default=[], metavar="'NAME: VALUE'", help="a request header; repeat for more")
    parser.add_argument("--path", default="/v1/chat/completions", metavar="PATH", help="the request's path (default: %(default)s)")
    parser.add_argument("--subset", metavar="IP[:PORT],...", help="endpoints the gateway would allow")
    parser.add_argument("--last", type=positive, metavar="N", help="instead: the last N decisions made for real requests")
    parser.add_argument("--json", action="store_true", help="the answer as it came")
    access = parser.add_argument_group("a guarded port")
    access.add_argument("--token-file", default="", metavar="FILE", help="bearer token to show")
    access.add_argument("--ca-file", default="", metavar="FILE", help="authority of its certificate (default: the system's)")
    access.add_argument(
        "--tls-server-name", default="", metavar="NAME", help="the name in its certificate, if that is not the host of --url"
    )
    access.add_argument(
        "--client-cert-file", default="", metavar="FILE", help="certificate to show, for a port with --metrics-client-ca-file"
    )
    access.add_argument("--client-key-file", default="", metavar="FILE", help="its key (default: in the same file)")


def explain(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if the request would be refused."""
    picker = _Picker(args)
    if args.last is not None:
        answer = picker.ask(f"/debug/decisions?limit={args.last}")
        tables: list[dict[str, Any]] = answer["decisions"]
        if not tables and not args.json:
            sys.stderr.write("epp: no request was decided yet\n")
            return 0
    else:
        asked = {"path": args.path, "headers": _headers(args.header), "body": _body(args.data)}
        if args.subset is not None:
            asked["subset"] = [part.strip() for part in args.subset.split(",") if part.strip()]
        answer = picker.ask("/debug/explain", asked)
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
    yield f"{about}  {_tokens(table['prompt_tokens'], table.get('tokens') or {})}"
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
    flow = table.get("flow_control") or {}
    if "error" in table:
        yield f"refused: {table['error']}"
    elif table["endpoint"] is not None:
        targets = "".join(f", {name} on {endpoint}" for name, endpoint in table["targets"].items())
        waits = ", were it let through now" if flow.get("verdict") == "waits" else ""
        yield f"-> {table['endpoint']} ({table['destination']}){targets}{waits}"
    if flow:
        yield from _flow_control(flow)
    yield ""


def _tokens(count: int, about: Mapping[str, Any]) -> str:
    source, believed = about.get("source", ""), about.get("engines_believed")
    text = f"{count} prompt tokens, by the {source}" if source in ("client", "tokenizer") else f"about {count} prompt tokens"
    if source == "estimate" and about["outcome"] != "no_tokenizer":
        text += f", estimated: {about['why']}"
    if believed is not None:
        text += f"; cached by the word of {_count(believed, 'engine')}, else by what was sent"
    return text


def _flow_control(flow: Mapping[str, Any]) -> Iterable[str]:
    verdict, ahead = flow["verdict"], flow["ahead"]
    line = f"flow control: {verdict}"
    if verdict == "waits":
        line += f", {flow['why']}: {ahead['higher_bands'] + ahead['band']} ahead"
        own = f", {ahead['flow']} of them of its flow" if ahead["flow"] is not None else ""
        line += f" ({ahead['higher_bands']} in higher bands, {ahead['band']} in its own{own})"
        line += f", at most {flow['ttl_s']:g} s" if flow["ttl_s"] else ", without end"
        line += f"; {flow['displaces']} that wait give way to it" if flow["displaces"] else ""
    elif verdict == "refused":
        retry_s = flow["retry_after_s"]
        line += f" with {flow['status']}, {flow['why']}" + (f"; retry after {retry_s} s" if retry_s else "")
    elif flow["why"]:
        line += f", {flow['why']}"
    yield line
    full = f"saturation {flow['saturation']:.3g} of {flow['ceiling']:.3g}" if flow["saturation"] is not None else "no saturation"
    yield (
        f"  band {flow['band']}, flow {flow['fairness_id']}; {full} ({flow['detector']}, {_count(flow['candidates'], 'candidate')}); "
        f"{flow['queued']} queued in all"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        yield ("  " + "  ".join(cells)).rstrip()


class _Picker:
    """The metrics port of a picker, and what it takes to be let in there."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises ConfigError."""
        self._base = args.url.rstrip("/")
        if not self._base.startswith(("http://", "https://")):
            raise _wrong("--url", f"{args.url!r} is not an http or https address")
        self._headers = {"Content-Type": "application/json"}
        if args.token_file:
            self._headers["Authorization"] = f"Bearer {_token(args.token_file)}"
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if self._base.startswith("https://"):
            handlers.append(_Https(_context(args), args.tls_server_name))
        else:
            for flag in ("ca_file", "tls_server_name", "client_cert_file", "client_key_file"):
                if getattr(args, flag):
                    raise _wrong(f"--{flag.replace('_', '-')}", "is for an https address: give --url https://...")
        self._opener = urllib.request.build_opener(*handlers)

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Raises StartError."""
        url = self._base + path
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(url, data=data, headers=self._headers)  # noqa: S310 - http or https
            with self._opener.open(request, timeout=TIMEOUT_S) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise StartError(f"{url} answered {error.code}: {_said(error)}{_hint(error.code)}") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            raise StartError(f"no picker answers at {url}: {_why(error, https=url.startswith('https:'))}") from None
        if not isinstance(answer, dict):
            raise StartError(f"{url} is no picker: it answered {type(answer).__name__}")
        return answer


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A token is for whom it was given to."""

    def redirect_request(self, *_: object) -> None:
        return None


class _Https(urllib.request.HTTPSHandler):
    """With a name of its own for the certificate: a forwarded port is 127.0.0.1, its certificate a Service's."""

    def __init__(self, context: ssl.SSLContext, server_name: str) -> None:
        super().__init__(context=context)
        self._tls = context
        self._server_name = server_name

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        tls, server_name = self._tls, self._server_name

        class Connection(http.client.HTTPSConnection):
            def connect(self) -> None:
                http.client.HTTPConnection.connect(self)
                host = getattr(self, "_tunnel_host", None) or self.host  # through a proxy, host is the proxy
                self.sock = tls.wrap_socket(self.sock, server_hostname=server_name or host)

        return self.do_open(Connection, request)


def _context(args: argparse.Namespace) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=args.ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise _wrong("--ca-file", f"{args.ca_file} can't be used: {error.strerror or error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if args.client_key_file and not args.client_cert_file:
        raise _wrong("--client-key-file", "needs --client-cert-file")
    if args.client_cert_file:
        try:
            context.load_cert_chain(args.client_cert_file, args.client_key_file or None)
        except (OSError, ssl.SSLError) as error:
            raise _wrong("--client-cert-file", f"{args.client_cert_file} can't be used: {error.strerror or error}") from None
    return context


def _token(path: str) -> str:
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except OSError as error:
        raise _wrong("--token-file", f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _wrong("--token-file", f"{path} holds no token") from None
    if not token or not token.isprintable() or " " in token:
        raise _wrong("--token-file", f"{path} holds no token")
    return token


def _said(error: urllib.error.HTTPError) -> str:
    try:
        reason = json.loads(error.read(ERROR_BYTES_MAX))["error"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        reason = None
    return reason if isinstance(reason, str) else "is this a picker's metrics port, with its debug paths on?"


def _hint(status: int) -> str:
    """What to do about an answer, where the answer does not say."""
    if status == http.client.UNAUTHORIZED:
        return "; give --token-file a fresh token, as of `kubectl create token`"
    if status == http.client.FORBIDDEN:
        return "; the token's owner needs the verbs get and post on the nonResourceURLs /debug/*"
    return ""


def _why(error: Exception, *, https: bool) -> str:
    """What went wrong on the way, and what to do about it."""
    reason = getattr(error, "reason", error)  # an URLError's; an SSLError has one too, a word in capitals
    cause = reason if isinstance(reason, Exception) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"{cause.verify_message}; give --ca-file its authority, --tls-server-name the name in its certificate"
    if isinstance(cause, ssl.SSLError):
        if cause.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return f"{cause.reason}; it speaks plain HTTP: give --url http://..."
        return f"{cause.reason or cause}; if it asks for a client's certificate, give --client-cert-file"
    if isinstance(cause, ConnectionRefusedError):
        return f"{reason}; in a cluster: kubectl port-forward deploy/NAME 9090"
    if isinstance(cause, http.client.BadStatusLine | ConnectionResetError):
        what = "asks for a client's certificate, give --client-cert-file" if https else "speaks TLS, give --url https://..."
        return f"{cause or 'it closed the connection'}; if it {what}"
    return str(reason)


def _wrong(flag: str, message: str) -> ConfigError:
    return ConfigError("command line", [Problem(flag, message)])


def _headers(given: Sequence[str]) -> dict[str, str]:
    headers = {}
    for each in given:
        name, colon, value = each.partition(":")
        if not colon or not name.strip():
            raise _wrong("--header", f"{each!r} is not 'NAME: VALUE'")
        headers[name.strip().lower()] = value.strip()
    return headers


def _body(given: str | None) -> str | None:
    if given is None or not given.startswith("@"):
        return given
    try:
        return sys.stdin.read() if given == "@-" else Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong("--data", f"{given[1:]} can't be read: {getattr(error, 'strerror', None) or error}") from None
