"""Chats as one text: a model's template, and which tokens of the result are answers.

A chat is a list of messages ``{"role": "system" | "user" | "assistant", "content": text}``. A
template in Jinja, which comes with the model, writes it as the text that the model was tuned on.
Templates are other people's programs: they run in Jinja's sandbox, see plain texts only, and may
not grow without bound. Their environment is the one that Hugging Face's templates are written
for (trimmed blocks, ``raise_exception``, ``strftime_now``, ``tojson``, ``break``/``continue``,
``{% generation %}``).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from steppe.data.errors import DataError, listing, shorten

if TYPE_CHECKING:
    from steppe.data.text import Tokenizer

Message = Mapping[str, str]

ROLES = ("system", "user", "assistant")

# The layout of ChatML: every message between <|im_start|>role and <|im_end|>.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Templates that can be asked for by name.
TEMPLATES = {"chatml": CHATML}

# Characters. The longest templates in use (with tools) take some 20,000.
MAX_TEMPLATE = 200_000
MAX_TEXT = 20_000_000


class Chat(NamedTuple):
    """A chat as token ids.

    Attributes:
      ids: all of it; special tokens are those that the template writes.
      answer_mask: 1 for what the model has to produce: the tokens of the assistant's messages,
        and after each the token that ends the turn. 0 for the rest.
    """

    ids: list[int]
    answer_mask: list[int]


def check(messages: Any, where: str = "") -> list[dict[str, str]]:
    """The messages of a chat, checked.

    Args:
      where: what errors begin with, such as ``"row 3"``.

    Raises:
      DataError: not a list of messages, or one of them with another role, or without a text.
    """
    begin = f"{where}: " if where else ""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise DataError(
            f"{begin}a chat must be a list of messages, got {type(messages).__name__} "
            f"{shorten(messages)}"
        )
    if not messages:
        raise DataError(f"{begin}the chat has no messages")
    out = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(
                f"{begin}message {number} must be an object with role and content, "
                f"got {shorten(message)}"
            )
        lacking = [key for key in ("role", "content") if key not in message]
        if lacking:
            raise DataError(
                f"{begin}message {number} has no {listing(lacking)}, only {listing(message)}"
            )
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise DataError(
                f"{begin}message {number} has the role {shorten(role)}; use {listing(ROLES)}"
            )
        if not isinstance(content, str):
            raise DataError(
                f"{begin}message {number} ({role}) must hold a text, "
                f"got {type(content).__name__} {shorten(content)}"
            )
        out.append({"role": role, "content": content})
    return out


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    bos: str = "",
    eos: str = "",
    now: datetime | None = None,
) -> str:
    """Writes a chat as one text.

    Args:
      template: Jinja source, or a name in ``TEMPLATES``.
      add_generation_prompt: ends with the beginning of an answer.
      bos, eos: texts of the tokens that begin and end a text.
      now: the date for templates that write one; default: today.

    Raises:
      ImportError: ``jinja2`` is not installed.
      DataError: a template that is damaged, too long, reaches for Python's internals, or refuses
        these messages.
    """
    import jinja2

    compiled = _compile(_source(template))
    date = now or datetime.now()
    parts, length = [], 0
    try:
        for part in compiled.generate(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
            tools=None,
            documents=None,
            strftime_now=date.strftime,
        ):
            parts.append(part)
            length += len(part)
            if length > MAX_TEXT:
                raise DataError(f"the chat template writes more than {MAX_TEXT} characters")
    except DataError:
        raise
    except jinja2.exceptions.SecurityError as error:
        raise DataError(f"the chat template reaches for what it may not use: {error}") from error
    except jinja2.exceptions.TemplateError as error:
        raise DataError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # a template can fail in any way that Python can
        raise DataError(
            f"the chat template fails on these messages: {type(error).__name__}: {error}"
        ) from error
    return "".join(parts)


def template_of(tokenizer: Tokenizer, template: str | None = None) -> str:
    """The template to use: `template` (source, or a name in ``TEMPLATES``), or the tokenizer's.

    Raises:
      DataError: none is given and the tokenizer has none.
    """
    if template is None:
        template = tokenizer.chat_template
    if template is None:
        raise DataError(
            f"the tokenizer in {tokenizer.source} has no chat template; choose one: "
            f"template={listing(map(repr, TEMPLATES))}, or the Jinja source that the model was "
            "tuned with (a base model that was not tuned on chats knows none)"
        )
    return _source(template)


def _source(template: str) -> str:
    """Jinja source, which may be asked for by name."""
    if template not in TEMPLATES and "{" not in template:
        raise DataError(
            f"template {shorten(template)} is neither Jinja source nor one of {listing(TEMPLATES)}"
        )
    return TEMPLATES.get(template, template)


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    where: str = "",
) -> list[int]:
    """Token ids of a chat up to where the model's answer begins.

    Raises:
      DataError: as ``check``, ``template_of`` and ``render``.
    """
    source = template_of(tokenizer, template)
    text = _render(tokenizer, source, check(messages, where), True, where)
    return tokenizer.encode_batch([text], special=False)[0]["input_ids"]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    where: str = "",
) -> Chat:
    """Token ids of a chat, with a mask of what the model has to produce.

    An answer is what stands between the chat up to it, rendered with the beginning of an answer,
    and the chat with it. That is only right if each of these texts begins the next one, which is
    checked. The whole text is encoded at once; a token that reaches over the edge of an answer
    does not count as a part of it.

    Args:
      template: Jinja source or a name in ``TEMPLATES``; default: the tokenizer's own.
      where: what errors begin with, such as ``"row 3"``.

    Raises:
      DataError: no answer in the chat, a template whose text for the first messages changes as
        more follow (so that answers cannot be found), or as ``check`` and ``render``.
    """
    held = check(messages, where)
    source = template_of(tokenizer, template)
    answers = [n for n, message in enumerate(held) if message["role"] == "assistant"]
    begin = f"{where}: " if where else ""
    if not answers:
        raise DataError(f"{begin}the chat has no message of the assistant, so nothing to learn")
    text = _render(tokenizer, source, held, False, where)
    encoding = tokenizer.encode_batch([text], special=False)[0]
    ids, offsets = encoding["input_ids"], encoding["offsets"]
    special = tokenizer.special_ids
    mask = [0] * len(ids)
    for number in answers:
        before = _render(tokenizer, source, held[:number], True, where)
        after = text
        if number + 1 < len(held):
            after = _render(tokenizer, source, held[: number + 1], False, where)
        for shorter, longer in ((before, after), (after, text)):
            if not longer.startswith(shorter):
                raise DataError(
                    f"{begin}answers cannot be told from the rest: the chat template's text of "
                    f"the first {number + (shorter is after)} messages is not how its text of "
                    "more begins (it may drop or change earlier turns); use another template "
                    f"(such as {next(iter(TEMPLATES))!r}), or chats with one answer"
                )
        first, last = len(before), len(after)
        content = held[number]["content"].strip()
        found = text.find(content, first, last)
        spoken = found + len(content) if found >= 0 else first
        # The turn ends with the first special token after what was said; what the template
        # writes after that is not for the model to produce.
        for token, (start, stop) in zip(ids, offsets):
            if token in special and spoken <= start and stop <= last:
                last = stop
                break
        for place, (start, stop) in enumerate(offsets):
            if first <= start and stop <= last and start < stop:
                mask[place] = 1
    return Chat(ids, mask)


def _render(
    tokenizer: Tokenizer, source: str, messages: Sequence[Message], prompt: bool, where: str
) -> str:
    def word(number: int) -> str:
        return tokenizer.backend.id_to_token(number) or "" if number >= 0 else ""

    try:
        return render(
            source,
            messages,
            add_generation_prompt=prompt,
            bos=word(tokenizer.bos_id),
            eos=word(tokenizer.eos_id),
        )
    except DataError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from error


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """The compiled template of the sandbox."""
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox
    except ImportError as error:
        raise ImportError("chat templates need jinja2: pip install jinja2") from error
    if len(template) > MAX_TEMPLATE:
        raise DataError(
            f"the chat template has {len(template)} characters, more than {MAX_TEMPLATE}"
        )

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" or not all(isinstance(v, (int, float)) for v in (left, right)):
                raise jinja2.exceptions.SecurityError(
                    f"{operator!r} of anything but two numbers"
                    if operator == "*"
                    else "'**', which can grow without bound"
                )
            return left * right

    class Generation(ext.Extension):
        """``{% generation %}`` marks answers; its body is written as it stands."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        allowed = ("ensure_ascii", "indent", "separators", "sort_keys")
        given = {key: options[key] for key in allowed if key in options}
        return json.dumps(value, **{"ensure_ascii": False, **given})

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    del environment.globals["lipsum"]
    try:
        tree = environment.parse(template)
        for node in tree.find_all((nodes.Getattr, nodes.NSRef, nodes.Keyword, nodes.Getitem)):
            name = getattr(node, "attr", getattr(node, "key", None))
            if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
                name = node.arg.value
            if isinstance(name, str) and name.startswith("__"):
                raise DataError(f"the chat template reaches for Python's internals ({name!r})")
        return environment.from_string(template)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is damaged: line {error.lineno}: {error.message}"
        ) from error
