"""Stop strings against the bytes of tokens (src/worker/token_table.h, stop_matcher.h)."""

import struct
from pathlib import Path

from hosted_tinker.pytorch_worker.errors import UserError


def read_token_table(path: str) -> list[bytes]:
    """The bytes of each token id."""
    try:
        data = Path(path).read_bytes()
        magic, version, count = struct.unpack_from("<4sII", data)
        if magic != b"HTTT" or version != 1:
            raise ValueError(f"it is no table of version 1: {magic!r}, {version}")
        table, offset = [], 12
        for _ in range(count):
            _, length = struct.unpack_from("<BI", data, offset)
            offset += 5 + length
            if offset > len(data):
                raise ValueError("it ends inside a token")
            table.append(data[offset - length : offset])
        if offset != len(data):
            raise ValueError("bytes follow the last token")
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"token table {path}: {error}") from error
    return table


class StopMatcher:
    """Finds stop strings in the concatenated bytes of one sample's tokens; a match may span tokens."""

    def __init__(self, stop_strings: list[bytes], table: list[bytes] | None):
        self._stops = [stop for stop in stop_strings if stop]
        self._table = table or []
        self._longest = max(map(len, self._stops), default=0)
        self._tail = b""

    def feed(self, token: int) -> bool:
        """True when this token completes a stop string."""
        if not self._stops or token >= len(self._table):
            return False
        self._tail += self._table[token]
        if any(stop in self._tail for stop in self._stops):
            return True
        self._tail = self._tail[len(self._tail) - min(len(self._tail), self._longest - 1) :]
        return False
