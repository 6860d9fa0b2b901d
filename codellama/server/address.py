"""Who can reach an address. It opens nothing, and knows nothing of the server on it."""

import ipaddress


def is_public(host: str) -> bool:
    """Say whether an address can be reached from other machines; a name other than localhost is taken to be."""
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True
