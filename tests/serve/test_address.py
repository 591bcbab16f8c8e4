"""Servers take their address before anything else, and say where they are."""

from __future__ import annotations

import socket
from urllib.request import urlopen

import pytest

from solo_vlm.serve.address import take_address
from solo_vlm.utils.errors import SoloError


@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost")])
def test_the_url_is_one_that_this_machine_can_ask(host, name):
    with take_address(host, 0) as address:
        port = address.socket.getsockname()[1]
        assert address.url == f"http://{name}:{port}"
        with pytest.raises(OSError, match="refused"):
            urlopen(address.url)
        address.listen()
        socket.create_connection((name, port), timeout=10).close()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_an_ipv6_address_stands_in_brackets():
    with take_address("::1", 0) as address:
        assert address.url == f"http://[::1]:{address.socket.getsockname()[1]}"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_of_others_cannot_be_had(host):
    with (
        pytest.raises(SoloError, match=f"cannot listen on {host}, port 8000: .*--port"),
        take_address(host, 8000),
    ):
        pass


def test_an_address_has_one_listener():
    with take_address("127.0.0.1", 0) as address:
        port = address.socket.getsockname()[1]
        with take_address("127.0.0.1", port) as other:  # neither listens yet
            address.listen()
            with pytest.raises(SoloError, match="in use"):
                other.listen()
        with pytest.raises(SoloError, match="in use"), take_address("127.0.0.1", port):
            pass
