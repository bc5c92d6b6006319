"""Prompts in columns of tables: Parquet, and CSV and TSV by name of the column."""

from __future__ import annotations

import pytest

from marble_jax.errors import InputError
from marble_jax.prompts.files import read_directory, read_file


def _write(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_the_column_is_found_or_named(tmp_path):
    file = _write(tmp_path / "a.parquet", id=[1, 2], Prompt=["a cat", "a dog"], long=["x", "y"])
    prompts = read_file(str(file))
    assert [p.text for p in prompts] == ["a cat", "a dog"] and prompts[0].source == "a"
    assert [p.text for p in read_file(f"{file}#long")] == ["x", "y"]


def test_a_prompt_directory_may_hold_parquet(tmp_path):
    _write(tmp_path / "general" / "train.parquet", caption=["a cat"])
    assert [p.text for p in read_directory(tmp_path, "train")["general"]] == ["a cat"]


def test_columns_of_text_tables(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("prompt,other\na cat,a dog\n")
    assert [p.text for p in read_file(f"{file}#other")] == ["a dog"]
    with pytest.raises(InputError, match="expected a header with a column 'third'"):
        read_file(f"{file}#third")
    text = tmp_path / "b.txt"
    text.write_text("a cat\n")
    with pytest.raises(InputError, match=r"expected a column \('x'\) with a table alone"):
        read_file(f"{text}#x")
    (tmp_path / "c#1.txt").write_text("a bird\n")
    assert [p.text for p in read_file(str(tmp_path / "c#1.txt"))] == ["a bird"]


def test_what_is_wrong_is_one_line(tmp_path):
    file = _write(tmp_path / "a.parquet", prompt=["a cat", None], words=["x", "y"], n=[1, 2])
    for place, line in (
        (file, "row 2: expected a text in 'prompt'; received None"),
        (f"{file}#n", "row 1: expected a text in 'n'; received 1"),
        (f"{file}#wordz", "expected a column 'wordz'; received .*did you mean 'words'"),
    ):
        with pytest.raises(InputError, match=line):
            read_file(str(place))
    other = _write(tmp_path / "b.parquet", n=[1])
    with pytest.raises(InputError, match=r"expected a column 'prompt' \(or FILE#COLUMN\)"):
        read_file(str(other))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(file.read_bytes()[:60])
    with pytest.raises(InputError, match="cut.parquet: expected a Parquet file; received"):
        read_file(str(cut))
    with pytest.raises(InputError, match="expected a prompt file; received No such file"):
        read_file(str(tmp_path / "none.parquet"))


def test_two_columns_of_one_name_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    arrays = [pyarrow.array(["a cat"]), pyarrow.array(["a dog"])]
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=["prompt", "prompt"]), file)
    for place in (file, f"{file}#prompt"):
        with pytest.raises(InputError, match="expected one column 'prompt'; received 2"):
            read_file(str(place))


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_damaged_pages_are_one_line(tmp_path, compression):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    texts = [f"prompt {number}" for number in range(500)]
    parquet.write_table(pyarrow.table({"prompt": texts}), file, compression=compression)
    whole = file.read_bytes()
    refused = 0
    for place in range(4, len(whole) // 2, 97):
        file.write_bytes(whole[:place] + b"\xff" * 8 + whole[place + 8 :])
        try:
            # Pages have no checksum: other letters are other prompts.
            read_file(str(file))
        except InputError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 0


def test_text_that_is_no_utf8_is_one_line(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    offsets = pyarrow.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0]))
    column = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\xff\xfe")]
    )
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": column}), file)
    with pytest.raises(InputError, match="an error behind row 0: UnicodeDecodeError"):
        read_file(str(file))


def test_without_pyarrow_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="expected the package pyarrow for Parquet files"):
        read_file(str(file))
