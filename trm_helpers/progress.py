"""One line on the terminal for each stage of long work."""

from __future__ import annotations

import io
import re
import sys
import time

_BAR = re.compile(r"(.*?):? *\d+%\|.*\| *(\d+)/(\d+) \[[\d:]+<([\d:?]+)")  # as tqdm writes it
# the trainer's lines; the last one names no minutes left
_EPOCH = re.compile(r"epoch (\d+) of (\d+): .*?(?:about ([\d.]+) minutes left)?$")


def without_colours(text: str) -> str:
    """``text`` without the terminal's escape sequences."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


class Stage(io.TextIOBase):
    """A line on the terminal for a stage of the work, from the progress bars written into it.

    On a terminal the line is rewritten while the stage lasts; elsewhere it is printed when the
    stage begins and when it ends. Other text than bars is passed on.

    Args:
        title: such as ``[2/10] demonstrations``.
        rest: minutes that later stages are expected to take.
    """

    def __init__(self, title: str, rest: float | None = None):
        super().__init__()
        self.title, self.output, self.started = title, sys.stderr, time.monotonic()
        self.then = "" if rest is None else f", then about {max(1, round(rest))} min"
        self.share = self.left = ""
        self.passing = False  # the share is of a bar within the stage, not of the stage

    def __enter__(self) -> Stage:
        if self.output.isatty():
            self._show()
        else:
            print(f"{self.title} ...", file=self.output, flush=True)
        return self

    def __exit__(self, error: type | None, *_) -> None:
        minutes = (time.monotonic() - self.started) / 60
        self.left = f", {'stopped' if error else 'done'} after {minutes:.1f} min"
        if self.passing and not error:
            self.share = ""
        self._show(last=True)

    def write(self, text: str) -> int:
        for line in self.follow(text):
            self.output.write(f"{self._clear()}{line}\n")
        return len(text)

    def follow(self, text: str) -> list[str]:
        """Show the progress in ``text``; returns its other lines."""
        others = []
        for line in filter(str.strip, re.split(r"[\r\n]+", without_colours(text))):
            bar, epoch = _BAR.match(line), _EPOCH.match(line)
            if bar:
                what, done, of, left = bar.groups()
                seconds = sum(int(part) * 60**power for power, part in
                              enumerate(reversed(left.split(":"))) if part != "?")
                minutes = seconds / 60
            elif epoch:
                what, done, of, minutes = "epoch", *epoch.groups("0")
            else:
                others.append(line)
                continue
            what = "" if what.partition(" ")[0] in self.title else f" {what}"
            self.share, self.passing = f"{what} {done} of {of}", bool(what) and not epoch
            self.left = f", {float(minutes):.1f} min" if float(minutes) else ""
            self._show()
        return others

    def _show(self, last: bool = False) -> None:
        if last or self.output.isatty():
            self.output.write(f"{self._clear()}{self.title}{self.share}{self.left}{self.then}"
                              + "\n" * last)
            self.output.flush()

    def _clear(self) -> str:
        return "\r\x1b[K" if self.output.isatty() else ""
