"""The gate: text of credentialed studies goes to this machine's own servers, unless the user says otherwise.

Data-use agreements of credentialed collections forbid sending text to third parties. An unknown licence class counts
as credentialed. It knows nothing about what is sent.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from sae_lens_maira.errors import PrivacyError

FREE = frozenset({"public", "synthetic"})


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine: localhost, 127.0.0.0/8 or ::1, without a look-up of names."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_destination(licences: Iterable[str], url: str, allow_remote: bool = False) -> str:
    """Let data of these licence classes go to a server, and say so in a sentence.

    Raises:
        PrivacyError: credentialed data would leave the machine and `allow_remote` is not set.
    """
    host = urlsplit(url).hostname or url
    private = sorted(set(map(str, licences)) - FREE)
    if is_loopback(url):
        return f"Studies go to {host}, this machine."
    if private and not allow_remote:
        raise PrivacyError(
            f"Studies of licence class {', '.join(private)} would be sent to {host}, which is not this machine; "
            "their data-use agreement may forbid it. Start a server on 127.0.0.1 and set OPENAI_BASE_URL, or pass "
            "--allow-remote if you are entitled to send them."
        )
    what = (
        f"including {', '.join(private)} ones, as allowed by --allow-remote"
        if private
        else "none credentialed"
    )
    return f"Studies go to {host}, another machine: {what}."
