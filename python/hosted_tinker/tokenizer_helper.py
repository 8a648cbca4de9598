"""`python -m hosted_tinker.tokenizer_helper export DIR OUT`: the table of token bytes that stop strings are matched on.

Format (src/worker/token_table.h), little-endian: "HTTT", u32 version = 1, u32 vocabulary size, then for each id: u8 1 for
a special token, u32 number of bytes, the bytes. An id without a token counts as special and has no bytes.
"""

import json
import os
import re
import struct
import sys
from pathlib import Path

from hosted_tinker.errors import LauncherError

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    # GPT-2's bytes_to_unicode, inverted: printable bytes stand for themselves, the rest for the letters from U+0100 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    for n, byte in enumerate(byte for byte in range(256) if byte not in set(printable)):
        alphabet[chr(256 + n)] = byte
    return alphabet


def _decoder_kinds(decoder) -> set[str]:
    """Every decoder's type in the (possibly nested) sequence of tokenizer.json."""
    if decoder is None:
        return set()
    kinds = {decoder["type"]}
    for inner in decoder.get("decoders", []):
        kinds |= _decoder_kinds(inner)
    return kinds


def _replaces_underscore(decoder) -> bool:
    if decoder is None:
        return False
    if decoder["type"] == "Metaspace":
        return True
    if decoder["type"] == "Replace" and decoder.get("pattern", {}).get("String") == "\u2581":
        return True
    return any(_replaces_underscore(inner) for inner in decoder.get("decoders", []))


def load_tokenizer(directory: Path):
    """The `tokenizers.Tokenizer` of a model directory; without a tokenizer.json, what transformers makes of its files."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise LauncherError(f"{directory}: no tokenizer.json, and converting one needs `transformers`") from error
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise LauncherError(f"{directory}: {type(tokenizer).__name__} has no tokenizer.json form")
    return backend


def token_bytes(tokenizer) -> list[tuple[bool, bytes]]:
    """(special, bytes) for each id from 0 to the highest."""
    description = json.loads(tokenizer.to_str())
    decoder = description.get("decoder")
    kinds = _decoder_kinds(decoder)
    byte_level = _byte_level_alphabet() if "ByteLevel" in kinds else None
    byte_fallback = "ByteFallback" in kinds or bool(description["model"].get("byte_fallback"))
    underscore_is_space = _replaces_underscore(decoder)
    added = {token["id"]: token for token in description.get("added_tokens", [])}

    def to_bytes(token: str) -> bytes:
        if byte_level is not None:
            return b"".join(
                bytes([byte_level[letter]]) if letter in byte_level else letter.encode("utf-8") for letter in token
            )
        fallback = _BYTE_FALLBACK.fullmatch(token) if byte_fallback else None
        if fallback:
            return bytes([int(fallback[1], 16)])
        return (token.replace("\u2581", " ") if underscore_is_space else token).encode("utf-8")

    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = [(True, b"")] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id in added:  # written as it reads, outside the model's alphabet
            entry = added[token_id]
            table[token_id] = (bool(entry["special"]), entry["content"].encode("utf-8"))
        else:
            table[token_id] = (False, to_bytes(token))
    return table


def encode_table(table: list[tuple[bool, bytes]]) -> bytes:
    parts = [b"HTTT", struct.pack("<II", 1, len(table))]
    for special, text in table:
        parts.append(struct.pack("<BI", special, len(text)))
        parts.append(text)
    return b"".join(parts)


def export(directory: Path, out: Path) -> None:
    """Writes the table beside its final name, then renames: a reader never sees half of it."""
    data = encode_table(token_bytes(load_tokenizer(directory)))
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 3 or arguments[0] != "export":
        print("usage: python -m hosted_tinker.tokenizer_helper export MODEL_DIR OUT_FILE", file=sys.stderr)
        return 2
    try:
        export(Path(arguments[1]), Path(arguments[2]))
    except Exception as error:  # the server shows this line to its user
        print(f"tokenizer helper: {arguments[1]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
