"""`aiopgsafe listen` and `aiopgsafe doctor`. They see what users see: public names only."""

from .doctor import doctor
from .listen import listen

__all__ = ["doctor", "listen"]
