"""Chats: templates in their sandbox, which tokens are answers, messages that are not."""

from datetime import datetime

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from steppe.data import chat
from steppe.data.errors import DataError
from steppe.data.text import Tokenizer
from steppe.data.tokenizer_files import Special

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello  <b>you</b> 'é' 😀"},
    {"role": "assistant", "content": "Hi there!"},
    {"role": "user", "content": "2 + 2?\n"},
    {"role": "assistant", "content": "It is 4.\n\nReally."},
]
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{% else %}{% set system = none %}{% set loop_messages = messages %}{% endif %}
{% for message in loop_messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('roles must take turns') }}
  {% endif %}
  {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' }}
{{- ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n') if loop.first and system else '' }}
{{- message['content'].strip() + ' [/INST]' }}
  {%- else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""
LLAMA3 = """{{- bos_token }}{%- for message in messages %}
{{- '<|im_start|>' + message.role + '<|im_end|>\\n\\n' + message.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_end|>\\n\\n' }}{%- endif %}"""
PLAIN = """{% for m in messages %}{% if m.role == 'assistant' %}### Answer:
{% generation %}{{ m.content }}{% endgeneration %}

{% else %}### {{ m.role | title }}:
{{ m.content }}

{% endif %}{% endfor %}{% if add_generation_prompt %}### Answer:
{% endif %}"""


def made(template: str | None = None) -> Tokenizer:
    """One token a byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    ids = [backend.token_to_id(t) for t in SPECIAL]
    return Tokenizer(
        backend,
        special=Special(-1, -1, -1, -1, -1),
        has_token_types=False,
        bos_id=ids[0],
        stop_ids=(ids[1], ids[3]),
        chat_template=template,
    )


def answers(tokenizer: Tokenizer, encoded: chat.Chat) -> list[str]:
    """Texts of the runs of tokens that are answers."""
    runs: list[list[int]] = []
    before = 0
    for number, mask in zip(encoded.ids, encoded.answer_mask):
        if mask and not before:
            runs.append([])
        if mask:
            runs[-1].append(number)
        before = mask
    return [tokenizer.decode(run, skip_special=False) for run in runs]


def test_chatml_as_text():
    assert chat.render("chatml", MESSAGES[:2], add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello  <b>you</b> 'é' 😀<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.render(chat.CHATML, MESSAGES[1:2]).endswith("😀<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (chat.CHATML, ["Hi there!<|im_end|>", "It is 4.\n\nReally.<|im_end|>"]),
        (LLAMA2, [" Hi there! </s>", " It is 4.\n\nReally. </s>"]),
        (LLAMA3, ["Hi there!<|eot|>", "It is 4.\n\nReally.<|eot|>"]),
        # No token ends a turn here, so the text between turns does.
        (PLAIN, ["Hi there!\n", "It is 4.\n\nReally.\n"]),
    ],
    ids=["chatml", "llama2", "llama3", "plain"],
)
def test_answers_and_the_token_that_ends_them(template, expected):
    tokenizer = made(template)
    encoded = chat.encode_chat(tokenizer, MESSAGES)
    assert len(encoded.ids) == len(encoded.answer_mask)
    assert set(encoded.answer_mask) == {0, 1}
    assert answers(tokenizer, encoded) == expected
    whole = chat.render(template, MESSAGES, bos="<s>", eos="</s>")
    assert tokenizer.decode(encoded.ids, skip_special=False) == whole
    # What is asked of the model is what it sees when it is asked.
    prompt = chat.encode_prompt(tokenizer, MESSAGES[:2])
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.answer_mask[: len(prompt) + 1] == [0] * len(prompt) + [1]


def test_special_tokens_inside_an_answer_do_not_end_it():
    tokenizer = made(chat.CHATML)
    messages = [MESSAGES[1], {"role": "assistant", "content": "say <|im_end|> now"}]
    assert answers(tokenizer, chat.encode_chat(tokenizer, messages)) == [
        "say <|im_end|> now<|im_end|>"
    ]
    messages[1]["content"] = ""  # an empty answer: the model has to say nothing, and end
    assert answers(tokenizer, chat.encode_chat(tokenizer, messages)) == ["<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgets = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
        "<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = made(forgets)
    assert answers(tokenizer, chat.encode_chat(tokenizer, MESSAGES[:3])) == ["Hi there!"]
    with pytest.raises(DataError, match=r"row 7: answers cannot be told .* first 3 messages"):
        chat.encode_chat(tokenizer, MESSAGES, where="row 7")
    thinks = chat.CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif")
    with pytest.raises(DataError, match=r"text of the first 2 messages .* 'chatml'"):
        chat.encode_chat(made(thinks), MESSAGES)


def test_missing_template_and_choices():
    tokenizer = made()
    with pytest.raises(DataError, match=r"has no chat template; choose one: template='chatml'"):
        chat.encode_chat(tokenizer, MESSAGES)
    with pytest.raises(DataError, match="has no chat template"):
        chat.encode_prompt(tokenizer, MESSAGES)
    named = chat.encode_chat(tokenizer, MESSAGES, template="chatml")
    assert named == chat.encode_chat(made(chat.CHATML), MESSAGES)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "row 3: a chat must be a list of messages, got str 'hi'"),
        ({"role": "user"}, "a chat must be a list of messages, got dict"),
        ([], "row 3: the chat has no messages"),
        (["hi"], "row 3: message 0 must be an object with role and content, got 'hi'"),
        ([{"role": "user"}], "message 0 has no content, only role"),
        ([{"text": "a"}], "message 0 has no role, content, only text"),
        (
            [MESSAGES[0], {"role": "bot", "content": "a"}],
            "message 1 has the role 'bot'; use system",
        ),
        ([{"role": "user", "content": None}], r"message 0 \(user\) must hold a text, got NoneType"),
        ([{"role": "user", "content": ["a"]}], r"must hold a text, got list \['a'\]"),
        (MESSAGES[:2], "row 3: the chat has no message of the assistant, so nothing to learn"),
    ],
)
def test_bad_messages_name_their_row(messages, message):
    with pytest.raises(DataError, match=message):
        chat.encode_chat(made(chat.CHATML), messages, where="row 3")


def test_templates_say_no_in_our_words():
    with pytest.raises(DataError, match="row 2: the chat template refuses .* must take turns"):
        chat.encode_chat(made(LLAMA2), [MESSAGES[2]], where="row 2")
    with pytest.raises(DataError, match="the chat template is damaged: line 2: "):
        chat.render("a\n{% for %}", MESSAGES)
    with pytest.raises(DataError, match="the chat template fails on these messages: TypeError"):
        chat.render("{{ 1 + 'a' }}", MESSAGES)
    with pytest.raises(DataError, match="refuses these messages: 'nothing' is undefined"):
        chat.render("{{ nothing.more }}", MESSAGES)
    with pytest.raises(DataError, match=r"has 200005 characters, more than 200000"):
        chat.render("{{1}}" + "x" * 200_000, MESSAGES)
    with pytest.raises(DataError, match=r"template 'chat-ml' is neither Jinja .* one of chatml"):
        chat.render("chat-ml", MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ (messages | attr('__class__')).mro() }}",
        "{% set ns = namespace(a=1) %}{% set ns.__init__ = 1 %}",
        "{{ namespace(__init__=1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ lipsum.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{% for a in range(1000000000) %}x{% endfor %}",
        "{% for a in range(99999) %}{% for b in messages %}{{ b }}{% endfor %}{% endfor %}",
        "{% include 'a' %}",
        "{% import 'os' as os %}",
    ],
)
def test_templates_stay_in_their_sandbox(template, monkeypatch):
    monkeypatch.setattr(chat, "MAX_TEXT", 10_000)
    with pytest.raises(DataError, match="the chat template"):
        chat.render(template, MESSAGES)
    assert MESSAGES[0] == {"role": "system", "content": "Be brief."}


def test_what_templates_may_use():
    day = datetime(2026, 2, 3)
    assert chat.render("{{ strftime_now('%d %b %Y') }}", MESSAGES, now=day) == "03 Feb 2026"
    assert chat.render("{{ {'b': 'é<', 'a': 1} | tojson }}", []) == '{"b": "é<", "a": 1}'
    assert chat.render("{{ [1] | tojson(indent=1) }}", []) == "[\n 1\n]"
    loop = "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}x{% endfor %}"
    assert chat.render(loop, MESSAGES) == "xx"
    assert chat.render("  {% if true %}\na\n  {% endif %}\nb\n", []) == "a\nb"
    assert chat.render("{{ '-' * 0 if false else 3 * 4 }}{{ tools is none }}", []) == "12True"
    assert chat.render("{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}", []) == "2"


@pytest.mark.parity
@pytest.mark.parametrize("template", [chat.CHATML, LLAMA2, LLAMA3, PLAIN])
def test_same_text_as_transformers(template):
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    for count in range(2, 6):
        for prompt in (False, True):
            (theirs,), *_ = render_jinja_template(
                [MESSAGES[:count]],
                chat_template=template,
                add_generation_prompt=prompt,
                bos_token="<s>",
                eos_token="</s>",
            )
            ours = chat.render(
                template,
                MESSAGES[:count],
                add_generation_prompt=prompt,
                bos="<s>",
                eos="</s>",
            )
            assert ours == theirs
