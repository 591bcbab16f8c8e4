"""Requests that browsers send for pages of other sites cannot use the model."""

from __future__ import annotations

import json
import socket

import pytest
from PIL import Image

from solo_vlm.serve.limits import Limits

from .conftest import data_url, question, served
from .hostile import exchange, http

ANSWERED = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
WORK = {
    "/v1/chat/completions": question("x", max_tokens=1),
    "/api/image": {"image_url": {"url": data_url(Image.new("RGB", (32, 32)))}},
    "/api/attention": {"messages": ANSWERED, "start": 0, "end": 1},
}


def send(server, path: str, host: str, kind: str = "application/json", **headers: str) -> int:
    """POST a valid body as a browser does; return the status."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    request = http(json.dumps(WORK[path]).encode(), path, kind=kind, extra="\r\n".join(lines))
    return exchange(server.port, request.replace(b"Host: x", b"Host: " + host.encode()))[0]


@pytest.fixture
def host(server):
    return f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize(
    "kind",
    [
        "",
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; application/json",
        "application/jsonp",
        "application/octet-stream",
    ],
)
def test_only_json_is_read(server, host, path, kind):
    """Types that browsers send to other sites without a preflight request are rejected without an Origin."""
    assert send(server, path, host, kind) == 415
    assert send(server, path, host, kind, Origin=f"http://{host}") == 415
    assert send(server, path, host, "application/json; charset=utf-8") == 200


@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize(
    "origin",
    [
        "http://other.site",
        "https://other.site:8000",
        "null",
        "",
        "file://",
        "http://127.0.0.1",
        "http://127.0.0.1:1",
        "http://{host}.other.site",
        "http://other.site/http://{host}",
        "http://{host}@other.site",
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_foreign_origin_is_rejected(server, host, path, origin, kind):
    assert send(server, path, host, kind, Origin=origin.format(host=host)) == 403


@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
def test_fetch_metadata_of_another_site_is_rejected(server, host, path, site):
    assert send(server, path, host, Sec_Fetch_Site=site) == 403
    assert send(server, path, host, Sec_Fetch_Site=site, Origin=f"http://{host}") == 403


@pytest.mark.parametrize("path", WORK)
def test_preflight_is_not_granted(server, host, path):
    asked = "Origin: http://other.site\r\nAccess-Control-Request-Method: POST"
    request = http(b"", path, "OPTIONS", extra=f"{asked}\r\nAccess-Control-Request-Headers: content-type")
    with server.connect(request.replace(b"Host: x", b"Host: " + host.encode())) as connection:
        head = connection.recv(2**16).lower()
    assert b" 403 " in head and b"access-control-allow" not in head


@pytest.mark.parametrize("path", WORK)
def test_page_of_a_name_that_rebinds_to_the_server_is_rejected(server, path):
    for name in (
        "attacker.example",
        "localhost.attacker.example:8000",
        "[",
        "127.0.0.1.nip.io",
        "1",
        "a:b:c",
    ):
        assert send(server, path, name, Origin=f"http://{name}") == 403
    name = f"attacker.example:{server.port}"
    assert send(server, path, name, Origin=f"http://{name}") == 403
    assert send(server, path, name) == 200  # not from a browser
    # Behind a proxy with a certificate for the name, over HTTPS:
    assert send(server, path, name, Origin=f"https://{name}", Sec_Fetch_Site="same-origin") == 200


@pytest.mark.parametrize("path", WORK)
@pytest.mark.parametrize("name", ["127.0.0.1", "[::1]", "192.168.7.1", "LocalHost", socket.gethostname()])
def test_own_page_is_served(server, path, name):
    host = f"{name}:{server.port}"
    assert send(server, path, host, Origin=f"http://{host}") == 200
    assert send(server, path, host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin") == 200


def test_page_may_have_any_name_with_a_key(solo):
    with served(solo, Limits(), ["one"]) as server:
        headers = {"Origin": "http://solo.example", "Authorization": "Bearer one"}
        assert send(server, "/v1/chat/completions", "solo.example", **headers) == 200
        assert send(server, "/v1/chat/completions", "solo.example", Origin="http://solo.example") == 401


FORWARDED = {
    "X_Forwarded_For": "127.0.0.1",
    "X_Real_IP": "127.0.0.1",
    "X_Forwarded_Host": "other.site",
    "X_Forwarded_Proto": "https",
    "X_Forwarded_Prefix": "/page",
    "X_Original_URL": "/health",
    "X_Rewrite_URL": "/health",
    "X_HTTP_Method_Override": "GET",
    "Forwarded": "for=127.0.0.1;host=other.site;proto=https",
    "Via": "1.1 proxy",
}


@pytest.mark.parametrize("headers", [*({name: value} for name, value in FORWARDED.items()), FORWARDED])
def test_headers_of_proxies_change_no_check(solo, server, host, headers):
    path = "/v1/chat/completions"
    assert send(server, path, host, Origin="http://other.site", **headers) == 403
    assert send(server, path, "other.site", Origin="http://other.site", **headers) == 403
    assert send(server, path, host, Sec_Fetch_Site="cross-site", **headers) == 403
    with served(solo, Limits(), ["one"]) as protected:
        assert send(protected, path, host, **headers) == 401
        assert send(protected, path, host, Authorization="Bearer two", **headers) == 401
        assert send(protected, path, host, Authorization="Bearer one", **headers) == 200


@pytest.mark.parametrize(
    "target",
    [
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/./v1/chat/completions",
        "/health/../v1/chat/completions",
        "/health/..%2fv1/chat/completions",
        "/%76%31/chat/completions",
        "/v1%2fchat%2fcompletions",
        "/V1/chat/completions",
        "/v1/chat/completions?/health",
        "/v1/chat/completions;/health",
        "http://127.0.0.1/v1/chat/completions",
        "/v1/models",
        "/v1/models/x",
    ],
)
def test_no_spelling_of_a_path_passes_the_key(solo, target):
    request = http(json.dumps(WORK["/v1/chat/completions"]).encode(), target)
    with served(solo, Limits(), ["one"]) as server:
        assert exchange(server.port, request)[0] in (400, 401, 404, 405)
        assert exchange(server.port, request.replace(b"POST", b"GET", 1))[0] in (400, 401, 404, 405)
