"""``steppe generate`` and ``steppe chat`` on tiny models: texts, files, streams and mistakes."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from steppe.data.text import Tokenizer
from steppe.launch import chat, cli, generate, opening, sampling, writing
from steppe.models import packed
from steppe.models.decoding import Settings


@pytest.fixture(scope="module")
def opened(tiny):
    return opening.open_writer(str(tiny.llama))


def generated(capsys, *args):
    assert cli.main(["generate", *map(str, args)]) == 0
    return capsys.readouterr()


def test_one_prompt_is_written_as_it_comes(tiny, capsys):
    said = generated(capsys, tiny.llama, "--prompt", "a b c", "--max-new-tokens", 6)
    assert 0 < len(said.out.split()) <= 6
    assert "tokens in" in said.err
    again = generated(capsys, tiny.llama, "--prompt=a b c", "--max-new-tokens=6", "--dtype=float32")
    assert again.out == said.out


def test_a_quantized_model_writes(tiny, tmp_path, capsys):
    """The folder of ``steppe quantize``, token for token what its rounded model chooses."""
    out = tmp_path / "q"
    assert cli.main(["quantize", str(tiny.llama), "--bits=w4a8", f"--out={out}", "--speed=0"]) == 0
    capsys.readouterr()
    said = generated(capsys, out / "w4a8-rtn", "--prompt", "a b c", "--max-new-tokens", 6)
    held = packed.load(out / "w4a8-rtn")
    ids = Tokenizer.open(tiny.llama).encode_batch(["a b c"])[0]["input_ids"]
    for _ in range(6):
        logits = held.model.apply(held.params, {"input_ids": np.asarray([ids])}).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    assert said.out.strip() == Tokenizer.open(tiny.llama).decode(ids).removeprefix("a b c").strip()


def test_a_file_gives_json_lines_equal_to_single_prompts(tiny, opened, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    prompts = ["a b", "c d e f g h a b c", "a", "h g", "b c d"]
    file.write_text(
        "".join(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in enumerate(prompts))
    )
    out = tmp_path / "out.jsonl"
    given = ("--max-new-tokens=5", "--batch-size=2", f"--out={out}")
    generated(capsys, tiny.llama, f"--prompts={file}", *given)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert {row["reason"] for row in rows} <= {"eos", "length"}
    writer = writing.Writer(opened.model, opened.tokenizer, 5)
    for prompt, row in zip(prompts, rows, strict=True):
        (alone,) = writer.write(opened.params, [writer.encode(prompt)])
        assert alone.text == row["text"]
        assert alone.tokens == row["tokens"]


def test_samples_have_seeds_of_their_own(opened):
    settings = Settings(max_new_tokens=8, temperature=1.0, seed=3)
    writer = writing.Writer(opened.model, opened.tokenizer, settings, rows=2)
    prompts = [writer.encode("a b c")] * 4
    first = [w.text for w in writer.write(opened.params, prompts)]
    assert first == [w.text for w in writer.write(opened.params, prompts)]
    assert len(set(first)) > 1
    whole = writing.Writer(opened.model, opened.tokenizer, settings, rows=4)
    assert [w.text for w in whole.write(opened.params, prompts)] == first


def test_text_files_stop_strings_and_the_terminal(tiny, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a b c\nd e f\n")
    given = (f"--prompts={file}", "--max-new-tokens=8")
    rows = list(map(json.loads, generated(capsys, tiny.llama, *given).out.splitlines()))
    assert [row["prompt"] for row in rows] == ["a b c", "d e f"]
    word = rows[0]["text"].split()[1]
    stopped = list(
        map(
            json.loads, generated(capsys, tiny.llama, *given, "--stop", f" {word}").out.splitlines()
        )
    )
    assert stopped[0]["reason"] == "stop"
    assert stopped[0]["text"] == rows[0]["text"].split(f" {word}")[0]


def test_an_encoder_decoder_reads_sources_and_searches(tiny, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    given = (tiny.t5, "--prompt=a b c d", "--max-new-tokens=5", f"--out={out}")
    for more in ((), ("--beams=3",)):
        generated(capsys, *given, *more)
        row = json.loads(out.read_text())
        assert row["prompt"] == "a b c d"
        assert 0 < row["tokens"] <= 5


def test_the_token_that_ends_a_text_is_not_written(opened, monkeypatch):
    tokenizer = opened.tokenizer
    end = tokenizer.stop_ids[0]
    words = [i for i in range(3, 9) if i not in tokenizer.stop_ids][:2]
    # A tokenizer that shows its special tokens, as Marian's does.
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: " ".join(map(str, ids)))
    found = np.array([[[*words, end]], [[*words, words[0]]]])
    lengths = np.full((2, 1), len(words) + 1)
    said = SimpleNamespace(tokens=found, lengths=lengths)
    monkeypatch.setattr(writing.decoding, "beam_search", lambda *_, **__: said)
    writer = writing.Writer(opened.model, tokenizer, 8, beams=2)
    one, other = writer.write(opened.params, [np.array(words)] * 2)
    assert (one.text, one.reason) == (" ".join(map(str, words)), "eos")
    assert (other.text, other.reason) == (" ".join(map(str, [*words, words[0]])), "length")


def test_chat_prompts_go_through_the_template(tiny, opened, tmp_path):
    settings = sampling.GenerateConfig(model=str(tiny.llama), prompt="a b", chat=True, system="c")
    writer = writing.Writer(opened.model, opened.tokenizer, 4)
    (prompt,) = generate.read(settings)
    ids = generate._encode(settings, opened, writer, prompt)
    text = opened.tokenizer.decode(ids, skip_special=False)
    assert text == (
        "<|im_start|> system c <|im_end|> <|im_start|> user a b <|im_end|> <|im_start|> assistant"
    )


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        ("llama", [], "no prompt: give one of"),
        ("llama", ["--prompt=a", "--prompts=x.txt"], "both --prompt and --prompts"),
        ("llama", ["--prompt= "], "--prompt is empty"),
        ("llama", ["--prompt="], "--prompt is empty"),
        ("llama", ["--prompts=none.txt"], "none.txt does not exist"),
        ("llama", ["--prompt=a", "--stop", ""], "stop must not be empty"),
        ("llama", ["--prompt=a", "--temperature=-1"], "temperature must be"),
        ("llama", ["--prompt=a", "--top-p=0"], "top_p must be in (0, 1]"),
        ("llama", ["--prompt=a", "--beams=2", "--temperature=1"], "give one of the two"),
        ("llama", ["--prompt=" + "a " * 60, "--max-new-tokens=8"], "the 64 positions of the model"),
        ("none", ["--prompt=a", "--top-p=0"], "top_p must be in (0, 1]"),
        ("none", ["--prompt=a", "--max-new-tokens=0"], "max_new_tokens must be at least 1"),
        ("none", ["--prompt=a", "--beams=65"], "error: --beams must be 1 to 64, got 65"),
        ("none", ["--prompt=a", "--batch-size=0"], "error: --batch-size must be >= 1, got 0"),
        ("none", ["--prompt=a", "--out=/"], "--out / is a folder"),
        ("none", ["--prompt=a", "--out=/none/x"], "--out /none/x: folder /none does not exist"),
        ("none", ["--prompt=a", "--dtype=f"], "error: invalid choice 'f' for argument '--dtype'"),
        ("plain", ["--prompt=a", "--chat"], "has no chat template; choose one with --template ch"),
        ("llama", ["--prompt=a", "--chat", "--template=x"], "neither Jinja source nor one of"),
        ("llama", ["--prompt=a\udce9"], "--prompt: text 0 is not valid Unicode: 'a\\udce9'"),
        ("t5", ["--prompt=a", "--chat"], "chat is for decoders"),
        ("vit", ["--prompt=a"], "is of kind vision (vit) and writes no text; decoders"),
        ("none", ["--prompt=a"], "does not exist"),
    ],
)
def test_mistakes_end_in_one_line(tiny, capsys, model, args, message):
    assert cli.main(["generate", str(getattr(tiny, model, "none")), *args]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert said[-1].startswith("steppe: error: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a\n\nb\n", "p.txt line 2: the prompt is empty"),
        ("p.jsonl", "", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{\n', "p.jsonl line 2 is not JSON"),
        ("p.jsonl", '{"text": "a"}\n', "p.jsonl line 1 has no column 'prompt', only text"),
        ("p.jsonl", '{"prompt": 3}\n', "p.jsonl line 1: the prompt must be text, got int"),
    ],
)
def test_bad_prompt_files(tiny, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_text(content)
    assert cli.main(["generate", str(tiny.llama), f"--prompts={tmp_path / name}"]) == 2
    assert message in capsys.readouterr().err


def test_prompts_are_split_at_new_lines_only(tmp_path):
    rows = ["a\u2028b", "c\u0085d", "e\x0cf"]
    text = "".join(json.dumps({"prompt": r}, ensure_ascii=False) + "\r\n" for r in rows)
    (tmp_path / "p.jsonl").write_bytes(text.encode())
    (tmp_path / "p.txt").write_bytes("\n".join(rows).encode())
    for name in ("p.jsonl", "p.txt"):
        found = generate.read(sampling.GenerateConfig(prompts=str(tmp_path / name)))
        assert [prompt.text for prompt in found] == rows


def test_a_template_for_a_model_without_one(tiny, capsys):
    given = ("--prompt=a", "--chat", "--template=chatml", "--max-new-tokens=2")
    generated(capsys, tiny.plain, *given)


def talk(tiny, lines, **settings):
    made = sampling.ChatConfig(model=str(tiny.llama), **{"max_new_tokens": 6, **settings})
    target = io.StringIO()
    assert chat.run(made, io.StringIO(lines), target) == 0
    return target.getvalue()


def test_a_chat_through_a_pipe(tiny):
    said = talk(tiny, "a b c\n\nd e\n").splitlines()
    assert len(said) == 2
    assert all(line.strip() for line in said)
    assert talk(tiny, "a b c\nd e\n").splitlines() == said
    alone = talk(tiny, "d e\n").splitlines()
    assert talk(tiny, "a b c\n/reset\nd e\n").splitlines()[-1] == alone[0]


def test_a_chat_survives_what_is_no_unicode(tiny):
    said = talk(tiny, "a\udce9\na b c\n").splitlines()
    assert said[0].startswith("(text 0 is not valid Unicode")
    assert said[1:] == talk(tiny, "a b c\n").splitlines()


def test_commands_of_a_chat(tiny):
    said = talk(tiny, "/what\n/system b c\na\n/system\n/quit\na\n").splitlines()
    assert said[0].startswith("(/what is no command; /reset forgets")
    assert said[1] == "(the system message is set, the conversation begins anew)"
    assert said[3] == "(the system message is removed, the conversation begins anew)"
    assert len(said) == 4


def test_a_chat_forgets_its_oldest_turns(tiny):
    said = talk(tiny, "a b c d e f g h\n" * 8)
    assert "the oldest turn no longer fit" in said or "oldest turns no longer fit" in said
    long = talk(tiny, "a " * 70 + "\na\n").splitlines()
    assert long[0].startswith("(that has 75 tokens with its template, the context leaves 58")
    assert len(long) == 2


def test_turns_go_in_pairs(tiny):
    talk = chat.Conversation(Tokenizer.open(tiny.llama), room=24)
    for _ in range(6):
        ids, dropped = talk.prompt("a b c")
        assert len(ids) <= 24
        assert talk.turns[0]["role"] == "user"
        talk.answer("d e f")
    assert dropped
    talk.answer("")
    assert talk.turns[-1]["role"] == "assistant"
    with pytest.raises(ValueError, match="say less"):
        talk.prompt("a " * 30)
    assert talk.turns[-1]["role"] == "assistant"


def test_ctrl_c_stops_the_answer_and_not_the_chat(tiny, monkeypatch):
    calls = []
    stream = writing.Writer.stream

    def interrupted(self, params, prompt, show):
        calls.append(np.asarray(prompt))
        if len(calls) > 1:
            return stream(self, params, prompt, show)
        show("a b")
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.Writer, "stream", interrupted)
    said = talk(tiny, "a\nb\n").splitlines()
    assert said[0] == "a b (stopped)"
    assert said[1].strip()
    text = Tokenizer.open(tiny.llama).decode(calls[1])
    assert text.split()[:6] == ["user", "a", "assistant", "a", "b", "user"]


def test_no_chat_without_a_template_or_with_an_encoder_decoder(tiny, capsys):
    assert cli.main(["chat", str(tiny.plain)]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert cli.main(["chat", str(tiny.t5)]) == 2
    assert "chat is for decoders" in capsys.readouterr().err
    assert cli.main(["chat"]) == 2
    assert "no model is named" in capsys.readouterr().err
    assert cli.main(["chat", str(tiny.llama), "--max-new-tokens=64"]) == 2
    assert "leaves no room" in capsys.readouterr().err
