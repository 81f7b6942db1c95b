"""From pieces of text to OpenAI's JSON, one object a choice, streamed or whole."""

from collections.abc import Sequence
from typing import Any

from marrow.core.errors import RequestError
from marrow.serve.sequence import TokenLogprobs
from marrow.serve.stream import Delta, Stream

Json = dict[str, Any]


class Choice:
    """One completion of a request, as /v1/completions gives it.

    Args: echo: the prompt's text, to be repeated in front; "" for none. token_bytes: the bytes of
    each token, by id.
    """

    kind, event_kind = "text_completion", "text_completion"

    def __init__(
        self,
        index: int,
        stream: Stream,
        token_bytes: Sequence[bytes],
        *,
        echo: str = "",
        with_logprobs: bool = False,
    ) -> None:
        self.index = index
        self.stream = stream
        self.num_drawn = 0
        self._token_bytes = token_bytes
        self._echo = echo
        self._with_logprobs = with_logprobs
        self._offset = 0
        self._text: list[str] = []
        self._scores: list[TokenLogprobs] = []

    def opening(self) -> list[Json]:
        """Return what a stream begins with."""
        return [{"index": self.index, "text": self._echo, "logprobs": None, "finish_reason": None}] * bool(
            self._echo
        )

    def take(self, delta: Delta) -> Json | None:
        """Take a piece; return it as a streamed choice, or None if it shows nothing yet.

        Raises: RequestError when the engine ended the request, which is not this client's doing.
        """
        if delta.finish_reason == "abort":
            raise RequestError("the server is shutting down", status=503, hint="try another replica")
        self.num_drawn += len(delta.token_ids)
        self._text.append(delta.text)
        scores = (*delta.prompt_logprobs, *delta.logprobs)
        self._scores += scores
        if not (delta.text or scores or delta.finish_reason):
            return None
        return self._event(delta.text, self._logprobs(scores), delta.finish_reason)

    def whole(self) -> Json:
        """Return the choice when its last piece was taken."""
        self._offset = 0
        last = self.stream.last
        text, scores = self._echo + "".join(self._text), self._logprobs(self._scores)
        return self._whole(text, scores, last.finish_reason if last else None)

    @property
    def num_shared(self) -> int:
        """Prompt tokens that the prefix cache had."""
        return self.stream.last.num_shared if self.stream.last else 0

    def _event(self, text: str, scores: Json | None, reason: str | None) -> Json:
        return {"index": self.index, "text": text, "logprobs": scores, "finish_reason": reason}

    def _whole(self, text: str, scores: Json | None, reason: str | None) -> Json:
        return self._event(text, scores, reason)

    def _logprobs(self, scores: tuple[TokenLogprobs, ...] | list[TokenLogprobs]) -> Json | None:
        if not self._with_logprobs:
            return None
        tokens = [shown(self._token_bytes[score.token_id]) for score in scores]
        offsets = []
        for score in scores:
            offsets.append(self._offset)
            self._offset += len(self._token_bytes[score.token_id].decode(errors="replace"))
        top = [
            {shown(self._token_bytes[id]): value for id, value in score.top}
            if score.logprob is not None
            else None
            for score in scores
        ]
        values = [score.logprob for score in scores]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def shown(token: bytes) -> str:
    """Return a token as text; a part of a character as OpenAI writes it, so that no two tokens look alike."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


class ChatChoice(Choice):
    """One answer of a conversation, as /v1/chat/completions gives it."""

    kind, event_kind = "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Json]:
        """Return what a stream begins with: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def _event(self, text: str, scores: Json | None, reason: str | None) -> Json:
        delta = {"content": text} if text else {}
        return {"index": self.index, "delta": delta, "logprobs": scores, "finish_reason": reason}

    def _whole(self, text: str, scores: Json | None, reason: str | None) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": self.index, "message": message, "logprobs": scores, "finish_reason": reason}

    def _logprobs(self, scores: tuple[TokenLogprobs, ...] | list[TokenLogprobs]) -> Json | None:
        if not self._with_logprobs:
            return None

        def entry(token_id: int, logprob: float | None) -> Json:
            token = self._token_bytes[token_id]
            return {"token": shown(token), "logprob": logprob, "bytes": list(token)}

        content = [
            entry(s.token_id, s.logprob) | {"top_logprobs": [entry(id, value) for id, value in s.top]}
            for s in scores
        ]
        return {"content": content, "refusal": None}
