#!/usr/bin/env python3
"""Fails on an #include that crosses the table of cmake/House.cmake.

CMake already refuses a target that links a room it may not use; an include of a header needs no link, so it is checked
here. Also refused: libtorch outside engine and worker, Beast outside server/http, and generated protobuf headers where
libtorch is, whose own copies of protobuf's headers they would meet.

    check_includes.py [REPOSITORY]
"""

import re
import sys
from pathlib import Path

_SET = re.compile(r"^\s*set\((HT_[\w/]+)\s*([^)]*)\)", re.MULTILINE)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
SOURCES = {".h", ".cpp", ".cu", ".cuh"}

# (what, pattern of the included path, rooms that may)
EXTERNALS = [
    ("libtorch", re.compile(r"(ATen|c10|torch)/"), ("engine", "worker", "tests")),
    ("Boost.Beast", re.compile(r"boost/beast"), ("server/http",)),
    ("generated protobuf code", re.compile(r"(?!google/).*\.pb\.h$"), ("worker_protocol", "server")),
]


def read_table(text: str) -> dict[str, set[str]]:
    """room → rooms that it may use, with ${variables} expanded in order, as CMake does."""
    text = re.sub(r"#.*", "", text)
    variables: dict[str, list[str]] = {}
    for name, value in _SET.findall(text):
        words: list[str] = []
        for word in value.replace('"', "").split():
            reference = re.fullmatch(r"\$\{(.+)\}", word)
            words += variables[reference[1]] if reference else [word]
        variables[name] = words
    prefix = "HT_MAY_USE_"
    return {name[len(prefix) :]: set(words) for name, words in variables.items() if name.startswith(prefix)}


def room_of(path: str, rooms) -> str | None:
    """The longest room that contains the file; path is relative to src/ or to the repository."""
    parts = path.split("/")[:-1]
    for length in range(len(parts), 0, -1):
        if "/".join(parts[:length]) in rooms:
            return "/".join(parts[:length])
    return None


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)


def violations(root: Path) -> list[str]:
    table = read_table((root / "cmake/House.cmake").read_text())
    found = []
    files = [file for top in ("src", "kernels", "tests") for file in sorted((root / top).rglob("*"))]
    for file in files:
        if file.suffix not in SOURCES or not file.is_file():
            continue
        inside = file.relative_to(root / "src") if file.is_relative_to(root / "src") else file.relative_to(root)
        room = room_of(str(inside), table)
        where = file.relative_to(root)
        if room is None:
            found.append(f"{where}: lies in no room of cmake/House.cmake")
            continue
        text = without_comments(file.read_text(encoding="utf-8"))
        for match in _INCLUDE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            included = match[2]
            for what, pattern, allowed in EXTERNALS:
                if pattern.match(included) and not any(room == a or room.startswith(a + "/") for a in allowed):
                    found.append(f"{where}:{line}: {what} is confined to {', '.join(allowed)}, not {room}")
            used = room_of(included, table)
            if match[1] == '"' and used and used != room and used not in table[room]:
                found.append(f"{where}:{line}: {room} may not use {used} (\"{included}\")")
    return found


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2]
    found = violations(root)
    for text in found:
        print(text)
    print(f"{len(found)} includes cross the house's table" if found else "every include keeps to the house's table")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
