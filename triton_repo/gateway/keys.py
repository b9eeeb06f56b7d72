"""API keys: who may ask, by a name that logs can show. Only hashes stay in memory."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import final

from .refusal import Refusal

VARIABLE = "VOLCAST_API_KEYS"
NOBODY = "-"
"""Who asks a gateway without keys."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]{16,256}")


@final
class Keys:
    """For any thread. Empty: everyone is let in, as `NOBODY`."""

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        """Names and keys. Raises ValueError: a bad or repeated name, a key that is short or given twice."""
        self._hashes: dict[str, bytes] = {}
        for name, key in pairs:
            if not _NAME.fullmatch(name) or name in self._hashes:
                raise ValueError(f"[gateway] key name {name!r}: need 1..64 letters, digits, '.', '_' or '-', each name once")  # fmt: skip
            if not _KEY.fullmatch(key):
                raise ValueError(f"[gateway] the key of {name}: need 16..256 visible ASCII characters; openssl rand -hex 32 makes one")  # fmt: skip
            if _hash(key) in self._hashes.values():
                raise ValueError(f"[gateway] the key of {name} is given twice; give each name its own")
            self._hashes[name] = _hash(key)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def caller(self, authorization: str | None) -> str:
        """The name that belongs to an Authorization header. Raises `Refusal`: unauthorized."""
        if not self._hashes:
            return NOBODY
        scheme, _, key = (authorization or "").partition(" ")
        digest, found = _hash(key.strip()), ""
        for name, known in self._hashes.items():
            # Every key is compared, and each in constant time.
            if hmac.compare_digest(digest, known):
                found = name
        if scheme.lower() != "bearer" or not found:
            raise Refusal(
                "unauthorized",
                "[gateway] need the header Authorization: Bearer KEY with a key of this server",
            )
        return found


def read_keys(path: Path | None, environment: MutableMapping[str, str] = os.environ) -> Keys:
    """The keys of a file (a line `name key` each, # for remarks) and of $VOLCAST_API_KEYS (`name=key name=key`).

    The variable is taken out of `environment`, so that no process started later inherits it.

    Raises ValueError: no such file, a line that is not two words, see `Keys`.
    """
    pairs = []
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"[gateway] keys {path}: cannot read it ({' '.join(str(error).split())})"
            ) from error
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if words and len(words) != 2:
                raise ValueError(f"[gateway] keys {path}, line {number}: need a name and a key")
            pairs += [(words[0], words[1])] if words else []
        if not pairs:
            raise ValueError(f"[gateway] keys {path}: holds no key; write lines of a name and a key")
    for word in environment.pop(VARIABLE, "").split():
        name, equals, key = word.partition("=")
        if not equals:
            raise ValueError(f"[gateway] ${VARIABLE}: need name=key, with spaces between")
        pairs.append((name, key))
    return Keys(pairs)


def _hash(key: str) -> bytes:
    # Not a slow hash: keys are random and long, and each request pays for it.
    return hashlib.sha256(key.encode()).digest()
