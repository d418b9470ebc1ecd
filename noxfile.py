"""`nox` runs all checks; `nox -s tests-3.12` or `nox -s web-4.40` one of them."""

from __future__ import annotations

import nox

TESTED = "tests/constraints/tested.txt"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-c", TESTED, "ruff")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    session.install("-c", TESTED, "-e", ".", "mypy")
    session.run("mypy")


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    session.install("-c", TESTED, "-e", ".[test]")
    session.run("pytest", "-n", "auto", "--ignore=tests/web", *session.posargs)


def _web(session: nox.Session, constraints: str) -> None:
    """The browser tests under one Gradio; they need an installed Chromium."""
    session.install("-c", constraints, "-e", ".[web]", "gradio")
    session.run("pytest", "-n", "2", "--dist", "loadfile", "tests/web", *session.posargs)


@nox.session(name="web-3.41", python="3.11")
def web_of_automatic1111(session: nox.Session) -> None:
    _web(session, "tests/constraints/gradio3.txt")


@nox.session(name="web-4.40", python="3.11")
def web_of_forge(session: nox.Session) -> None:
    _web(session, "tests/constraints/gradio4.txt")
