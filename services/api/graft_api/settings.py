"""Settings of the API: the shared ones and its own limits."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from pydantic import Field, SecretStr

from graft_shared.settings import SharedSettings


class ApiSettings(SharedSettings):
    """What the API alone needs to know."""

    api_keys: SecretStr = SecretStr("")
    """`tenant=key,tenant=key`: who may ask. Without keys the API serves this machine alone."""
    max_body_bytes: int = Field(default=1_000_000, ge=1)
    """The largest JSON body; files have `max_file_bytes`."""
    link_seconds: float = Field(default=600.0, gt=0)
    """How long a link to an adapter's file holds."""
    upload_link_seconds: float = Field(default=3600.0, gt=0, le=43_200)
    """How long a link holds through which a client sends a file to the bucket itself."""
    hub_timeout_seconds: float = Field(default=10.0, gt=0)
    """How long admission waits for the hub to answer for a base that the catalogue lacks."""

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
