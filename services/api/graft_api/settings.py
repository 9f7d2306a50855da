"""Settings of the API: the shared ones and its own limits."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator

from graft_api.keys.making import check_pepper
from graft_shared.settings import NumberOrNone, SharedSettings


class ApiSettings(SharedSettings):
    """What the API alone needs to know."""

    api_keys: SecretStr = SecretStr("")
    """`tenant=key,tenant=key`: who may ask for everything. Without any key the API serves this machine alone."""
    key_pepper: SecretStr | None = None
    """What keys of the database are hashed under; without it there are none."""
    requests_per_minute: Annotated[int | None, NumberOrNone] = Field(default=None, ge=1)
    """How often a tenant may ask each API process; none is no limit."""
    max_body_bytes: int = Field(default=1_000_000, ge=1)
    """The largest JSON body; files have `max_file_bytes`."""
    link_seconds: float = Field(default=600.0, gt=0)
    """How long a link to an adapter's file holds."""
    upload_link_seconds: float = Field(default=3600.0, gt=0, le=43_200)
    """How long a link holds through which a client sends a file to the bucket itself."""
    hub_timeout_seconds: float = Field(default=10.0, gt=0)
    """How long admission waits for the hub to answer for a base that the catalogue lacks."""

    @field_validator("key_pepper")
    @classmethod
    def _pepper_or_none(cls, given: SecretStr | None) -> SecretStr | None:
        if given is None or not given.get_secret_value():
            return None
        check_pepper(given)
        return given

    @property
    def link_life(self) -> timedelta:
        """How long a link holds."""
        return timedelta(seconds=self.link_seconds)

    @property
    def upload_link_life(self) -> timedelta:
        """How long a link for an upload holds."""
        return timedelta(seconds=self.upload_link_seconds)

    @property
    def hub_cache_dir(self) -> Path:
        """Where configs from the hub are kept; the same cache as a worker's on this machine."""
        return (self.state_dir / "cache" / "hub").absolute()

    @property
    def upload_dir(self) -> Path:
        """Where a file lies while it arrives."""
        return (self.state_dir / "uploads").absolute()
