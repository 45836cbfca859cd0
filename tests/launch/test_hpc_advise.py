"""`launch/hpc advise` and `check`: what they print, how they edit, and that nothing breaks them."""

import json
import os
import shutil
import subprocess
import sys

import pytest

for module in ("tree_sitter", "tree_sitter_c", "tree_sitter_fortran", "islpy"):
    pytest.importorskip(module, reason="needs jaxfm[hpc]")

from jaxfm.config import describe  # noqa: E402
from jaxfm.launch.hpc import advise, check, edits  # noqa: E402
from jaxfm.launch.hpc.commands import command  # noqa: E402
from jaxfm.launch.hpc.findings import source_files  # noqa: E402

SOURCE = """void f(int n, double *restrict a, double *restrict b) {
    int j;
    double t;
    for (int i = 0; i < n; i++) {
        t = a[i];
        a[i] = t * t;
    }

    for (int i = 1; i < n; i++)
        a[i] = a[i - 1];
    for (int i = 0; i < n; i++) a[i] = g(i);
    /* a
       comment */

    if (n > 3) for (int i = 0; i < n; i++) b[i] = 1;
    for (int s = 0; s < 9; s++) {
\tfor (int i = 1; i < n; i++)
\t    b[i] = a[i - 1] + a[i];
        for (int i = 0; i < n; i++) a[i] = b[i];
    }
}
"""
PRAGMAS = """void f(int n, double *restrict a, double t) {
#pragma omp parallel for
    for (int i = 0; i < n; i++) a[i] = 1;
#pragma omp parallel for
    for (int i = 0; i < n; i++) {
        t = a[i];
        a[i] = t;
    }
#pragma omp parallel
    { a[0] = 1; }
#pragma omp parallel for
    FORALL(i) a[i] = 1;
}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.c"
    path.write_text(SOURCE)
    return path


def run(module, capsys, *paths, **options):
    status = 0
    try:
        module.main(module.CONFIG(path=tuple(map(str, paths)), **options))
    except SystemExit as end:
        status = end.code
    return capsys.readouterr().out, status


def test_advise_prints_what_each_loop_needs(file, capsys):
    text, status = run(advise, capsys, file)
    assert status == 0 and file.read_text() == SOURCE
    for line in (
        f"{file}:4 (f): race-free with #pragma omp parallel for private(t)",
        f"{file}:9 (f): race if it ran in parallel",
        "    Line 10 writes a at i = 1 while line 10 reads a at i = 2 (for example with n = 3).",
        f"{file}:11 (f): cannot tell",
        "    Line 11 calls g, whose effects are not known.",
        f"{file}:17 (f): race-free with #pragma omp parallel for",
    ):
        assert line in text.splitlines()
    assert "shown by: proof by integer sets (islpy " in text


def test_json_has_every_finding(file, capsys):
    found = json.loads(run(advise, capsys, file, format="json")[0])
    assert [f["first_line"] for f in found] == [4, 9, 11, 15, 16, 17, 19]
    assert found[0]["pragma"] == "#pragma omp parallel for private(t)"
    assert found[1]["lines"] == [10, 10] and found[0]["probability"] is None


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs patch")
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_diff_is_what_write_does(tmp_path, end, capsysbinary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = SOURCE.replace("\n", end).encode() + b"// \xe9 latin, and no end of line"
    (tmp_path / "a.c").write_bytes(raw)
    (tmp_path / "b.c").write_bytes(raw)
    os.chmod("b.c", 0o640)
    advise.main(advise.CONFIG(path=("a.c",), format="diff"))
    patch = capsysbinary.readouterr().out
    assert (tmp_path / "a.c").read_bytes() == raw
    subprocess.run(["patch", "-p1", "--binary"], input=patch, check=True, capture_output=True)
    advise.main(advise.CONFIG(path=("b.c",), write=True))
    changed = (tmp_path / "b.c").read_bytes()
    assert (tmp_path / "a.c").read_bytes() == changed != raw
    added = [line for line in changed.splitlines(keepends=True) if b"omp" in line]
    assert added == [
        f"    #pragma omp parallel for private(t){end}".encode(),
        f"\t#pragma omp parallel for{end}".encode(),
        f"        #pragma omp parallel for{end}".encode(),
    ]
    assert b"".join(x for x in changed.splitlines(keepends=True) if b"omp" not in x) == raw
    assert (tmp_path / "b.c").stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.glob(".*")) == []
    before = changed
    advise.main(advise.CONFIG(path=("b.c",), write=True))  # loops that have one are left alone
    assert (tmp_path / "b.c").read_bytes() == before


def test_a_file_that_has_changed_is_not_written(file):
    with pytest.raises(ValueError, match="has changed since it was read; run the command again"):
        edits.write(file, b"other", {1: b"#pragma\n"})
    assert file.read_text() == SOURCE and os.listdir(file.parent) == ["a.c"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_compiler_accepts_what_is_written(file):
    advise.main(advise.CONFIG(path=(str(file),), write=True))
    file.write_text("double g(int);\n" + file.read_text())
    done = subprocess.run(
        ["gcc", "-fopenmp", "-Wall", "-Werror", "-Wno-unused-variable", "-fsyntax-only", str(file)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_fortran_is_edited_in_its_form(tmp_path):
    body = "".join(
        f"      long{k} = a(i)\n      a(i) = a(i) + long{k}\n" for k in range(9)
    )  # many privates, so that the directive needs several lines
    declared = "".join(f"      real long{k}\n" for k in range(9))
    text = f"      subroutine f(a, n)\n      integer n, i\n      real a(n)\n{declared}"
    text += f"      do 10 i = 1, n\n{body}10    continue\n      end\n"
    for name in ("a.f", "a.f90"):
        (tmp_path / name).write_text(text)
        advise.main(advise.CONFIG(path=(str(tmp_path / name),), write=True))
        lines = (tmp_path / name).read_text().splitlines()
        new = [line for line in lines if "omp" in line]
        assert [line for line in lines if "omp" not in line] == text.splitlines()
        assert all(f"long{k}" in " ".join(new) for k in range(9))
        if name == "a.f":
            assert len(new) > 1 and all(len(x) <= 72 and x.startswith("!$omp") for x in new)
        if shutil.which("gfortran"):
            done = subprocess.run(
                ["gfortran", "-fopenmp", "-fsyntax-only", str(tmp_path / name)],
                capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr


def test_check_fails_where_a_directive_races(tmp_path, capsys):
    path = tmp_path / "p.c"
    path.write_text(PRAGMAS)
    found = json.loads(run(check, capsys, path, format="json")[0])
    told = [(f["directive_line"], f["verdict"]) for f in found]
    assert told == [(2, "race-free"), (4, "race"), (9, "cannot tell"), (11, "cannot tell")]
    assert found[1]["lines"] == [6, 6]
    assert found[1]["pragma"] == "#pragma omp parallel for private(t)"
    text, status = run(check, capsys, path)
    assert status == 1 and f"{path}:5 (f): race\n    Line 6 writes t" in text
    path.write_text(SOURCE)
    assert run(check, capsys, path) == ("", 0)


def test_strict_fails_where_nothing_can_be_told(tmp_path, capsys):
    path = tmp_path / "p.c"
    path.write_text("void f(int n, double *a) {\n#pragma omp parallel\n { a[0] = 1; }\n}\n")
    assert run(check, capsys, path)[1] == 0
    assert run(check, capsys, path, strict=True)[1] == 1


def test_sarif_has_what_the_format_demands(tmp_path, capsys):
    path = tmp_path / "p q.c"
    path.write_text(PRAGMAS)
    log = json.loads(run(check, capsys, path, format="sarif")[0])
    (one,) = log["runs"]
    rules = {rule["id"] for rule in one["tool"]["driver"]["rules"]}
    assert log["version"] == "2.1.0" and one["tool"]["driver"]["name"] == "jaxfm"
    for result in one["results"]:
        assert result["ruleId"] in rules and result["message"]["text"]
        assert result["level"] == "none" or result["kind"] == "fail"
        place = result["locations"][0]["physicalLocation"]
        assert place["region"]["startLine"] >= 1 and " " not in place["artifactLocation"]["uri"]
    assert [r["level"] for r in one["results"]] == ["none", "error", "none", "none"]
    related = one["results"][1]["relatedLocations"]
    assert [r["physicalLocation"]["region"]["startLine"] for r in related] == [6, 6]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0\x01binary", "for (;;);".encode("utf-16"), b"\xff\xfe", b"for (",
        b"#pragma omp parallel for", b"#pragma omp\nfor (;;);", b"\xe9" * 50, b"\r\r\r",
        b"{" * 9000, b"_Pragma(\"omp parallel for\") for (i = 0; i < 3; i++) a[i] = 0;",
        b"void f(void) {\n#pragma omp parallel for private(\nfor (int i = 0; i < 3; i++) ;}",
    ],
)  # fmt: skip
def test_malformed_files_are_answered(tmp_path, data, capsys):
    for name in ("x.c", "x.f90", "x.f"):
        (tmp_path / name).write_bytes(data)
        for module in (advise, check):
            assert run(module, capsys, tmp_path / name)[1] == 0
            out = run(module, capsys, tmp_path / name, format="json")[0]
            assert all(f["verdict"] == "cannot tell" for f in json.loads(out))


def test_time_is_limited(tmp_path, capsys):
    loop = "for (int i = 0; i < n; i++) { a[i] = a[i] + 1; }\n"
    path = tmp_path / "many.c"
    path.write_text(f"void f(int n, double *restrict a) {{\n{loop * 30}}}\n")
    found = json.loads(run(advise, capsys, path, format="json", time_limit_s=1e-9)[0])
    assert len(found) == 30
    assert all(f["verdict"] == "cannot tell" and "--time_limit_s" in f["reason"] for f in found)


def test_very_long_files_are_not_read(tmp_path, capsys):
    path = tmp_path / "long.c"
    path.write_text("int x;\n" * 200_000)
    (found,) = json.loads(run(advise, capsys, path, format="json")[0])
    assert "1,400,000 bytes; files of up to 1,000,000 are read" in found["reason"]


def test_folders_are_walked_and_other_files_refused(tmp_path, file):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.F90").write_text("end\n")
    (tmp_path / "c.txt").write_text("")
    assert [p.name for p in source_files([str(tmp_path), str(file)])] == ["a.c", "b.F90"]
    with pytest.raises(ValueError, match=r"c.txt: give a file that ends in one of .*\.c"):
        source_files([str(tmp_path / "c.txt")])
    with pytest.raises(FileNotFoundError, match="no such file"):
        source_files([str(tmp_path / "none.c")])


def test_the_command_line(file):
    module, words = command(["advise", "a.c", "--write", "--", "-b.c"])
    assert module is advise and words[1:] == ["--path=a.c", "--write", "--path=-b.c"]
    with pytest.raises(ValueError, match="Give one of the commands advise, check"):
        command(["advice"])
    assert "--strict=false" in describe(check.CONFIG, check.__doc__)
    file.write_text(PRAGMAS)
    script = [sys.executable, "-m", "jaxfm.launch.hpc", "check", str(file)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "" and ": race\n" in done.stdout
