"""The routes of webhooks."""

from __future__ import annotations

import json
import time
from typing import Any

from fastapi import APIRouter
from pydantic import ValidationError

from graft_api.auth import MayReadJobs, MayUseWebhooks
from graft_api.deps import Here, JsonBody
from graft_api.errors import documented
from graft_api.jobs.service import WEBHOOKS_ARE_OFF
from graft_api.paging import Page, envelope
from graft_api.parsing import error_of
from graft_api.webhooks.schemas import SigningSecret, WebhookBody, WebhookTest, WebhookTested
from graft_shared.errors import InvalidParameter, NotFound, UnknownParameter
from graft_shared.ids import new_webhook_id
from graft_shared.store import Webhook
from graft_shared.webhooks import NotTaken, Postman, TargetRefused, signing_secret

router = APIRouter(tags=["webhooks"])

TEST_TYPE = "graft.webhook.test"
_TEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": WebhookTest.model_json_schema()}},
    }
}


class WebhooksNotSetUp(NotFound):
    """There are no webhooks here: {reason}."""


@router.get("/webhooks/secret", summary="What webhooks are signed with", responses=documented(404))
def get_secret(tenant: MayUseWebhooks, here: Here) -> SigningSecret:
    """Return this tenant's signing secret; a receiver needs it to know what comes from here."""
    return SigningSecret(secret=signing_secret(_postman(here).root, tenant))


@router.post(
    "/webhooks/test",
    summary="Send a webhook that is about nothing",
    openapi_extra=_TEST_BODY,
    responses=documented(404, 413, 415),
)
def test_webhook(tenant: MayUseWebhooks, body: JsonBody, here: Here) -> WebhookTested:
    """Send one message now, once, and tell what came of it."""
    url, id = _url_of(body), new_webhook_id()
    message = {"id": id, "object": "event", "type": TEST_TYPE, "created_at": int(time.time()), "data": {}}
    try:
        postman = _postman(here)
        with here.trials.one_of(tenant):
            postman.deliver(id=id, tenant=tenant, url=url, body=json.dumps(message))
    except (TargetRefused, NotTaken) as error:
        return WebhookTested(delivered=False, reason=str(error))
    return WebhookTested(delivered=True, reason=None)


@router.get(
    "/jobs/{job_id}/webhooks", summary="What was sent about a job's end", tags=["jobs"], responses=documented(404)
)
def list_webhooks(job_id: str, tenant: MayReadJobs, here: Here) -> Page[WebhookBody]:
    """Return the job's webhook and how far it has come; nothing before the job's end, or without a `webhook_url`."""
    bodies = [_body(webhook) for webhook in here.outbox.of_job(tenant, job_id)]
    return envelope(bodies, [body.id for body in bodies], has_more=False)


def _url_of(body: Any) -> str:
    if not isinstance(body, dict):
        raise InvalidParameter("The body must be a JSON object with one key, 'url'.")
    for key in body:
        if key != "url":
            raise UnknownParameter(param=key, hint="Known here: url.")
    try:
        return WebhookTest.model_validate(body, strict=True).url
    except ValidationError as error:
        raise error_of(error.errors(), body=body) from error


def _postman(here: Here) -> Postman:
    if here.postman is None:
        raise WebhooksNotSetUp(reason=WEBHOOKS_ARE_OFF)
    return here.postman


def _body(webhook: Webhook) -> WebhookBody:
    return WebhookBody(
        id=webhook.id,
        url=webhook.url,
        type=webhook.type,
        tries=webhook.tries,
        delivered_at=int(webhook.delivered_at.timestamp()) if webhook.delivered_at else None,
        next_try_at=int(webhook.next_try_at.timestamp()) if webhook.next_try_at else None,
        error=webhook.said,
    )
