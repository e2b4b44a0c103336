import io

from rich.console import Console

from epo_kernels.train.io.display import Display
from epo_kernels.train.io.text import printable


def test_what_steers_a_terminal_is_shown_instead():
    assert (
        printable("go\x1b[2J \x07\x9b \u202e \ud800 é 林 \u200b")
        == "go\\x1b[2J \\x07\\x9b \\u202e \\ud800 é 林 \\u200b"
    )
    assert printable("two\nlines\tand a tab\r") == "two\nlines\tand a tab\\r"


def test_nothing_is_markup_on_the_console():
    out = io.StringIO()
    text = "[bold]x[/bold] [link=http://evil]y[/link] :smile: \\[red] \x1b]0;title\x07 [/]"
    Display(Console(file=out, force_terminal=True, width=200)).say(text)
    shown = out.getvalue()
    assert "[bold]x[/bold] [link=http://evil]y[/link] :smile: \\[red] \\x1b]0;title\\x07 [/]" in shown
    assert "\x1b" not in shown
