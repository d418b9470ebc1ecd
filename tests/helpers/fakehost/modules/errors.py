import sys
import traceback

records = []


def report(message, *, exc_info=False):
    records.append(message)
    print(f"*** {message}", file=sys.stderr)
    if exc_info:
        traceback.print_exc()


def display(error, task, *, full_traceback=False):
    report(f"{task}: {error}", exc_info=True)
