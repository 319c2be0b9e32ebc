"""What is learned of a conversation, in the chat templates of a dozen families.

Each style gives the rendered conversation by hand, with what must be learned between ⟦ and ⟧. The templates are those
that the families publish, without tool calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cascade.errors import DataError
from cascade.tasks import Example, Message
from cascade.training.examples import encode_example, encode_examples

CONVERSATION = [
    Message("user", "Hi there"),
    Message("assistant", "Hello."),
    Message("user", "2 + 2?"),
    Message("assistant", "It is 4."),
]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Style:
    """A chat template, what it must give, and which tokens end an answer beside the tokenizer's own end token."""

    template: str
    eos: str
    expected: str
    ends: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    bos: str = "<s>"


STYLES = {
    "chatml": Style(
        CHATML,
        "<|im_end|>",
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧",
        special=("<|im_start|>",),
    ),
    "llama-3": Style(
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 "
        "%}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|end_of_text|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 4.<|eot_id|>⟧",
        ends=("<|eot_id|>",),
        special=("<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
    ),
    "llama-2": Style(
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
        "message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + "
        "message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "<s>[INST] Hi there [/INST]⟦ Hello. </s>⟧<s>[INST] 2 + 2? [/INST]⟦ It is 4. </s>⟧",
    ),
    "mistral": Style(
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
        "{{ message['content'] + eos_token}}{% endif %}{% endfor %}",
        "</s>",
        "<s>[INST] Hi there [/INST]⟦Hello.</s>⟧[INST] 2 + 2? [/INST]⟦It is 4.</s>⟧",
    ),
    "gemma": Style(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
        "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        "<eos>",
        "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\n2 + 2?<end_of_turn>\n<start_of_turn>model\n⟦It is 4.<end_of_turn>⟧",
        ends=("<end_of_turn>",),
        special=("<start_of_turn>",),
        bos="<bos>",
    ),
    "phi-3": Style(
        "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
        "<|user|>\nHi there<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n"
        "<|user|>\n2 + 2?<|end|>\n<|assistant|>\n⟦It is 4.<|end|>⟧",
        ends=("<|end|>",),
        special=("<|user|>", "<|assistant|>"),
    ),
    "zephyr": Style(
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "</s>",
        "<|user|>\nHi there</s>\n<|assistant|>\n⟦Hello.</s>⟧\n<|user|>\n2 + 2?</s>\n<|assistant|>\n⟦It is 4.</s>⟧",
    ),
    # Thinks before the last answer alone: earlier answers lose their thoughts, so they are not what the model wrote.
    "qwen-3": Style(
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 "
        "%}{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content.split('</think>')[-1].lstrip('\n') "
        "%}{% if m.role == 'assistant' and loop.index0 > ns.last %}{% set thought = m.content.split('</think>')[0]"
        ".split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}{% set content = '<think>\n' + thought "
        "+ '\n</think>\n\n' + content %}{% endif %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2 + 2?"
        "<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is 4.<|im_end|>⟧",
        special=("<|im_start|>",),
    ),
    # Opens a thought when it asks and leaves it out of what was said: an earlier answer is not what it was asked for.
    "deepseek-r1": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
        "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        "<|end|>",
        "<s><|User|>Hi there<|Assistant|>Hello.<|end|><|User|>2 + 2?<|Assistant|><think>\n⟦It is 4.<|end|>⟧",
        special=("<|User|>", "<|Assistant|>"),
    ),
    "qwq": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1].lstrip('\n') + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
        "{% endif %}",
        "<|im_end|>",
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2 + 2?"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n⟦It is 4.<|im_end|>⟧",
        special=("<|im_start|>",),
    ),
    "alpaca": Style(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}{% else %}"
        "{{ '### Response:\n' + m.content + eos_token + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '### Response:\n' }}{% endif %}",
        "</s>",
        "### Instruction:\nHi there\n\n### Response:\n⟦Hello.</s>⟧\n\n"
        "### Instruction:\n2 + 2?\n\n### Response:\n⟦It is 4.</s>⟧",
    ),
    "vicuna": Style(
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + "
        "m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "</s>",
        "USER: Hi there ASSISTANT:⟦ Hello.</s>⟧USER: 2 + 2? ASSISTANT:⟦ It is 4.</s>⟧",
    ),
    "command-r": Style(
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + ('<|USER_TOKEN|>' if m.role == 'user' "
        "else '<|CHATBOT_TOKEN|>') + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi there<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Hello.<|END_OF_TURN_TOKEN|>⟧"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>2 + 2?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦It is 4.<|END_OF_TURN_TOKEN|>⟧",
        special=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        bos="<BOS_TOKEN>",
    ),
    # No end token at all in the template: it is added, once per answer.
    "without end": Style(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        "</s>",
        "user: Hi there\nassistant:⟦ Hello.\n</s>⟧user: 2 + 2?\nassistant:⟦ It is 4.\n</s>⟧",
    ),
    # The end token comes with the next question: it is learned where the answer ends, and is there once.
    "end before the next": Style(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if not loop.last or add_generation_prompt %}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "</s>",
        "<|user|>Hi there</s><|assistant|>⟦Hello.</s>⟧<|user|>2 + 2?</s><|assistant|>⟦It is 4.</s>⟧",
        special=("<|user|>", "<|assistant|>"),
    ),
}


def make_tokenizer(style, *, pad_is_eos=True):
    """A byte-level BPE that has merged what often stands together in chat templates."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([style.bos, style.eos, *style.ends, *style.special, "<pad>"]))
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(["### Response:\n\nHello.\n\n ASSISTANT: Hello. [/INST] It is 4.\n"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=style.bos,
        eos_token=style.eos,
        pad_token=style.eos if pad_is_eos else "<pad>",
        additional_special_tokens=[*style.ends, *style.special],
    )
    tokenizer.chat_template = style.template
    return tokenizer


def marked(encoded, tokenizer):
    """The text that an encoded example stands for, with what is learned in ⟦ ⟧."""
    text, run, learned = "", [], False
    for token, target in [*zip(encoded.input_ids, encoded.is_target, strict=True), (None, None)]:
        if target != learned:
            piece = tokenizer.decode(run)
            text += f"⟦{piece}⟧" if learned else piece
            run, learned = [], target
        run.append(token)
    return text


def encode(messages, style, tokenizer, **more):
    ends = frozenset(tokenizer.convert_tokens_to_ids(list(style.ends)))
    return encode_example("x", messages, tokenizer, end_ids=ends, **more)


@pytest.mark.parametrize("name", STYLES)
def test_targets_are_the_assistants_tokens_and_the_end_token(name):
    style = STYLES[name]
    for pad_is_eos in (True, False):
        tokenizer = make_tokenizer(style, pad_is_eos=pad_is_eos)
        encoded = encode(CONVERSATION, style, tokenizer)
        assert marked(encoded, tokenizer) == style.expected
        ends = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(style.ends))}
        assert encoded.is_target[-1]
        assert encoded.input_ids[-1] in ends


@pytest.mark.parametrize("name", STYLES)
def test_context_is_token_for_token_what_the_model_is_asked_with(name):
    style = STYLES[name]
    tokenizer = make_tokenizer(style)
    encoded = encode(CONVERSATION[:2], style, tokenizer)
    asked = tokenizer.apply_chat_template(
        [m.as_dict() for m in CONVERSATION[:1]], add_generation_prompt=True, return_dict=False
    )
    assert list(encoded.input_ids[: encoded.is_target.index(True)]) == asked


def test_merges_across_the_cut_would_show():
    # The two tests above say something only if a tokenizer would merge prompt and answer when it saw them together.
    style = STYLES["alpaca"]
    tokenizer = make_tokenizer(style)
    message = [Message("user", "Hi"), Message("assistant", "\nHello.")]
    encoded = encode(message, style, tokenizer)
    assert marked(encoded, tokenizer) == "### Instruction:\nHi\n\n### Response:\n⟦\nHello.</s>⟧"
    whole = tokenizer(tokenizer.decode(encoded.input_ids), add_special_tokens=False).input_ids
    assert whole != list(encoded.input_ids)


def test_system_message_is_put_in_front_unless_there_is_one():
    style = STYLES["chatml"]
    tokenizer = make_tokenizer(style)
    encoded = encode(CONVERSATION[:2], style, tokenizer, system="Be brief.")
    front = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert marked(encoded, tokenizer) == front + marked(encode(CONVERSATION[:2], style, tokenizer), tokenizer)
    own = [Message("system", "Be long."), *CONVERSATION[:2]]
    assert encode(own, style, tokenizer, system="Be brief.") == encode(own, style, tokenizer)


def test_a_prefill_is_context_and_only_what_follows_is_learned():
    style = STYLES["chatml"]
    tokenizer = make_tokenizer(style)
    messages = [Message("user", "Hi"), Message("assistant", "```python\n"), Message("assistant", "x = 4\n```")]
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n```python\n⟦x = 4\n```<|im_end|>⟧"
    assert marked(encode(messages, style, tokenizer), tokenizer) == expected


def test_an_opening_of_the_assistant_answers_nothing_and_is_not_learned():
    style = STYLES["chatml"]
    tokenizer = make_tokenizer(style)
    messages = [Message("assistant", "Welcome."), *CONVERSATION[:2]]
    expected = (
        "<|im_start|>assistant\nWelcome.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    )
    assert marked(encode(messages, style, tokenizer), tokenizer) == expected + "⟦Hello.<|im_end|>⟧"
    assert encode(messages[:1], style, tokenizer).targets == 0


def test_thoughts_of_the_last_answer_are_learned():
    style = STYLES["qwen-3"]
    tokenizer = make_tokenizer(style)
    thought = "<think>\nEasy.\n</think>\n\nIt is 4."
    encoded = encode([*CONVERSATION[:3], Message("assistant", thought)], style, tokenizer)
    assert marked(encoded, tokenizer).endswith(
        f"assistant\nHello.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n⟦{thought}<|im_end|>⟧"
    )


@pytest.mark.parametrize("name", ["deepseek-r1", "qwq"])
@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_a_thought_that_the_prompt_opened_is_gone_on_with(name, opening):
    style = STYLES[name]
    tokenizer = make_tokenizer(style)
    thought = f"{opening}Easy: <b>.\n</think>\n\nIt is 4."
    encoded = encode([CONVERSATION[0], Message("assistant", thought)], style, tokenizer)
    assert marked(encoded, tokenizer).endswith(f"<think>\n⟦Easy: <b>.\n</think>\n\nIt is 4.{style.eos}⟧")


def test_an_answer_that_begins_as_a_thought_does_is_whole():
    style = STYLES["deepseek-r1"]
    tokenizer = make_tokenizer(style)
    encoded = encode([CONVERSATION[0], Message("assistant", "<table>")], style, tokenizer)
    assert marked(encoded, tokenizer).endswith("<think>\n⟦<table><|end|>⟧")


def test_an_answer_that_holds_its_end_token_is_refused_not_cut():
    style = STYLES["chatml"]
    messages = [*CONVERSATION[:1], Message("assistant", "Hello.<|im_end|>more")]
    with pytest.raises(DataError, match=r"holds <\|im_end\|>"):
        encode(messages, style, make_tokenizer(style))


def test_a_template_that_loses_the_answer_leaves_nothing_to_learn():
    style = Style("{% for m in messages %}{{ m.role + ';' }}{% endfor %}", "</s>", "")
    assert encode(CONVERSATION, style, make_tokenizer(style)).input_ids == ()


def example(name, messages):
    return Example(name, "quiz", "reasoning", "", 1, tuple(messages), "teacher", 1)


def test_what_a_template_refuses_or_loses_is_counted_and_the_rest_is_learned():
    tokenizer = make_tokenizer(STYLES["mistral"])
    twice = [Message("user", "Hi"), *CONVERSATION[:2]]
    found = encode_examples([example("twice", twice), example("good", CONVERSATION)], tokenizer, max_length=400)
    assert [e.sample_id for e in found.examples] == ["good"]
    assert (found.by_template, found.without_target) == (("twice",), ())
    assert "roles must alternate" in found.refusal
    found.check("x")
    only = encode_examples([example("twice", twice)], tokenizer, max_length=400)
    with pytest.raises(DataError, match=r"0 have no assistant text, 1 do not go through.*twice.*roles must alternate"):
        only.check("training.lora.max_length = 400")


def test_a_template_that_loses_answers_is_named():
    tokenizer = make_tokenizer(Style("{% for m in messages %}{{ m.role + ';' }}{% endfor %}", "</s>", ""))
    tokenizer.name_or_path = "own/base"
    found = encode_examples([example("lost", CONVERSATION)], tokenizer, max_length=400)
    with pytest.raises(DataError, match=r"lost: the chat template of own/base does not show the answer"):
        found.check("training.lora.max_length = 400")


def test_a_refusal_of_the_template_is_told():
    style = STYLES["gemma"]
    with pytest.raises(DataError, match=r"system, user.*System role not supported.*student\.prompts"):
        encode(CONVERSATION[:2], style, make_tokenizer(style), system="Be brief.")
