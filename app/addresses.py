"""Which addresses a URL that a user gave may lead to. Pure: it resolves nothing and connects to nothing.

Whoever may name a URL may otherwise make Sluice call its own network: the metadata service of a cloud
host, a database, an internal API. So every such URL passes a `Guard` twice. `problem` reads its text
when it is given, and refuses what is plainly wrong. `refusal` is asked for every resolved address just
before a connection is made to that very address (app/http1.py), so a name that resolves differently
the second time gains nothing. Redirects are not followed by anyone.

An address is fit to be called when it is public, or in a network that the operator allowed. Public is
what IANA's registries of special-purpose addresses (RFC 6890 and successors) leave over; of forms of
IPv6 that carry an IPv4 address, that one counts too.
"""

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final
from urllib.parse import quote, urlsplit

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MOST_URL_CHARS: Final = 2048

LOOPBACK: Final[tuple[Network, ...]] = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))
"""What a program that runs on a person's own machine may be told to call."""

_NOT_PUBLIC_4: Final = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT, also Tailscale and some clouds' metadata
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local: clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and the broadcast
    )
)
_PUBLIC_6: Final = IPv6Network("2000::/3")
_NOT_PUBLIC_6: Final = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocols, Teredo among them
        "2001:db8::/32",  # documentation
        "2620:4f:8000::/48",
        "3fff::/20",  # documentation
    )
)
#: Forms of IPv6 that carry an IPv4 address, and how far its last bit is from the end.
_CARRIERS: Final = (
    (IPv6Network("::ffff:0:0/96"), 0),  # mapped
    (IPv6Network("::ffff:0:0:0/96"), 0),  # translated (SIIT)
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (IPv6Network("2002::/16"), 80),  # 6to4
)

_NAME: Final = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*\.?"
)
_NUMERIC: Final = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+))*\.?")
_SPACE: Final = re.compile(r"[\x00-\x20\x7f-\xa0]")
_URL_CHARS: Final = "/%:@!$&'()*+,;=~"


def networks(setting: str) -> tuple[Network, ...]:
    """Networks as a setting names them: CIDRs, comma separated. Raises ValueError."""
    found: list[Network] = []
    for entry in filter(None, (part.strip() for part in setting.split(","))):
        try:
            found.append(ip_network(entry))
        except ValueError:
            raise ValueError(
                f"'{entry}' is no network; write CIDRs, such as 127.0.0.0/8,::1/128,10.1.0.0/16"
            ) from None
    return tuple(found)


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet's, and so is any IPv4 address that it carries."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    if address.scope_id is not None:
        return False
    carried = _carried(address)
    if carried is not None:
        return is_public(carried)
    return address in _PUBLIC_6 and not any(address in network for network in _NOT_PUBLIC_6)


def _carried(address: IPv6Address) -> IPv4Address | None:
    for network, shift in _CARRIERS:
        if address in network:
            return IPv4Address(int(address) >> shift & 0xFFFF_FFFF)
    return None


def literal(host: str) -> Address | None:
    """The address that a host is by itself, without a look-up; None: it is a name.

    Also what resolvers take for addresses: ``2130706433``, ``0x7f.1``, ``017700000001``,
    ``127.1``, and the names of loopback.
    """
    bare = host.removeprefix("[").removesuffix("]").lower()
    try:
        return ip_address(bare)
    except ValueError:
        pass
    if bare.rstrip(".") == "localhost" or bare.rstrip(".").endswith(".localhost"):
        return IPv4Address("127.0.0.1")
    if _NUMERIC.fullmatch(bare):
        try:
            return IPv4Address(socket.inet_aton(bare.rstrip(".")))
        except OSError:
            return None
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A URL taken apart: whom to connect to, what to ask of it, and how its host is written."""

    host: str
    port: int
    is_secure: bool
    path: str

    @property
    def authority(self) -> str:
        """The value of the header ``host``."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return shown if self.port == (443 if self.is_secure else 80) else f"{shown}:{self.port}"


def target(url: str) -> Target:
    """Take a URL apart. Raises ValueError with what is wrong with it, to follow 'the URL'."""
    if len(url) > MOST_URL_CHARS:
        raise ValueError(f"must have at most {MOST_URL_CHARS:,} characters")
    # urlsplit drops tabs and line breaks silently: what is checked must be what is sent.
    if _SPACE.search(url) or "\\" in url:
        raise ValueError("must not contain spaces, control characters or backslashes")
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host = host if host.isascii() else host.encode("idna").decode()
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:  # UnicodeError is one
        raise ValueError("is not a URL") from None
    if parts.scheme not in {"http", "https"}:
        raise ValueError("must begin with https:// or http://")
    if "@" in parts.netloc:
        raise ValueError("must not contain a user or a password")
    if not (_NAME.fullmatch(host) or (":" in host and literal(host) is not None)):
        raise ValueError("has no usable host")
    if _NUMERIC.fullmatch(host) and literal(host) is None:
        raise ValueError("has no usable host")
    if parts.fragment:
        raise ValueError("must not have a fragment (#…)")
    path = quote(parts.path or "/", safe=_URL_CHARS)
    if parts.query:
        path += "?" + quote(parts.query, safe=_URL_CHARS + "?")
    return Target(host=host, port=port, is_secure=parts.scheme == "https", path=path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Decides what may be called. ``setting`` is named in refusals, so that people know what to change.

    ``needs_tls``: outside the allowed networks only over TLS.
    """

    allowed: Sequence[Network]
    setting: str
    needs_tls: bool = False

    def allows(self, address: Address) -> bool:
        """Whether the operator allowed the network of an address."""
        carried = _carried(address) if isinstance(address, IPv6Address) else None
        return any(a in network for a in (address, carried) if a for network in self.allowed)

    def refusal(self, address: str, *, is_secure: bool) -> str | None:
        """Why a connection to this resolved address must not be made; None: it may be."""
        try:
            known = ip_address(address)
        except ValueError:
            return "leads to something that is no address"
        if self.allows(known):
            return None
        if not is_public(known):
            return (
                "leads to an address that is not public; "
                f"{self.setting} can allow its network, if it is meant"
            )
        if self.needs_tls and not is_secure:
            return "must begin with https://"
        return None

    def problem(self, url: str) -> str | None:
        """What is wrong with a URL as far as its text tells; None: nothing."""
        try:
            found = target(url)
        except ValueError as error:
            return str(error)
        address = literal(found.host)
        if address is not None:
            return self.refusal(str(address), is_secure=found.is_secure)
        # A name may resolve into an allowed network; otherwise nothing but TLS can be meant.
        if self.needs_tls and not found.is_secure and not self.allowed:
            return "must begin with https://"
        return None
