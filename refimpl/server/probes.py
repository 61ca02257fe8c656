"""What watches the server asks: is it alive, is it ready, which version is it."""

from importlib.metadata import version
from typing import Literal, TypedDict

from refimpl.server.lifecycle import Service


class Status(TypedDict):
    """All is well."""

    status: Literal["ok"]


class Version(TypedDict):
    """Of this server."""

    version: str


def health(service: Service) -> Status:
    """Whether the process does what it should, be it loading or ending.

    Raises:
        Problem: 503, the model could not be loaded or the engine failed.
    """
    if service.state == "failed":
        raise service.unavailable("The server has failed and must be started anew.")
    return Status(status="ok")


def ready(service: Service) -> Status:
    """Whether completions are taken.

    Raises:
        Problem: 503, not yet or not any more.
    """
    if service.state != "ready":
        raise service.unavailable(f"The server is not ready: it is {service.state}.")
    return Status(status="ok")


def program_version() -> Version:
    """The version of the package."""
    return Version(version=version("refimpl"))
