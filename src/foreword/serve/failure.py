"""Why a request gets no answer: one sentence, a status, and OpenAI's names for the kind of error."""

from __future__ import annotations

from typing import Any

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Failure(Exception):  # noqa: N818 (it is an answer, the failed request's)
    """Ends a request with `status` and a sentence; `retry_after` (seconds) tells the client to come again."""

    def __init__(self, status: int, sentence: str, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.code, self.retry_after = status, code, retry_after

    def body(self) -> dict[str, Any]:
        """What the client gets, in OpenAI's shape."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


def unknown_model(name: str) -> Failure:
    return Failure(404, f"there is no model {name!r}; GET /v1/models lists what is served.", "model_not_found")


def no_classifier(name: str) -> Failure:
    return Failure(400, f"{name!r} was not trained to classify; ask /v1/completions.", "not_a_classifier")


def empty_text(number: int) -> Failure:
    return Failure(400, f"text {number} is empty; write at least one word.", "empty_text")


def no_words(name: str) -> Failure:
    sentence = f"{name!r} reads its labels off a layer that was trained with it; the base alone cannot answer like it."
    return Failure(400, sentence, "no_label_words")


def not_served(name: str) -> Failure:
    sentence = f"{name!r} reads several texts or gives several labels, which is not served; use `foreword predict`."
    return Failure(400, sentence, "not_a_classifier")


def no_prefix(name: str) -> Failure:
    return Failure(400, f"{name!r} is the base; name a prefix, whose share of attention is asked for.", "no_prefix")


def reads_no_text(name: str) -> Failure:
    return Failure(400, f"{name!r} enters no layer in which the text attends.", "no_attention")


def too_late() -> Failure:
    return Failure(504, "the request took longer than this server allows; ask for fewer tokens.", "timeout")


def broken() -> Failure:
    return Failure(500, "the server failed at this request; its log says why.", "internal_error")


def stopping() -> Failure:
    return Failure(503, "the server is stopping; send the request again.", "unavailable", retry_after=5)
