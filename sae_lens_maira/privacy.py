"""Privacy check for text and images of studies: an allow list of licence classes, used at every export.

    public, synthetic                                   may be written and sent
    credentialed, unknown, misspelt, null, missing      refused unless the caller allows it; output is marked

The module also contains checks of loopback addresses and image paths, file permissions, and masking of keys.
"""

from __future__ import annotations

import ipaddress
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from sae_lens_maira.errors import PrivacyError

SHAREABLE = ("public", "synthetic")
"""Licence classes that may be exported; every other value is treated as credentialed."""
CREDENTIALED = "credentialed"
MARKER = "CREDENTIALED.json"
"""File that marks a folder with data of credentialed studies."""
ALLOW = "--allow-credentialed true"
MIN_SECRET = 4
"""Smallest length of a secret that is masked; shorter ones occur in messages by chance."""


def is_shareable(licence: object) -> bool:
    """Whether a licence class is on the allow list."""
    return isinstance(licence, str) and licence in SHAREABLE


def strictest(licences: Iterable[object]) -> str:
    """Class that applies to data of several studies: "credentialed" unless every class is on the allow list.

    An empty list counts as credentialed, since the source of such data is unknown.
    """
    names = list(licences)
    if not names or not all(map(is_shareable, names)):
        return CREDENTIALED
    return "public" if "public" in names else "synthetic"


def describe(licences: Iterable[object]) -> str:
    """Describe the classes that are not on the allow list with their counts, such as "3 'credentialed', 1 None"."""
    counts = Counter(_name(licence) for licence in licences if not is_shareable(licence))
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none is listed"


def check_shareable(
    licences: Iterable[object], action: str, *, allow: bool = False, option: str | None = ALLOW
) -> str:
    """Refuse data of studies that are not public or synthetic, unless the caller allows them.

    Args:
        licences: Licence class of every study whose text or images are involved.
        action: Name of the action for the message, such as "writing Neuronpedia files".
        allow: Whether the user has allowed credentialed data.
        option: Option with which a user allows it; None if this action is never allowed.

    Returns:
        The strictest class, for marking the output.

    Raises:
        PrivacyError: A class is not on the allow list, or there is none, and `allow` is not set.
    """
    names = list(licences)
    found = strictest(names)
    if found != CREDENTIALED or allow:
        return found
    way_out = (
        f"Pass {option} if your data-use agreement permits it."
        if option
        else "This cannot be allowed. Use studies whose licence is public or synthetic."
    )
    raise PrivacyError(
        f"Refused: {action} would expose text or images of studies that are not known to be public or synthetic "
        f"(licence classes: {describe(names)}; {len(names)} studies). {way_out}"
    )


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine: localhost, 127.0.0.0/8 or ::1, without resolving names."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_destination(licences: Iterable[object], url: str, allow_remote: bool = False) -> str:
    """Check that data of these classes may be sent to a server, and describe the decision in a sentence.

    Raises:
        PrivacyError: Data that are not public or synthetic would leave this machine, and `allow_remote` is not set.
    """
    names = list(licences)
    host = urlsplit(url).hostname or url
    if is_loopback(url):
        return f"Studies go to {host}, this machine."
    closed = strictest(names) == CREDENTIALED
    if closed and not allow_remote:
        classes = (
            ", ".join(sorted({_name(one) for one in names if not is_shareable(one)})) or "none is listed"
        )
        raise PrivacyError(
            f"Studies of licence class {classes} would be sent to {host}, which is not this machine; their data-use "
            "agreement may forbid it. Start a server on 127.0.0.1 and set OPENAI_BASE_URL, or pass --allow-remote true "
            "if you are entitled to send them."
        )
    what = "including credentialed ones, as allowed by --allow-remote" if closed else "none credentialed"
    return f"Studies go to {host}, another machine: {what}."


def image_path(root: Path, source: str) -> Path:
    """Resolve an image path of a record set, which must stay within its folder.

    Args:
        root: Folder that the path is relative to.
        source: Relative path, as stored in the record set.

    Raises:
        PrivacyError: The path is absolute or leaves the folder, also through a link.
    """
    absolute = Path(source).is_absolute() or PureWindowsPath(source).is_absolute() or source.startswith("~")
    path = root / source
    inside = not absolute and ".." not in PurePosixPath(source.replace("\\", "/")).parts
    if not inside or not path.resolve().is_relative_to(root.resolve()):
        raise PrivacyError(
            f"A record set names the image {source!r}, which is outside {root}. Image paths must be relative and stay "
            "within that folder. Copy the images into it, or write the records again."
        )
    return path


def mask(text: str, *secrets: str | None) -> str:
    """Replace secrets, such as API keys, by three asterisks, also where they are quoted or percent-encoded."""
    from urllib.parse import quote

    for secret in secrets:
        if secret and len(secret) >= MIN_SECRET:
            for form in {secret, quote(secret, safe=""), json.dumps(secret)[1:-1]}:
                text = text.replace(form, "***")
    return text


@contextmanager
def private_files(folder: Path | str) -> Iterator[None]:
    """Context in which new files are readable by their owner only (mode 0600), also in forked workers.

    A folder that is group-writable or has the setgid bit counts as shared on purpose; files in it are readable by its
    group (mode 0640). This sets the umask of the process.

    Args:
        folder: Destination of the files; it need not exist yet.
    """
    before = os.umask(0o027 if _is_shared(Path(folder)) else 0o077)
    try:
        yield
    finally:
        os.umask(before)


def mark_folder(folder: Path, licence: str, command: str) -> None:
    """Mark a folder that contains data of studies that are not public or synthetic; do nothing for other classes."""
    if licence in SHAREABLE:
        return
    content: dict[str, Any] = {
        "licence": CREDENTIALED,
        "written_by": command,
        "notice": "Contains text or images of credentialed studies. Do not upload, publish or pass on.",
    }
    path = folder / MARKER
    if not path.exists():
        draft = folder / f".{MARKER}.{os.getpid()}"
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)


def is_marked(folder: Path | str) -> bool:
    """Whether a folder, or one of its parents, is marked as containing data of credentialed studies."""
    folder = Path(folder).resolve()
    return any((parent / MARKER).exists() for parent in (folder, *folder.parents))


def _is_shared(folder: Path) -> bool:
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    mode = folder.stat().st_mode
    # A sticky folder such as /tmp is writable by all users, which does not count as shared on purpose.
    return bool(mode & (stat.S_ISGID | stat.S_IWGRP)) and not mode & stat.S_ISVTX


def _name(licence: object) -> str:
    return repr(getattr(licence, "value", licence))


__all__ = [
    "CREDENTIALED",
    "MARKER",
    "SHAREABLE",
    "check_destination",
    "check_shareable",
    "image_path",
    "is_loopback",
    "is_marked",
    "is_shareable",
    "mark_folder",
    "mask",
    "private_files",
    "strictest",
]
