"""A program on a terminal of its own, for what it shows only there, and for Ctrl-C as a keyboard sends it."""

import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
import time


class Terminal:
    def __init__(self, command: list[str], environment: dict[str, str], columns: int = 100):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        # The terminal's foreground group is the program's, so Ctrl-C reaches it and every child in its group.
        self.process = subprocess.Popen(
            command, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                data = os.read(self.master, 4096)
            except OSError:  # the last process that held it is gone
                return
            if not data:
                return
            self.text += data.decode("utf-8", "replace")

    def wait_for(self, text: str, timeout: float = 60):
        deadline = time.monotonic() + timeout
        while text not in self.text:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < deadline, f"{text!r} did not come:\n{self.text}"
            time.sleep(0.02)

    def press_ctrl_c(self):
        os.write(self.master, b"\x03")

    def wait(self, timeout: float = 60) -> int:
        """Its exit status, when all that it wrote is read."""
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        os.close(self.master)
