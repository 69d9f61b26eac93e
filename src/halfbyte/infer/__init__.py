"""Inference: answers from a model, through transformers' own generate."""

from __future__ import annotations

from halfbyte.infer.generate import generate

__all__ = ["generate"]
