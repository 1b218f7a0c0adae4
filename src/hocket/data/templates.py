"""How a row becomes text, and which of its tokens are the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hocket.errors import DataError, nearest

IGNORE = -100

# role -> column names tried in turn; a recipe's `fields` comes first
PROMPT = ("instruction", "question", "prompt")
CONTEXT = ("context", "input")
ANSWER = ("output", "answer", "response", "completion")
TEXT = ("text", "sentence")

ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
    "request.\n\n"
    "### Instruction:\n{prompt}\n\n{context}### Response:\n"
)  # wording: Stanford Alpaca, Taori et al. 2023


ROLES = ("instruction", "context", "output", "text", "pair", "label")


def check_fields(fields: Mapping[str, str], columns: Sequence[str]) -> None:
    """Refuse a mapping that would silently do nothing: an unknown role, or a column that is not there."""
    for role, column in fields.items():
        if role not in ROLES:
            raise DataError(f"data.fields: there is no role '{role}'{nearest(role, ROLES)}")
        if column not in columns:
            raise DataError(f"data.fields.{role}: there is no column '{column}'{nearest(column, columns)}")


class Unusable(Exception):
    """This row cannot be trained on; the message is the reason it is counted under."""


def pick(row: Mapping[str, Any], role: str, names: tuple[str, ...], fields: Mapping[str, str]) -> str:
    """The text of a role, or "" if the row has none."""
    for name in (fields[role],) if role in fields else names:
        value = row.get(name)
        if isinstance(value, list | dict):
            raise Unusable(f"column '{name}' is not text")
        if value is not None and str(value).strip():
            return str(value).strip()
    return ""


def alone(row: Mapping[str, Any], fields: Mapping[str, str]) -> str:
    """The text of a row that has no instruction and no answer, or ""."""
    if pick(row, "instruction", PROMPT, fields) or pick(row, "output", ANSWER, fields):
        return ""
    return pick(row, "text", TEXT, fields)


def reference(row: Mapping[str, Any], fields: Mapping[str, str]) -> str:
    """The whole answer to what a row asks, or "" if it asks nothing."""
    asks = pick(row, "instruction", PROMPT, fields) or pick(row, "context", CONTEXT, fields)
    return pick(row, "output", ANSWER, fields) if asks else ""


def render(
    row: Mapping[str, Any],
    tokenizer: Any,
    template: str = "auto",
    max_length: int = 256,
    fields: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Token ids of a row and their labels: -100 on the prompt, so that the loss is on the answer alone.

    The prompt's own tokens are always a prefix: where the tokenizer would join across the boundary, prompt and answer
    are tokenized apart. What is too long is cut on the right (`cut`: how many tokens). A row that has only text
    (`plain`) is learned as a whole: a long one comes in windows, each beginning with the last token of the one before.

    Args:
        template: `auto` (the tokenizer's chat template if it has one, else `alpaca`), `chat`, `alpaca`, `plain`.
        max_length: most tokens.
        fields: role (`instruction`, `context`, `output`, `text`) = column.

    Raises:
        Unusable: no answer, or the prompt leaves no room for it.
        DataError: `chat` was asked for and the tokenizer has no chat template.
    """
    fields = fields or {}
    prompt = pick(row, "instruction", PROMPT, fields)
    context = pick(row, "context", CONTEXT, fields)
    answer = pick(row, "output", ANSWER, fields)
    chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not chat:
        raise DataError(
            "data.template: 'chat', but the model's tokenizer has no chat template; use 'alpaca' or 'plain'"
        )
    kind = ("chat" if chat else "alpaca") if template == "auto" else template
    if text := alone(row, fields):
        kind, answer = "plain", text
    if not answer:
        raise Unusable("no answer" if prompt else "no text")
    if not prompt and kind != "plain":
        raise Unusable("no instruction")
    question = f"{prompt}\n\n{context}" if context else prompt
    start, end = _frame(kind, question, prompt, context, tokenizer)
    head = _ids(tokenizer, start, special=False) if start else []
    joint = _ids(tokenizer, start + answer + end, special=False)
    # apart only where needed: sentencepiece would put a space before an answer that begins a text
    body = joint[len(head) :] if joint[: len(head)] == head else _ids(tokenizer, answer + end, special=False)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and _adds_bos(tokenizer) and head[:1] != [bos]:
        head = [bos, *head]
    eos = tokenizer.eos_token_id
    if eos is not None and not end.strip():  # a chat template may lack an end-of-turn mark
        body = [*body, eos]
    if len(head) >= max_length:
        raise Unusable("prompt leaves no room for the answer")
    if kind == "plain" and not question:
        ids = head + body
        if min(len(ids), max_length) < 2:
            raise Unusable("nothing to predict")
        labels, stride = [IGNORE] * len(head) + body, max_length - 1
        return [
            {"input_ids": ids[at : at + max_length], "labels": labels[at : at + max_length]}
            for at in range(0, len(ids) - 1, stride)
        ]
    whole = head + body
    ids = whole[:max_length]
    labels = ([IGNORE] * len(head) + body)[: len(ids)]
    if all(label == IGNORE for label in labels[1:]):  # the first token is never predicted
        raise Unusable("nothing to predict")
    return [{"input_ids": ids, "labels": labels, "cut": len(whole) - len(ids)}]


def prompt_text(question: str, tokenizer: Any) -> str:
    """A question as the model should see it when it is to answer."""
    if getattr(tokenizer, "chat_template", None):
        return _frame("chat", question, question, "", tokenizer)[0]
    return _frame("alpaca", question, question, "", tokenizer)[0]


def closing(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer, if there is one: it need not be the tokenizer's
    end of text."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        end = _ids(tokenizer, _frame("chat", "a", "a", "", tokenizer)[1].lstrip(), special=False)[:1]
    except DataError:  # only matters to who asked for the chat template
        return None
    known = tokenizer.added_tokens_decoder
    return end[0] if end and end[0] in known and known[end[0]].special else None


def _frame(kind: str, question: str, prompt: str, context: str, tokenizer: Any) -> tuple[str, str]:
    """What stands before the answer, and what stands behind it."""
    if kind == "plain":
        return (f"{question}\n" if question else ""), ""
    if kind == "alpaca":
        more = ", paired with an input that provides further context" if context else ""
        given = f"### Input:\n{context}\n\n" if context else ""
        return ALPACA.format(more=more, prompt=prompt, context=given), ""
    mark = "\u2402answer\u2402"
    messages = [{"role": "user", "content": question}]
    start = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": mark}], tokenize=False)
    if mark not in whole:
        raise DataError("data.template: the tokenizer's chat template drops the assistant's answer; use 'alpaca'")
    return start, whole.split(mark, 1)[1].rstrip("\n")


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself would put a beginning-of-sequence token in front."""
    bos = tokenizer.bos_token_id
    return _ids(tokenizer, "a", special=True)[:1] == [bos]
