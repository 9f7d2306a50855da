"""What the routes of webhooks take and answer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from graft_shared.specs import NO_NUL


class SigningSecret(BaseModel):
    """By what the receivers of this tenant's webhooks know that they are ours."""

    secret: str = Field(description="`whsec_…`, as Standard Webhooks and `openai`'s `webhooks.unwrap` take it.")


class WebhookTest(BaseModel):
    """Where to send a message that is about nothing."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"url": "https://hooks.example.com/graft"}]}
    )

    url: str = Field(max_length=2048, pattern=NO_NUL)


class WebhookTested(BaseModel):
    """What came of it."""

    delivered: bool
    reason: str | None = Field(description="Why it was not taken.")


class WebhookBody(BaseModel):
    """One message about a job's end."""

    id: str = Field(description="Its `webhook-id`, the same at every try.")
    url: str
    type: str
    tries: int
    delivered_at: int | None = Field(description="Unix seconds.")
    next_try_at: int | None = Field(description="Unix seconds; null once it is delivered or given up.")
    error: str | None = Field(description="What went wrong at the last try.")
