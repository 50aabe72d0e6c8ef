"""What the command line does beside the demo. It sees what users see: public names only."""

from .doctor import doctor
from .listen import listen
from .tokens import create_tokens, prune_tokens

__all__ = ["create_tokens", "doctor", "listen", "prune_tokens"]
