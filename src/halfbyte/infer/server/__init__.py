"""The engine over HTTP, in the way of OpenAI's API. Needs the extra `serve`."""

from halfbyte.infer.server.app import Limits, make_app

__all__ = ["Limits", "make_app"]
