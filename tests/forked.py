"""A command, or another program, in a process of its own that can be killed, without the seconds of importing torch.

`tests/test_cli.py` and others start the installed command anew; where only signals and files matter a fork will do.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence

from gen_invariance.cli.main import run


class ForkedCommand:
    """What `subprocess.Popen` of the command line gives, as far as tests need it; it leads its process group."""

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        before: Callable[[], None] | None = None,
        program: Callable[[list[str]], int] = run,
    ) -> None:
        self._streams = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  (open until the command ended)
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            self._carry_out([str(each) for each in arguments], before, program)

    def _carry_out(
        self, arguments: list[str], before: Callable[[], None] | None, program: Callable[[list[str]], int]
    ) -> None:
        code = 1
        try:
            os.setsid()
            for number, stream in enumerate(self._streams, start=1):
                os.dup2(stream.fileno(), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, encoding="utf-8", closefd=False) for number in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if before:
                before()
            code = int(program(arguments))
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:  # whatever happens, the fork is not to go on with the tests
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end; what it wrote to its output and as errors."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"the command did not end in {timeout} seconds")
            time.sleep(0.005)
        written = []
        for stream in self._streams:
            stream.seek(0)
            written.append(stream.read().decode())
            stream.close()
        return written[0], written[1]
