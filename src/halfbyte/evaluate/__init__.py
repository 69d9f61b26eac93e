"""Measuring a model: perplexity of a text, exact match of answers."""

from __future__ import annotations

from halfbyte.evaluate.exact_match import ExactMatch, exact_match
from halfbyte.evaluate.perplexity import Perplexity, perplexity

__all__ = ["ExactMatch", "Perplexity", "exact_match", "perplexity"]
