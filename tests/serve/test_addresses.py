"""Addresses against IANA's registries of special-purpose addresses (2025), and IPv4 inside of IPv6."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from solo_vlm.serve.addresses import is_public

# Entries that are not globally reachable. A few within them are, for protocols that serve no images.
SPECIAL = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "shared by a carrier; Alibaba's metadata service",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link-local; metadata services of most clouds",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "protocol assignments; Oracle's metadata service",
    "192.0.0.0/29": "IPv4 service continuity",
    "192.0.0.8/32": "dummy",
    "192.0.0.9/32": "port control anycast",
    "192.0.0.10/32": "TURN anycast",
    "192.0.0.170/31": "NAT64 discovery",
    "192.0.0.192/32": "Oracle's metadata service",
    "192.0.2.0/24": "documentation",
    "192.88.99.0/24": "6to4 relay anycast, deprecated",
    "192.168.0.0/16": "private",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
    "255.255.255.255/32": "broadcast",
    "168.63.129.16/32": "Azure's metadata service",
    "::/128": "unspecified",
    "::1/128": "loopback",
    "::/96": "IPv4-compatible",
    "::ffff:0:0/96": "IPv4-mapped",
    "::ffff:0:0:0/96": "IPv4-translated",
    "64:ff9b::/96": "NAT64",
    "64:ff9b:1::/48": "NAT64, local",
    "100::/64": "discard-only",
    "100:0:0:1::/64": "dummy",
    "2001::/23": "protocol assignments",
    "2001::/32": "Teredo",
    "2001:1::1/128": "port control anycast",
    "2001:1::2/128": "TURN anycast",
    "2001:1::3/128": "DNS-SD anycast",
    "2001:2::/48": "benchmarking",
    "2001:3::/32": "AMT",
    "2001:4:112::/48": "AS112",
    "2001:10::/28": "ORCHID, deprecated",
    "2001:20::/28": "ORCHIDv2",
    "2001:30::/28": "drone identification",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "3fff::/20": "documentation",
    "4000::/2": "unassigned",
    "5f00::/16": "segment routing",
    "fc00::/7": "unique local; Amazon's metadata service",
    "fe80::/10": "link-local",
    "fec0::/10": "site-local, deprecated",
    "ff00::/8": "multicast",
}
PUBLIC = [
    *("1.1.1.1", "8.8.8.8", "93.184.215.14", "223.255.255.255"),
    *("9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0"),
    *("169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.1", "191.255.255.255", "192.0.1.0"),
    *("192.0.3.0", "192.88.98.255", "192.88.100.0", "192.167.255.255", "192.169.0.0", "198.17.255.255"),
    *("198.20.0.0", "198.51.99.255", "203.0.112.255", "203.0.114.0", "168.63.129.15"),
    *("192.31.196.1", "192.52.193.1", "192.175.48.1"),  # in the registry, and global
    *("2606:4700::6810:84e5", "2a00:1450:4001:82a::200e", "2001:200::1", "2001:db7:ffff::1", "2001:db9::1"),
    *("2003::1", "2620:4f:8000::1", "3ffe:ffff::1"),
]


@pytest.mark.parametrize("network", SPECIAL)
def test_special_addresses_are_not_public(network):
    network = ip_network(network)
    middle = network.network_address + network.num_addresses // 2
    assert not any(is_public(str(ip)) for ip in (network[0], middle, network[-1]))


@pytest.mark.parametrize("address", PUBLIC)
def test_internet_addresses_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("ipv4", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "192.0.0.192", "8.8.8.8"])
def test_ipv4_inside_of_ipv6_is_not_public(ipv4):
    number = int(ip_address(ipv4))
    inside = [
        *(f"::{ipv4}", f"::ffff:{ipv4}", f"::ffff:0:{ipv4}", f"64:ff9b::{ipv4}", f"64:ff9b:1::{ipv4}"),
        f"2002:{number >> 16:x}:{number & 0xFFFF:x}::1",  # 6to4
        f"2001:0:{number >> 16:x}:{number & 0xFFFF:x}::1",  # a Teredo server
        f"2001::{~number >> 16 & 0xFFFF:x}:{~number & 0xFFFF:x}",  # a Teredo client
        *(f"2a00:1450::5efe:{ipv4}", f"2a00:1450::200:5efe:{ipv4}"),  # ISATAP
    ]
    assert not any(map(is_public, inside))


@pytest.mark.parametrize("address", ["fe80::1%eth0", "::1%lo"])
def test_zone_does_not_make_an_address_public(address):
    assert not is_public(address)
