"""The HTTP port: `/metrics`, and under `/debug/` the answers to "why this pod?".

    GET  /metrics
    GET  /debug/decisions?limit=N   the last decisions, newest first, each with its table; no prompt text
    GET  /debug/endpoints           every endpoint: its load as known, its state
    POST /debug/explain             what flow control and the decision would make of the request in the body, and why; nothing is charged
    GET  /debug/plugins/state       what plugins say of themselves (hook `state`)
    GET  /drain                     who is going away
    POST /drain?endpoint=E          no new request for that endpoint (name, namespace/name or address); DELETE takes the mark away

`/drain` is for callers on this machine, and for those with the token of `--admin-token-file`; on a guarded port for those with that
token, and for those the guard lets pass.
Whoever reaches `/debug/explain` can find out whether a prompt's prefix is cached: guard the port, keep it inside the cluster, or turn
the debug paths off (`--enable-debug-endpoints=false`). Not here: what the answers say (director, decisions), who may ask (guard).
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from epp.console.asking import Asking, AskTokens
from epp.console.guard import DRAIN, Authorize, bearer, guard, same
from epp.datastore import Datastore
from epp.decisions import Decisions
from epp.director import Director
from epp.errors import StartError
from epp.observe.metrics import Metrics
from epp.parsing.routes import path_of
from epp.plugins.base import Plugin, hook
from epp.types import Endpoint, LLMRequest

_log = logging.getLogger("epp.console")
_http_log = logging.getLogger("epp.console.http")
_http_log.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], BadHttpMessage)))
"""Without what a scanner, or HTTP/2 on this port, makes aiohttp say of it, stack trace and all."""

EXPLAIN_BYTES_MAX = 16 << 20
"""Limit on a request to explain."""
DECISIONS_SHOWN_MAX = 1_000
ADAPTERS_SHOWN_MAX = 32
NEVER_S = 1e9
"""An age beyond this is that of a reading never taken."""


class ExplainRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /debug/explain`."""

    path: str = "/v1/chat/completions"
    headers: dict[str, str] = {}
    body: str | None = None
    """The request's body as text; null for a request without one."""
    subset: list[str] | None = None
    """Endpoints the gateway would allow."""


_decode = msgspec.json.Decoder(ExplainRequest).decode


class HttpServer:
    """See the module."""

    def __init__(
        self,
        metrics: Metrics,
        director: Director,
        decisions: Decisions | None,
        plugins: Callable[[], Iterable[Plugin]],
        *,
        datastore: Datastore,
        engine: Callable[[Endpoint], str],
        debug: bool,
        admin_token: Callable[[], str],
        listen_problem: Callable[[str | None, int, OSError], str],
        authorize: Authorize | None = None,
        tls: ssl.SSLContext | None = None,
        tokens: AskTokens | None = None,
    ) -> None:
        """`engine`: the family an endpoint's engine is of. `admin_token`: asked for with every use, so that it can be renewed; empty: there is none.

        `authorize`: asked before every request; None: everybody may. `tls`: None for plain HTTP; may require certificates of clients.
        `tokens`: how to ask for a request's exact tokens.
        """
        self._metrics = metrics
        self.asking = Asking(director, tokens)
        self._decisions = decisions
        self._plugins = plugins
        self._datastore = datastore
        self._engine = engine
        self._admin_token = admin_token
        self._listen_problem = listen_problem
        self._guarded = authorize is not None
        self._tls = tls
        app = web.Application(client_max_size=EXPLAIN_BYTES_MAX, middlewares=[guard(authorize, admin_token)] if authorize else [])
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get(DRAIN, self._get_draining)
        app.router.add_post(DRAIN, self._set_draining)
        app.router.add_delete(DRAIN, self._set_draining)
        if debug:
            app.router.add_get("/debug/decisions", self._get_decisions)
            app.router.add_get("/debug/endpoints", self._get_endpoints)
            app.router.add_post("/debug/explain", self._explain)
            app.router.add_get("/debug/plugins/state", self._plugin_states)
        # handler_cancellation: who leaves `/debug/explain` is not waited for; all else that is awaited bears it
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, logger=_http_log, handler_cancellation=True)
        self.port = 0

    async def start(self, host: str | None, port: int) -> None:
        """Raises StartError if the port can't be had."""
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, host, port, ssl_context=self._tls)
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise StartError(self._listen_problem(host, port, error)) from None
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _get_metrics(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics.exposition(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _get_decisions(self, request: web.Request) -> web.Response:
        text = request.query.get("limit", "20")
        if not (text.isascii() and text.isdigit()):
            return _json({"error": f"limit: {text[:40]!r} is not a number"}, 400)
        if self._decisions is None:
            return _json({"error": "decisions are not kept; start the picker with --debug-decisions=64"}, 404)
        return _json({"decisions": self._decisions.tables(min(int(text[:9]), DECISIONS_SHOWN_MAX))})

    async def _get_endpoints(self, _request: web.Request) -> web.Response:
        rows = [
            {
                "name": e.name,
                "namespace": e.namespace,
                "address": e.destination,
                "state": e.state,
                "waiting": e.waiting_estimate,
                "running": e.running_estimate,
                "kv_usage": round(e.kv_usage_estimate, 4),
                "kv_capacity_tokens": e.kv_capacity_tokens,
                "adapters_active": sorted(e.adapters_active)[:ADAPTERS_SHOWN_MAX],
                "adapters_max": e.adapters_max,
                "engine": self._engine(e),
                "prefill_tokens_per_s": round(e.capacity.prefill_tokens_per_s),
                "decode_step_s": round(e.capacity.step_s, 6),
                "in_flight_requests": e.inflight_requests,
                "in_flight_tokens": e.inflight_tokens,
                "picks": e.picks_total,
                "reading_age_s": _finite(self._datastore.staleness_s(e)),
                "attributes": e.attributes,
            }
            for e in self._datastore.endpoints.values()
        ]
        return _json({"endpoints": rows})

    async def _explain(self, request: web.Request) -> web.Response:
        try:
            asked = _decode(await request.read())
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return _json({"error": str(error)}, 400)
        except web.HTTPRequestEntityTooLarge:
            return _json({"error": f"longer than {EXPLAIN_BYTES_MAX} bytes"}, 413)
        headers = {name.lower(): value for name, value in asked.headers.items()}
        headers[":path"] = asked.path
        explained = LLMRequest(id=headers.get("x-request-id", "explain"), path=path_of(headers), headers=headers)
        body = None if asked.body is None else asked.body.encode()
        subset = None if asked.subset is None else tuple(asked.subset)
        try:
            return _json(await self.asking.explain(explained, body, subset))
        except Exception as error:  # noqa: BLE001 - a plugin's bug: the request itself would be a 500 too
            _log.exception("a request can't be explained")
            return _json({"error": f"the request fails with {type(error).__name__}; the picker's log says where"}, 500)

    async def _plugin_states(self, _request: web.Request) -> web.Response:
        states: dict[str, Mapping[str, Any]] = {}
        for plugin in self._plugins():
            state = hook(plugin, "state")
            about = {"state": state()} if state else {"message": "says nothing of its state"}
            states[plugin.name] = {"name": plugin.name, "type": plugin.type, **about}
        return _json({"timestamp": datetime.now(UTC).isoformat(), "plugins": states})

    async def _get_draining(self, _request: web.Request) -> web.Response:
        going = [e for e in self._datastore.endpoints.values() if e.draining]
        rows = [{"name": e.name, "address": e.destination, "marked": e.drain_marked, "in_flight": e.inflight_requests} for e in going]
        return _json({"draining": rows})

    async def _set_draining(self, request: web.Request) -> web.Response:
        if not self._may_administer(request):
            return _json({"error": "only from this machine, or with the token of --admin-token-file"}, 403)
        wanted = request.query.get("endpoint", "")
        found = [e for e in self._datastore.endpoints.values() if wanted in (e.name, f"{e.namespace}/{e.name}", e.destination)]
        if not found:
            return _json({"error": f"no endpoint is called {wanted[:200]!r}"}, 404)
        for endpoint in found:
            self._datastore.set_draining(endpoint, draining=request.method == "POST")
        return await self._get_draining(request)

    def _may_administer(self, request: web.Request) -> bool:
        if self._guarded or request.remote in ("127.0.0.1", "::1"):  # not all of 127/8: sidecar proxies forward from other addresses in it
            return True
        return same(bearer(request), self._admin_token())


def _finite(age_s: float) -> float | None:
    return round(age_s, 3) if age_s < NEVER_S else None


def _json(answer: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), status=status, content_type="application/json")
