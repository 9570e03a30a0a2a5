"""Named steps of everything that is written, where tests let the process die, the disk be full or Ctrl-C be pressed.

Every write, flush to disk, rename and line of a manifest is a step, counted from 1. `STREAMCNN_FAULT` chooses what happens at one of
them, as `action@number`:

    exit@12        the process ends at step 12, as if it were killed: no buffer is written, nothing is tidied up
    full@12        step 12, and each one after it, fails as on a full disk
    interrupt@12   Ctrl-C at step 12; interrupt2@12: Ctrl-C twice
    list@1         nothing happens

With each of them the names of the steps go to the file that `STREAMCNN_FAULT_LOG` names, if it does.
"""

import errno
import os
import signal

EXIT_CODE = 99
"""Of a process that ended at its step."""
_ACTIONS = ("exit", "full", "interrupt", "interrupt2", "list")


class _Fault:
    def __init__(self, text: str, log: str | None):
        self.action, _, number = text.partition("@")
        if self.action not in _ACTIONS or not number.isdigit():
            raise ValueError(f"STREAMCNN_FAULT must be one of {', '.join(_ACTIONS)}, then @ and a number, got {text!r}; unset it")
        self.number, self.log, self.count = int(number), log, 0

    def reach(self, name: str) -> None:
        self.count += 1
        if self.log is not None:
            with open(self.log, "a", encoding="utf-8") as file:  # noqa: PTH123 - nothing but what a dying process needs
                file.write(f"{self.count} {name}\n")
        if self.action == "full" and self.count >= self.number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        if self.count != self.number:
            return
        if self.action == "exit":
            os._exit(EXIT_CODE)
        if self.action.startswith("interrupt"):
            for _ in range(2 if self.action == "interrupt2" else 1):
                signal.raise_signal(signal.SIGINT)


_fault: _Fault | None = None


def inject(text: str | None, log: str | None = None) -> None:
    """Set what happens at which step, and count from 1 again; None: nothing."""
    global _fault
    _fault = None if not text else _Fault(text, log)


def step(name: str) -> None:
    """A step of writing that is about to be done; `name` says which, with the file it is about."""
    if _fault is not None:
        _fault.reach(name)


inject(os.environ.get("STREAMCNN_FAULT"), os.environ.get("STREAMCNN_FAULT_LOG"))
