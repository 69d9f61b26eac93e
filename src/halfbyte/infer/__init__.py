"""Answers: the engine, and generation with a transformers model."""

from halfbyte.infer.engine import Engine
from halfbyte.infer.generate import generate
from halfbyte.infer.requests import Completion, Event, Handle
from halfbyte.infer.sampling import Choice, SamplingParams

__all__ = ["Choice", "Completion", "Engine", "Event", "Handle", "SamplingParams", "generate"]
