"""streammap.replay.open of version 0.1 is streammap.open_request."""

from streammap.api import open_request as open

__all__ = ["open"]
