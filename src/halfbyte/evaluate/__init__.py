"""Measuring a model: perplexity of a text, exact match of answers, parity with another model."""

from __future__ import annotations

from halfbyte.evaluate.exact_match import ExactMatch, exact_match
from halfbyte.evaluate.parity import Parity, Reference, parity, reference
from halfbyte.evaluate.perplexity import Perplexity, perplexity

__all__ = ["ExactMatch", "Parity", "Perplexity", "Reference", "exact_match", "parity", "perplexity", "reference"]
