"""``steppe generate``: texts by a decoder or an encoder-decoder, for one prompt or a file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steppe.data import chat, files
from steppe.data.text import Tokenizer
from steppe.launch import opening, outputs, writing
from steppe.launch.sampling import ChatConfig, GenerateConfig, SamplingConfig
from steppe.models.decoding import Settings


class Prompt(NamedTuple):
    """One prompt of a file.

    Attributes:
      where: its place, for errors.
      text: what is said, or None where a whole chat is given:
      messages: that chat.
      id: of the record, or None.
    """

    where: str
    text: str | None
    messages: Any = None
    id: str | None = None


def run(config: GenerateConfig) -> list[dict[str, Any]]:
    """The whole command; returns one record a prompt: prompt, text, tokens, reason.

    Raises:
      ValueError: no prompt or two kinds of them, an empty one, one that does not fit into the
        model's context, a chat without a template, a model that writes no text, a setting out
        of range, an ``out`` that cannot be written.
      FileNotFoundError: no such model or file.
    """
    single = config.prompt is not None
    if single == bool(config.prompts):
        given = "both --prompt and --prompts" if single else "no prompt"
        raise ValueError(f"{given}: give one of --prompt TEXT and --prompts FILE")
    found = read(config)
    writing.check_settings(settings(config), config.stops, config.beams)
    if config.out:
        _check_out(config.out)
    opened = opening.open_writer(config.model, config.dtype)
    if config.chat and opened.kind != "decoder":
        raise ValueError(f"chat is for decoders; {config.model} is of kind {opened.kind}")
    if config.chat:
        template(config, opened.tokenizer)
    writer = writing.Writer(
        opened.model,
        opened.tokenizer,
        settings(config),
        stop=config.stops,
        beams=config.beams,
        rows=config.batch_size,
    )
    ids = [_encode(config, opened, writer, prompt) for prompt in found]
    writer.check(ids)
    begin = time.perf_counter()
    if single:
        said = [writer.stream(opened.params, ids[0], _show)]
        print(flush=True)
        seconds = time.perf_counter() - begin
        print(
            f"{said[0].tokens} tokens in {seconds:.1f} s, compiling included; "
            f"ended by {_ENDS[said[0].reason]}",
            file=sys.stderr,
        )
    else:
        said = writer.write(opened.params, ids)
    rows = [_record(prompt, text) for prompt, text in zip(found, said, strict=True)]
    if config.out:
        outputs.write_predictions(Path(config.out).expanduser(), rows)
        print(config.out)
    elif config.prompts:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    return rows


_ENDS = {"eos": "its end token", "length": "max_new_tokens", "stop": "a stop string"}


def settings(config: SamplingConfig) -> Settings:
    """Settings of the decoding."""
    return Settings(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
    )


def template(config: GenerateConfig | ChatConfig, tokenizer: Tokenizer) -> str:
    """The chat template to use.

    Raises:
      ValueError: none is given and the model has none, or what is given is no template.
    """
    if config.template is None and tokenizer.chat_template is None:
        raise ValueError(
            f"{config.model} has no chat template; choose one with --template chatml, or give "
            "the Jinja source that the model was tuned with"
        )
    return chat.template_of(tokenizer, config.template)


def _check_out(out: str) -> None:
    file = Path(out).expanduser()
    if file.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file, such as {file / 'texts.jsonl'}")
    if not file.parent.is_dir():
        raise ValueError(f"--out {out}: folder {file.parent} does not exist; make it first")


def read(config: GenerateConfig) -> list[Prompt]:
    """The prompts of the command.

    Raises:
      ValueError: an empty prompt, a file without prompts, a line that is no JSON or lacks the
        column (the line is named).
      FileNotFoundError: no such file.
    """
    if config.prompt is not None:
        if not config.prompt.strip():
            raise ValueError("--prompt is empty; give at least one word")
        return [Prompt("--prompt", config.prompt)]
    file = Path(config.prompts).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"prompts file {file} does not exist")
    # str.splitlines would also split at separators that may stand inside a text.
    lines = [line.rstrip("\r") for line in files.text(file).split("\n")]
    if not lines[-1]:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{file.name} line {number}"
        rows.append(_row(line, where, config) if file.suffix == ".jsonl" else Prompt(where, line))
    if not rows:
        raise ValueError(f"{file} holds no prompts")
    for row in rows:
        if row.text is not None and not row.text.strip():
            raise ValueError(f"{row.where}: the prompt is empty; give a text or drop the line")
    return rows


def _row(line: str, where: str, config: GenerateConfig) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    number = None
    if isinstance(value, dict):
        if config.column not in value:
            raise ValueError(
                f"{where} has no column {config.column!r}, only {', '.join(map(str, value))}; "
                "name the right one with --column"
            )
        number = str(value["id"]) if "id" in value else None
        value = value[config.column]
    if isinstance(value, list) and config.chat:
        return Prompt(where, None, chat.check(value, where), number)
    if not isinstance(value, str):
        hint = "" if config.chat else "; chats are read with --chat"
        raise ValueError(f"{where}: the prompt must be text, got {type(value).__name__}{hint}")
    return Prompt(where, value, None, number)


def _encode(
    config: GenerateConfig, opened: opening.Opened, writer: writing.Writer, prompt: Prompt
) -> np.ndarray:
    if not config.chat:
        try:
            return writer.encode(config.prefix + str(prompt.text))
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from error
    messages: Sequence[Any] = prompt.messages or [
        {"role": "user", "content": config.prefix + str(prompt.text)}
    ]
    if config.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system}, *messages]
    ids = chat.encode_prompt(
        opened.tokenizer, messages, template=config.template, where=prompt.where
    )
    return np.asarray(ids, np.int32)


def _record(prompt: Prompt, said: writing.Written) -> dict[str, Any]:
    row: dict[str, Any] = {} if prompt.id is None else {"id": prompt.id}
    asked = prompt.text if prompt.messages is None else prompt.messages
    return row | {"prompt": asked, **said._asdict()}


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
