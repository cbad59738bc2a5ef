"""The addresses in a previous result, as the node agent wants them (cni.md 1.4).

The agent's form is Go's `net.IPNet` as JSON: an address as text and a mask as base64 of its bytes.
"""

from __future__ import annotations

import _socket as socket  # the module of that name loads much that is not needed here
import binascii
import re

from cni.plugin.errors import Code, PluginError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_LENGTH = re.compile(r"[0-9]{1,3}")
_FAMILIES_WITH_BITS = ((socket.AF_INET, 32), (socket.AF_INET6, 128))
_SINGLE_ADDRESS_VERSIONS = ("0.1.0", "0.2.0")  # `ip4` and `ip6` instead of a list `ips`


def event_addresses(previous: Mapping[str, object], version: str) -> list[dict[str, object]] | None:
    """Give the event's `IPs`, one for each address of the result; None if it has none.

    Raises:
        PluginError: the result is not of the shape that `version` says.
    """
    if version in _SINGLE_ADDRESS_VERSIONS:
        configs = [previous[key] for key in ("ip4", "ip6") if previous.get(key) is not None]
        return [_address(config, "ip") for config in configs] or None
    ips = previous.get("ips") or []
    if not isinstance(ips, list):
        raise _malformed("ips is not a list")
    return [_address(config, "address") for config in ips] or None


def _address(config: object, key: str) -> dict[str, object]:
    if not isinstance(config, dict):
        raise _malformed("an address is not an object")
    gateway, interface = config.get("gateway") or "", config.get("interface")
    if not isinstance(gateway, str) or (gateway and _parse(gateway) is None):
        raise _malformed(f"not a gateway: {gateway!r}")
    if interface is not None and type(interface) is not int:
        raise _malformed(f"not the number of an interface: {interface!r}")
    return {"Interface": interface, "Address": _network(config.get(key)), "Gateway": gateway}


def _network(text: object) -> dict[str, str]:
    """Turn `10.1.2.3/24` into address and mask."""
    host, slash, length = text.partition("/") if isinstance(text, str) else ("", "", "")
    parsed = _parse(host)
    if parsed is None or not slash or _LENGTH.fullmatch(length) is None:
        raise _malformed(f"not an address with a prefix length: {text!r}")
    family, bits = parsed
    ones = int(length)
    if ones > bits:
        raise _malformed(f"not an address with a prefix length: {text!r}")
    mask = ((1 << ones) - 1 << bits - ones).to_bytes(bits // 8, "big")
    canonical = socket.inet_ntop(family, socket.inet_pton(family, host))
    return {"IP": canonical, "Mask": binascii.b2a_base64(mask, newline=False).decode()}


def _parse(host: str) -> tuple[int, int] | None:
    """Give the family of an address and its length in bits; None if it is not an address."""
    for family, bits in _FAMILIES_WITH_BITS:
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):  # ValueError: a NUL or a character that is not ASCII
            continue
        return family, bits
    return None


def _malformed(why: str) -> PluginError:
    return PluginError(Code.UNDECODABLE, "could not parse prevResult", why)
