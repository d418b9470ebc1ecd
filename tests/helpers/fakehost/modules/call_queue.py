import collections
import threading


class FIFOLock:
    """First come, first served; no timeout, as in the hosts."""

    def __init__(self):
        self._inner = threading.Lock()
        self._held = False
        self._waiting = collections.deque()

    def acquire(self, blocking=True):
        with self._inner:
            if not self._held:
                self._held = True
                return True
            if not blocking:
                return False
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()
        return True

    def release(self):
        with self._inner:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._held = False

    __enter__ = acquire

    def __exit__(self, *_):
        self.release()


queue_lock = FIFOLock()
