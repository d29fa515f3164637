"""What the fleet may run: content-addressed artefacts, and the models registered from them."""

from .artefacts import Artefacts
from .config import ArtefactConfig
from .models import Models

__all__ = ["ArtefactConfig", "Artefacts", "Models"]
