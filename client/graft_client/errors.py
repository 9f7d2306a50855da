"""What can go wrong for a user of the client, as one small tree.

GraftClientError
├── GraftAPIError          the service answered, and refused
├── ServiceUnreachable     nothing answered
├── AnswerUnreadable       something answered that is not the service
├── KeyNotSendable         the API key holds what no header may
├── NetworkSettingsWrong   the environment names a proxy or certificates that cannot be used
├── NotJson                the spec holds what JSON has no word for
├── SpecUnreadable         the spec's file cannot be read, or is neither JSON nor YAML
├── DownloadCorrupt        bytes arrived that are not the ones that the manifest promises
├── TargetNotEmpty         a download would write over something
└── WaitedTooLong          the job did not end in time
"""

from __future__ import annotations

import re
from typing import Any

import httpx

_OWN_KEYS = frozenset({"message", "type", "param", "code", "facts"})


class GraftClientError(Exception):
    """Something went wrong on the way to the service or back."""


class GraftAPIError(GraftClientError):
    """The service answered with an error; `facts` are the numbers that came with it."""

    def __init__(
        self, *, status: int, code: str, message: str, param: str | None, facts: dict[str, Any], request_id: str | None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.facts = facts
        self.request_id = request_id

    @classmethod
    def from_response(cls, response: httpx.Response) -> GraftAPIError:
        """Read the error body of an answer (its content must have been read); tolerates a proxy's HTML."""
        error = _error_object(response)
        facts = {key: value for key, value in error.items() if key not in _OWN_KEYS} | (error.get("facts") or {})
        return cls(
            status=response.status_code,
            code=str(error.get("code") or f"http_{response.status_code}"),
            message=str(error.get("message") or f"The service answered {response.status_code} with no explanation."),
            param=error.get("param"),
            facts=facts,
            request_id=response.headers.get("x-request-id"),
        )

    @classmethod
    def from_refusal(cls, estimate: dict[str, Any]) -> GraftAPIError:
        """Read an estimate that says that nothing here holds the job: the same facts as a refused POST has."""
        facts = {key: value for key, value in estimate.items() if key not in _OWN_KEYS | {"object", "fits", "spec"}}
        code, message = str(estimate["code"]), str(estimate["message"])
        return cls(status=422, code=code, message=message, param=None, facts=facts, request_id=None)

    @property
    def is_users(self) -> bool:
        """Whether the user can mend it: everything in 4xx."""
        return self.status < 500


class ServiceUnreachable(GraftClientError):
    """Nothing answers at the service's address."""

    def __init__(self, base_url: str, reason: str) -> None:
        self.reason = reason
        address = without_userinfo(base_url)
        super().__init__(
            f"No answer from {address} ({reason}). Is the service running? "
            "Start it with `graft up`, and with the --state-dir that it had."
        )

    @property
    def is_refused(self) -> bool:
        """Whether the machine answered that nothing listens there."""
        cause = self.__cause__
        while cause is not None and not isinstance(cause, ConnectionRefusedError):
            cause = cause.__cause__ or cause.__context__  # httpcore cuts the chain of causes
        return cause is not None

    @property
    def is_late(self) -> bool:
        """Whether something listens there, and did not answer in time."""
        return isinstance(self.__cause__, httpx.ReadTimeout)


class AnswerUnreadable(GraftClientError):
    """An answer is no JSON: a proxy's page, or something else that listens at the address."""

    def __init__(self, response: httpx.Response) -> None:
        kind = response.headers.get("content-type", "no content type")
        super().__init__(
            f"{response.request.method} {response.url.path} was answered {response.status_code} with something that is "
            f"not JSON ({kind}). Is GRAFT_URL the address of the service, or a proxy's page in between?"
        )


class KeyNotSendable(GraftClientError):
    """The API key is not printable ASCII; the message never shows it."""


class NetworkSettingsWrong(GraftClientError):
    """What the environment says of the network cannot be used; nothing was sent."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason = f"what the environment says of the network cannot be used ({reason})"
        self.remedy = remedy
        super().__init__(f"W{self.reason[1:]}: {remedy}.")


class NotJson(GraftClientError):
    """The spec cannot be sent: it holds something that JSON has no word for, such as NaN."""


class SpecUnreadable(GraftClientError):
    """The spec cannot be read from where it is said to be."""


class DownloadCorrupt(GraftClientError):
    """A file arrived with other bytes than the manifest promises."""


class TargetNotEmpty(GraftClientError):
    """The folder to download into holds something already."""


class WaitedTooLong(GraftClientError):
    """The job did not end within the time that the caller gave."""


def without_userinfo(address: str) -> str:
    """An address to be shown: without the user and the password that may stand before its host."""
    return re.sub(r"^(\w+://)?\S*@", r"\1", address)


def _error_object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else {}
