"""Console output of a run: lines, progress bars and the closing table."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from epo_kernels.train.evaluate import Record, compare
from epo_kernels.train.io.progress import Progress, Report, every
from epo_kernels.train.io.text import printable

PLAIN_WIDTH = 120  # of tables in a log
LOG_EVERY = 30.0  # seconds between two progress lines of a phase


class Display:
    """Lines and bars on a terminal; otherwise lines only, with timestamps, and progress every `LOG_EVERY` seconds."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        for line in printable(text).split("\n"):
            stamp = "" if self.console.is_terminal else time.strftime("%Y-%m-%d %H:%M:%S ")
            self.console.print(Text(stamp + line))  # as Text, so that nothing is parsed as markup

    @contextmanager
    def bar(
        self, name: str, total: int | None, unit: str = "episodes", check: Callable[[], None] = lambda: None
    ) -> Iterator[Report]:
        """Yields a function to call with the amount done so far, of `total`; it also calls `check`, which may raise.

        `total` is None if the amount is unknown. Without a terminal, progress is logged every `LOG_EVERY` seconds, even
        if nothing new was reported.
        """
        task = self._bars.add_task(name, total=total)
        progress = Progress(name, total, unit)

        def update(done: float) -> None:
            progress.done = done
            self._bars.update(task, completed=done)
            check()

        with every(LOG_EVERY, lambda: self.say(progress.line())) if not self.console.is_terminal else nullcontext():
            try:
                yield update
            finally:
                self._bars.remove_task(task)

    def table(self, records: Sequence[Record]) -> None:
        """Before and after side by side, followed by the paired intervals of the differences."""
        shown = [record for record in records if record.when in ("before", "after")]
        if not shown:
            return
        kind = "tasks" if any(record.panel == "train" for record in shown) else "held-out tasks"
        table = Table(title=f"Evaluation on the same {kind}", title_justify="left")
        for column in ("panel", "decoding", "when", "episodes", "mean score", "success (95 %)", "official success"):
            table.add_column(column, justify="left" if column in ("panel", "decoding", "when") else "right")
        for record in sorted(shown, key=lambda r: (r.panel, r.decoding, r.step)):
            table.add_row(
                record.panel,
                record.decoding,
                record.when,
                str(record.episodes),
                f"{record.mean_score:.1f}",
                f"{record.success:.1%} ({record.success_low:.1%} to {record.success_high:.1%})",
                f"{record.official_success:.1%}",
            )
        self.console.print(table)
        for comparison in compare(records):
            self.say(comparison.sentence())
