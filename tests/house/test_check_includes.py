"""The checker itself: that it passes a clean tree and sees each kind of crossing."""

from pathlib import Path

import check_includes

HOUSE = """
set(HT_MAY_USE_base "")
set(HT_COMMON base)
set(HT_MAY_USE_server/http ${HT_COMMON})
set(HT_MAY_USE_server/app ${HT_MAY_USE_server/http} server/http)
set(HT_MAY_USE_engine/ops base)  # set(HT_MAY_USE_ghost base)
"""


def check(tmp_path: Path, files: dict[str, str]) -> list[str]:
    for name, text in {"cmake/House.cmake": HOUSE, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return check_includes.violations(tmp_path)


def test_table():
    table = check_includes.read_table(HOUSE)
    assert table["server/app"] == {"base", "server/http"}
    assert "ghost" not in table


def test_clean_tree(tmp_path):
    assert not check(
        tmp_path,
        {
            "src/server/app/main.cpp": '#include "server/http/http.h"\n#include "server/app/x.h"\n#include <vector>\n',
            "src/server/http/http.h": '#include "base/error.h"\n// #include "server/app/main.h"\n',
            "src/server/http/beast.cpp": "#include <boost/beast/core.hpp>\n",
            "src/engine/ops/linear.cpp": "#include <ATen/ATen.h>\n",
        },
    )


def test_upward_include(tmp_path):
    (found,) = check(tmp_path, {"src/server/http/http.h": '\n#include "server/app/options.h"\n'})
    assert found.startswith("src/server/http/http.h:2:") and "server/app" in found


def test_confined_libraries(tmp_path):
    found = check(
        tmp_path,
        {
            "src/server/app/a.cpp": "#include <ATen/ATen.h>\n#include <boost/beast/http.hpp>\n",
            "src/base/b.h": '#include "worker.pb.h"\n',
        },
    )
    assert len(found) == 3


def test_file_outside_every_room(tmp_path):
    (found,) = check(tmp_path, {"src/misc/a.cpp": ""})
    assert "no room" in found
