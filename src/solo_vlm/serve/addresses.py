"""Addresses of the public internet, by IANA's registries of special-purpose addresses.

`ipaddress.is_global` differs between versions of Python, and some consider 192.0.0.192, a cloud's metadata
service, as global.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_network

_IPV4_SPECIAL = [
    ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's metadata service, at a public address
    )
]
_IPV6_GLOBAL_UNICAST = ip_network("2000::/3")  # all that is assigned of the public internet (RFC 4291)
_IPV6_SPECIAL = [  # of it: protocol assignments with Teredo, documentation twice, 6to4
    ip_network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
]
_ISATAP = (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe")  # before an IPv4 address, in any network (RFC 5214)


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet.

    Private, loopback, link-local, shared, multicast and reserved addresses do not, nor do those of cloud
    metadata services and IPv6 addresses that stand for IPv4 ones: mapped, compatible, 6to4, Teredo, NAT64,
    ISATAP.
    """
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        special = any(ip in network for network in _IPV6_SPECIAL) or ip.packed[8:12] in _ISATAP
        return ip in _IPV6_GLOBAL_UNICAST and not special
    return not any(ip in network for network in _IPV4_SPECIAL)
