"""Images from the web, fetched for strangers: never from a private network, whatever the URL's form.

The address is checked where the connection is made, on the very address that is connected to. So neither a
spelling of an address, nor a name that resolves to it, nor a name that resolves to another one the next time,
nor a redirect leads anywhere else.
"""

from __future__ import annotations

import socket
from ipaddress import IPv6Address, ip_address, ip_network

import aiohttp
from aiohttp.connector import AddrInfoType

from solo_vlm.serve.errors import ApiError

_GLOBAL_UNICAST = ip_network("2000::/3")  # all that is assigned of the public internet (RFC 4291)
_AZURE_METADATA = ip_address("168.63.129.16")  # the one cloud whose metadata stand at a public address
_MAX_REDIRECTS = 3


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet.

    Not so: private, loopback, link-local, shared, multicast and reserved ones, those of clouds' metadata, and
    IPv6 addresses that stand for an IPv4 address (mapped, 6to4, Teredo, NAT64).
    """
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and (ip not in _GLOBAL_UNICAST or ip.sixtofour or ip.teredo):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip == _AZURE_METADATA)


async def fetch_image(url: str, param: str, max_bytes: int, max_seconds: float) -> bytes:
    """What a URL holds.

    Args:
        url: http(s).
        param: its place in the request, for errors.
        max_bytes: of the response's body.
        max_seconds: for everything, redirects included.

    Raises:
        ApiError: 400. It does not tell a refused address from one where nothing answers, so that nobody can
            map a private network with it.
    """
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(socket_factory=_public_socket, use_dns_cache=False),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "solo-vlm"},
                timeout=aiohttp.ClientTimeout(total=max_seconds),
            ) as session,
            session.get(url, max_redirects=_MAX_REDIRECTS) as response,
        ):
            if response.status != 200:
                raise ApiError(
                    400, f"the image's server says HTTP {response.status}", param, "image_fetch_failed"
                )
            return await _read(response, param, max_bytes)
    except TimeoutError as error:
        raise ApiError(
            400, f"the image was not there within {max_seconds:g} s", param, "image_fetch_failed"
        ) from error
    except (aiohttp.ClientError, ValueError, OSError) as error:
        raise ApiError(
            400, "the image cannot be fetched from a public address", param, "image_fetch_failed"
        ) from error


async def _read(response: aiohttp.ClientResponse, param: str, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(2**16):
        body += chunk
        if len(body) > max_bytes:
            raise ApiError(400, f"an image file may have {max_bytes:,} bytes", param, "image_too_large")
    return bytes(body)


def _public_socket(address: AddrInfoType) -> socket.socket:
    """A socket for a connection to this address, if it is public."""
    family, kind, protocol, _, where = address
    if not is_public(where[0]):
        raise PermissionError(f"{where[0]} is not a public address")
    return socket.socket(family, kind, protocol)
