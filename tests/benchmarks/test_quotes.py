"""The command that writes figures into documents; what it writes is tested with the README."""

import pytest
from records import commands, quotes


@pytest.fixture
def document(tmp_path, monkeypatch):
    """A document whose only block is of old figures."""
    file = tmp_path / "README.md"
    file.write_text("Before.\n<!-- figures: products -->\nold\n<!-- end -->\nAfter.\n")
    monkeypatch.setattr(quotes, "ROOT", tmp_path)
    monkeypatch.setattr(quotes, "DOCUMENTS", (file,))
    return file


def test_a_check_writes_nothing_and_fails(document, capsys):
    before = document.read_text()
    with pytest.raises(SystemExit) as stopped:
        commands.main(["quotes", "--check"])
    assert stopped.value.code == 1
    assert capsys.readouterr().out == "differs: README.md\n"
    assert document.read_text() == before


def test_blocks_are_written_and_nothing_else(document, capsys):
    commands.main(["quotes"])
    assert capsys.readouterr().out == "written: README.md\n"
    text = document.read_text()
    assert "old" not in text
    assert "`hutchinson` takes" in text
    assert text.startswith("Before.\n<!-- figures: products -->\n")
    assert text.endswith("<!-- end -->\nAfter.\n")
    commands.main(["quotes", "--check"])
    assert capsys.readouterr().out == "differs: nothing\n"


def test_errors_are_a_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .* must hold a record of benchmarks/run\.py"):
        commands.main(["report", str(tmp_path)])
