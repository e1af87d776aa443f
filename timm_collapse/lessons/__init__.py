"""What a training step of an orderer is made of: which sets of patches it sees, and what they are worth."""

from .comae import alternate
from .features import FeatureLesson
from .pixels import Lesson

__all__ = ["FeatureLesson", "Lesson", "alternate"]
