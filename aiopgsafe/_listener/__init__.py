"""Notifications for any number of subscribers over one connection, without a silent hole."""

from ._hub import Hub
from ._subscription import Gap, Subscription, check_channel, check_payload

__all__ = ["Gap", "Hub", "Subscription", "check_channel", "check_payload"]
