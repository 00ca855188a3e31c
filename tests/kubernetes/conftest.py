"""The servers that the conformance tests run against: the fake always, and a real one when the environment names it (README.md)."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.kubernetes.fake_access import User
from tests.kubernetes.fake_api import FakeApi
from tests.kubernetes.real_api import ADMIN_TOKEN, USER, USER_TOKEN, RealApi, is_given
from tests.kubernetes.server import Server

SECOND_S = 0.01
"""Of the fake's own timers."""
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def real_api() -> Iterator[RealApi]:
    api = RealApi.given()
    try:
        yield api
    finally:
        api.stop()


@pytest.fixture(params=["fake", "real"] if is_given() else ["fake"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    """With a namespace of its own for every test."""
    namespace = f"epp-test-{os.getpid()}-{time.time_ns() % 10**9}-{next(_numbers)}"
    if request.param == "real":
        real: RealApi = request.getfixturevalue("real_api")
        compact = real.compact if real.etcd_url else None
        async with Server.at(
            real.url, real.tls, tokens=(real.token, real.user_token), user=real.user, namespace=namespace, compact=compact
        ) as one:
            yield one
        return
    tokens = {ADMIN_TOKEN: User("admin", ("system:masters", "system:authenticated")), USER_TOKEN: User.service_account("default", "epp")}
    fake = FakeApi(tokens=tokens, rbac=True, second_s=SECOND_S)
    await fake.start()
    try:
        async with Server.at(fake.url, True, tokens=(ADMIN_TOKEN, USER_TOKEN), user=USER, namespace=namespace, compact=fake.compact) as one:
            yield one
    finally:
        await fake.stop()
