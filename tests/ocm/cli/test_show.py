"""How reports are printed."""

from ocm.cli import options

TABLE = "| covariance | K = 5 |\n|:---|---:|\n| β | 6.145 |"


def test_a_terminal_is_shown_drawn_tables(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    options.show(TABLE)
    shown = capsys.readouterr().out
    assert "─" in shown
    assert "|" not in shown
    assert "6.145" in shown


def test_a_file_is_given_markdown(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    options.show(TABLE)
    assert capsys.readouterr().out == TABLE + "\n"
