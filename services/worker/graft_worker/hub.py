"""The hub, asked so that a worker which asks in vain is soon free for other jobs.

Left to itself the hub's client takes minutes to give up: it connects again and again, waits without end for some of its
answers, and sleeps for as long as a 429 says.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from huggingface_hub import hf_raise_for_status, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory

from graft_shared.errors import BaseModelUnavailable

ANSWER_SECONDS = 5.0  # until the first answer; an attempt that has cost nothing yet may go back to the queue
SILENCE_SECONDS = 10.0  # once it has answered: what the client itself allows most of its requests
AWAY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

# What the client's own HTTP library raises: httpx up to huggingface_hub 1, httpx2 since 2.
HubHTTPError: type[Exception] = next(
    kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError" and kind is not HfHubHTTPError
)

Answer = TypeVar("Answer")


def first_answer(repository: str, ask: Callable[[], Answer]) -> Answer:
    """What the hub answers to one question, within seconds also where each of its addresses swallows what is sent.

    Raises:
        BaseModelUnavailable: It cannot be reached, says nothing, or has no time now.
        HfHubHTTPError: It refuses.
    """
    asking = ThreadPoolExecutor(max_workers=1)
    try:
        return asking.submit(ask).result(timeout=ANSWER_SECONDS)
    except TimeoutError as error:
        reason = f"it has said nothing for {ANSWER_SECONDS:g} s"
        raise BaseModelUnavailable(base_model=repository, reason=reason) from error
    except (HubHTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in AWAY_STATUSES:
            raise
        raise BaseModelUnavailable(base_model=repository, reason=first_line(error)) from error
    finally:
        asking.shutdown(wait=False)


def bound_requests() -> None:
    """Let no request to the hub wait for ever, nor for as long as a busy hub says, anywhere in this process."""
    set_client_factory(_bounded_client)


def first_line(error: Exception) -> str:
    """What an error says, short enough for a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def _bounded_client() -> Any:
    client = default_client_factory()
    ours = {"request": _bound_silence, "response": _believe}
    client.event_hooks = {kind: [*hooks, ours[kind]] for kind, hooks in client.event_hooks.items()}
    return client


def _bound_silence(request: Any) -> None:
    given = request.extensions["timeout"]
    request.extensions["timeout"] = {kind: seconds or SILENCE_SECONDS for kind, seconds in given.items()}


def _believe(response: Any) -> None:
    """A hub that says when to come back is left until then: its client would sleep meanwhile, holding the worker."""
    if response.status_code == 429 or (response.status_code == 503 and "retry-after" in response.headers):
        hf_raise_for_status(response)
