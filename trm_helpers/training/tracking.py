"""Weights & Biases in a separate process, so that it can neither delay nor end training.

The trainer writes one JSON line per epoch to the process's standard input without waiting. Import,
login, network and upload of W&B happen in that process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ..schema import WANDB_MODES
from ..software import call_within

_CONNECT_WITHIN = 3.0  # seconds, to W&B's server
_LOGIN_WITHIN = 10.0  # seconds
_FINISH_WITHIN = 15.0  # seconds after the last epoch


class Tracker:
    """Log one row per epoch to W&B; :meth:`close` waits up to 15 seconds for the upload.

    Args:
        mode: ``disabled``, ``offline`` or ``online``, restricted as in :func:`allowed_mode`.
        settings: JSON values: ``project``, ``name``, ``dir`` and ``config``.
    """

    def __init__(self, mode: str, settings: Mapping):
        self.process = None
        mode = allowed_mode(mode)
        if mode == "disabled":
            return
        home = str(Path(__file__).resolve().parents[2])  # the folder of the package
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        try:  # a new session: Ctrl-C in the terminal reaches the trainer only
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__], start_new_session=True, text=True,
                env={**os.environ, "PYTHONPATH": path, "WANDB_MODE": mode},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as error:
            print(f"W&B is off: {error}")
            return
        os.set_blocking(self.process.stdin.fileno(), False)
        self._printer = threading.Thread(target=self._repeat, args=[self.process.stdout],
                                         daemon=True)
        self._printer.start()
        self.log({"mode": mode, **settings})

    @staticmethod
    def _repeat(lines: Iterable[str]) -> None:
        for line in lines:
            print(line, end="", flush=True)

    def log(self, row: Mapping) -> None:
        """Send a row; dropped if the process has ended or its pipe is full."""
        if self.process is not None:
            with contextlib.suppress(OSError):  # a line is written whole or not at all
                os.write(self.process.stdin.fileno(), json.dumps(row).encode() + b"\n")

    def close(self) -> None:
        if self.process is None:
            return
        process, self.process = self.process, None
        process.stdin.close()  # the end of the rows
        try:
            if process.wait(_FINISH_WITHIN):
                print("W&B ended before the training and lacks rows; metrics.jsonl has all")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"W&B did not finish within {_FINISH_WITHIN:g} s; `wandb sync` uploads what it "
                  "has, and metrics.jsonl has all rows")
        self._printer.join(1.0)


def allowed_mode(asked: str) -> str:
    """The requested mode, or ``$WANDB_MODE`` if more restrictive; ``$WANDB_DISABLED`` disables."""
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes", "on"):
        return "disabled"
    given = os.environ.get("WANDB_MODE", "").strip().lower()
    given = {"": "online", "run": "online", "dryrun": "offline"}.get(given, given)
    if given not in WANDB_MODES:
        given = "offline"
    return min(asked, given, key=WANDB_MODES.index)


def main() -> None:
    """Log rows from standard input, online if login succeeds within seconds, otherwise offline."""
    given = json.loads(sys.stdin.readline())
    import wandb

    quiet = dict(console="off", silent=True)
    run = None
    if given.pop("mode") == "online":
        try:
            settings = wandb.Settings(init_timeout=_LOGIN_WITHIN, login_timeout=_LOGIN_WITHIN,
                                      **quiet)
            connect(os.environ.get("WANDB_BASE_URL") or settings.base_url)
            run = wandb.init(mode="online", settings=settings, **given)
            print(f"W&B: {run.url}", flush=True)
        except (Exception, SystemExit) as error:  # of any type, from W&B or the network
            reason = str(error).strip().splitlines() or [type(error).__name__]
            print(f"W&B logs offline ({reason[0]}); `wandb sync` uploads it later", flush=True)
    if run is None:
        os.environ["WANDB_MODE"] = "offline"
        os.environ.pop("WANDB_BASE_URL", None)  # which offline runs check as well
        run = wandb.init(mode="offline", settings=wandb.Settings(**quiet), **given)
    for line in sys.stdin:
        row = json.loads(line)
        run.log(row, step=row["epoch"])
    end = threading.Timer(6 * _FINISH_WITHIN, os._exit, [1])  # the trainer may have been killed
    end.daemon = True
    end.start()
    run.finish()
    os._exit(0)  # W&B's own exit waits for a server that does not answer, also offline


def connect(url: str) -> None:
    """Raise ``ConnectionError`` unless the host accepts a connection within three seconds."""
    address = urlsplit(url)
    host, port = address.hostname, address.port or {"http": 80}.get(address.scheme, 443)
    if not host:
        raise ConnectionError(f"{url!r} is no address like https://api.wandb.ai")
    try:
        call_within(_CONNECT_WITHIN,
                    lambda: socket.create_connection((host, port), _CONNECT_WITHIN).close())
    except OSError as error:  # TimeoutError is one
        raise ConnectionError(f"{host} cannot be reached") from error


if __name__ == "__main__":
    try:
        main()
    except (Exception, SystemExit) as fault:  # of any type, from W&B or the packages it imports
        print(f"W&B is off: {type(fault).__name__}: {fault}", flush=True)
        sys.exit(1)
