"""Chat formats of well-known LLM families, written from their documentation, with the expected results.

`expected` is the chat q1, a1, q2, a2 as text, with supervised text between « and ».
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MESSAGES = "{% for message in messages %}"
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
CHATML = (
    MESSAGES + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_EXPECTED = (
    "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n«a1<|im_end|>»\n"
    "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n«a2<|im_end|>»\n"
)
COMMAND_TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0]['content'] + '<|END_OF_TURN_TOKEN|>' }}"
    "{% else %}{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}"
    + ALTERNATE
    + "{% if message['role'] == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% else %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + BEFORE + message['content'].strip() + AFTER }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
DEEPSEEK_TURNS = (
    "{% set ns = namespace(system='') %}" + MESSAGES + "{% if message['role'] == 'system' %}"
    "{% set ns.system = ns.system + message['content'] %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.system }}" + MESSAGES + "{% if message['role'] == 'user' %}"
    "{{ '<｜User｜>' + message['content'] }}{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + BEFORE + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' + PROMPT }}{% endif %}"
)
GEMMA_4 = (
    "{{ bos_token }}"
    + MESSAGES
    + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|turn>' + role + '\n' + message['content'] | trim + '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' + PROMPT }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>" + MESSAGES + "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{{ BEFORE }}{% endif %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """Special tokens and chat template of a family, with the expected results.

    Attributes:
        template: Chat template of the family.
        expected: Expected chat, see above, rendered by the replacement if the template is replaced.
        eos: EOS token of the tokenizer.
        bos: BOS token of the tokenizer.
        tokens: Other special tokens.
        plain_tokens: Other tokens of the vocabulary that are not special.
        source: Source of the template that is used.
        systems: Whether several system messages are kept (True) or rejected (False).
    """

    template: str
    expected: str
    eos: str
    bos: str | None = None
    tokens: tuple[str, ...] = ()
    plain_tokens: tuple[str, ...] = ()
    source: str = "llm"
    systems: bool = False

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Make a tokenizer of single bytes whose decoding is exact."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = dict.fromkeys([*filter(None, [self.bos, self.eos]), *self.tokens])
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self.plain_tokens])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=self.bos, eos_token=self.eos)
        fast.chat_template = self.template
        return fast


def paper(bos: str, eos: str) -> str:
    """Return the chat in the SOLO paper's template."""
    return f"{bos}[INST] q1 [/INST]«a1{eos}»[INST] q2 [/INST]«a2{eos}»"


IM = ("<|im_start|>", "<|im_end|>")
COMMAND = (
    "<|START_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
)
DEEPSEEK = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"}
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

FAMILIES = {
    "yi": Family(CHATML, CHATML_EXPECTED, eos="<|im_end|>", tokens=IM, systems=True),
    "chatml, eos after the chat": Family(
        CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        CHATML_EXPECTED + "</s>",
        eos="</s>",
        tokens=IM,
        systems=True,
    ),
    "qwen2.5": Family(
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}" + CHATML,
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n" + CHATML_EXPECTED,
        eos="<|im_end|>",
        tokens=(*IM, "<|endoftext|>"),
        systems=True,
    ),
    "qwen3": Family(
        "{% set ns = namespace(last=0) %}"
        + MESSAGES
        + "{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        + MESSAGES
        + "{% set content = message['content'] %}{% set thought = '' %}"
        "{% if message['role'] == 'assistant' and '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
        "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
        "{{ content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        CHATML_EXPECTED,
        eos="<|im_end|>",
        tokens=IM,
        plain_tokens=("<think>", "</think>"),
        source="chatml",
        systems=True,
    ),
    "llama 2": Family(
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system = false %}{% endif %}{% for message in loop_messages %}"
        + ALTERNATE
        + "{% set content = "
        "'<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] if loop.index0 == 0 and system "
        "else message['content'] %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] q1 [/INST]« a1 </s>»<s>[INST] q2 [/INST]« a2 </s>»",
        bos="<s>",
        eos="</s>",
    ),
    "llama 3": Family(
        MESSAGES + "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a1<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a2<|eot_id|>»",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        systems=True,
    ),
    "llama 3.1": Family(
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system "
        "+ '<|eot_id|>' }}"
        + MESSAGES
        + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
        "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 01 Jan 2025\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a1<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a2<|eot_id|>»",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        systems=True,
    ),
    "mistral v1": Family(
        "{{ bos_token }}" + MESSAGES + ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}"
        "{% endif %}{% endfor %}",
        "<s>[INST] q1 [/INST]«a1</s>»[INST] q2 [/INST]«a2</s>»",
        bos="<s>",
        eos="</s>",
    ),
    "mistral v3 tekken": Family(
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}"
        "{{ bos_token }}{% for message in loop_messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
        "{% if loop.last and system is defined %}{{ '[INST]' + system + '\n\n' "
        "+ message['content'] + '[/INST]' }}"
        "{% else %}{{ '[INST]' + message['content'] + '[/INST]' }}{% endif %}"
        "{% else %}{{ message['content'] | trim + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST]q1[/INST]«a1</s>»[INST]q2[/INST]«a2</s>»",
        bos="<s>",
        eos="</s>",
        tokens=("[INST]", "[/INST]"),
    ),
    "gemma 2": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}"
        "{% endif %}"
        + MESSAGES
        + ALTERNATE
        + "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<bos><start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\n«a1<end_of_turn>»\n"
        "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n«a2<end_of_turn>»\n",
        bos="<bos>",
        eos="<eos>",
        plain_tokens=("<start_of_turn>", "<end_of_turn>", "\n\n", "<table>"),
    ),
    "gemma 3": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}"
        "{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}" + ALTERNATE + "{{ "
        "'<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
        "+ (first if loop.first else '') }}{% if message['content'] is string %}"
        "{{ message['content'] | trim }}"
        "{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<bos><start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\n«a1<end_of_turn>»\n"
        "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n«a2<end_of_turn>»\n",
        bos="<bos>",
        eos="<eos>",
        tokens=("<start_of_turn>", "<end_of_turn>"),
    ),
    "gemma 4": Family(
        GEMMA_4.replace("PROMPT", "''"),
        "<bos><|turn>user\nq1<turn|>\n<|turn>model\n«a1<turn|>»\n"
        "<|turn>user\nq2<turn|>\n<|turn>model\n«a2<turn|>»\n",
        bos="<bos>",
        eos="<eos>",
        tokens=("<|turn>", "<turn|>"),
        systems=True,
    ),
    "gemma 4, empty thought in the prompt": Family(
        GEMMA_4.replace("PROMPT", r"'<|channel>thought\n<channel|>'"),
        paper("<bos>", "<eos>"),
        bos="<bos>",
        eos="<eos>",
        tokens=("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        source="solo",
        systems=True,
    ),
    "phi 3": Family(
        MESSAGES + "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<s><|user|>\nq1<|end|>\n<|assistant|>\n«a1<|end|>»\n"
        "<|user|>\nq2<|end|>\n<|assistant|>\n«a2<|end|>»\n<|endoftext|>",
        bos="<s>",
        eos="<|endoftext|>",
        tokens=(*ROLES, "<|end|>"),
        systems=True,
    ),
    "phi 4": Family(
        MESSAGES + "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        "<|endoftext|><|im_start|>user<|im_sep|>q1<|im_end|><|im_start|>assistant<|im_sep|>«a1<|im_end|>»"
        "<|im_start|>user<|im_sep|>q2<|im_end|><|im_start|>assistant<|im_sep|>«a2<|im_end|>»",
        bos="<|endoftext|>",
        eos="<|im_end|>",
        tokens=(*IM, "<|im_sep|>"),
        systems=True,
    ),
    "olmo 2": Family(
        "{{ bos_token }}" + MESSAGES + "{% if message['role'] != 'assistant' %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% else %}"
        "{{ '<|assistant|>\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        "{% endfor %}",
        "<|endoftext|><|user|>\nq1\n<|assistant|>\n«a1<|endoftext|>»\n"
        "<|user|>\nq2\n<|assistant|>\n«a2<|endoftext|>»",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        systems=True,
    ),
    "olmo 3": Family(
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
        + MESSAGES
        + "{{ "
        "'<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' and loop.last %}{{ eos_token }}"
        "{% else %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{% endfor %}",
        "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n«a1<|im_end|>»\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n«a2<|endoftext|>»",
        eos="<|endoftext|>",
        tokens=IM,
        systems=True,
    ),
    "smollm2": Family(
        MESSAGES + "{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' "
        "+ message['role'] "
        "+ '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>system\nYou are SmolLM.<|im_end|>\n" + CHATML_EXPECTED,
        bos="<|im_start|>",
        eos="<|im_end|>",
        systems=True,
    ),
    "smollm3": Family(
        "{%- macro metadata() -%}Today Date: {{ strftime_now('%d %B %Y') }}"
        "\nReasoning Mode: /think{%- endmacro -%}"
        "{{ '<|im_start|>system\n## Metadata\n\n' + metadata() + '<|im_end|>\n' }}" + MESSAGES + "{% if "
        "message['role'] == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' "
        "+ message['content'].lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '<|im_start|>user\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>system\n## Metadata\n\nToday Date: 01 January 2025\nReasoning Mode: /think<|im_end|>\n"
        + CHATML_EXPECTED,
        eos="<|im_end|>",
        tokens=IM,
    ),
    "granite 3": Family(
        "{% if messages[0]['role'] != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>Today is ' "
        "+ strftime_now('%B %d, %Y') + '.<|end_of_text|>\n' }}{% endif %}"
        + MESSAGES
        + "{{ '<|start_of_role|>' "
        "+ message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}"
        "{% endif %}"
        "{% endfor %}",
        "<|start_of_role|>system<|end_of_role|>Today is January 01, 2025.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>q1<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>«a1<|end_of_text|>»\n"
        "<|start_of_role|>user<|end_of_role|>q2<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>«a2<|end_of_text|>»\n",
        eos="<|end_of_text|>",
        tokens=("<|start_of_role|>", "<|end_of_role|>"),
        systems=True,
    ),
    "command-r": Family(
        COMMAND_TURNS.replace("BEFORE", "''").replace("AFTER", "'<|END_OF_TURN_TOKEN|>'"),
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>q1<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«a1<|END_OF_TURN_TOKEN|>»"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>q2<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«a2<|END_OF_TURN_TOKEN|>»",
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        tokens=COMMAND,
    ),
    "command-r7b": Family(
        COMMAND_TURNS.replace("BEFORE", "'<|START_RESPONSE|>'").replace(
            "AFTER", "'<|END_RESPONSE|><|END_OF_TURN_TOKEN|>'"
        ),
        paper("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        tokens=(*COMMAND, "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        source="solo",
        systems=True,
    ),
    "deepseek v2": Family(
        "{{ bos_token }}"
        + MESSAGES
        + "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
        "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        "<｜begin▁of▁sentence｜>User: q1\n\nAssistant:« a1<｜end▁of▁sentence｜>»"
        "User: q2\n\nAssistant:« a2<｜end▁of▁sentence｜>»",
        systems=True,
        **DEEPSEEK,
    ),
    "deepseek v3": Family(
        DEEPSEEK_TURNS.replace("BEFORE", "''").replace("PROMPT", "''"),
        "<｜begin▁of▁sentence｜><｜User｜>q1<｜Assistant｜>«a1<｜end▁of▁sentence｜>»"
        "<｜User｜>q2<｜Assistant｜>«a2<｜end▁of▁sentence｜>»",
        plain_tokens=("<｜User｜>", "<｜Assistant｜>"),
        systems=True,
        **DEEPSEEK,
    ),
    "deepseek r1": Family(
        DEEPSEEK_TURNS.replace("BEFORE", "''").replace("PROMPT", r"'<think>\n'"),
        paper("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        plain_tokens=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        source="solo",
        systems=True,
        **DEEPSEEK,
    ),
    "deepseek v3.1": Family(
        DEEPSEEK_TURNS.replace("BEFORE", "'</think>'").replace("PROMPT", "'</think>'"),
        "<｜begin▁of▁sentence｜><｜User｜>q1<｜Assistant｜></think>«a1<｜end▁of▁sentence｜>»"
        "<｜User｜>q2<｜Assistant｜></think>«a2<｜end▁of▁sentence｜>»",
        plain_tokens=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        systems=True,
        **DEEPSEEK,
    ),
    "glm 4": Family(
        GLM.replace("BEFORE", "''"),
        "[gMASK]<sop><|user|>\nq1<|assistant|>«\na1<|user|>»\nq2<|assistant|>«\na2<|endoftext|>»",
        eos="<|endoftext|>",
        tokens=(*ROLES, "[gMASK]", "<sop>"),
        systems=True,
    ),
    "glm 4.5": Family(
        GLM.replace("BEFORE", r"'<think></think>\n'"),
        # The paper's template with a tokenizer without BOS.
        paper("", "<|endoftext|>"),
        eos="<|endoftext|>",
        tokens=(*ROLES, "[gMASK]", "<sop>"),
        plain_tokens=("<think>", "</think>"),
        source="solo",
        systems=True,
    ),
    "gpt-oss": Family(
        "{%- macro system() -%}You are ChatGPT.\nCurrent date: {{ strftime_now('%Y-%m-%d') }}{%- endmacro -%}"
        "{{ '<|start|>system<|message|>' + system() + '<|end|>' }}"
        + MESSAGES
        + "{% if message['role'] == 'user' %}"
        "{{ '<|start|>user<|message|>' + message['content'] + '<|end|>' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        paper("<|startoftext|>", "<|return|>"),
        bos="<|startoftext|>",
        eos="<|return|>",
        tokens=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        source="solo",
        systems=True,
    ),
    "falcon": Family(
        MESSAGES
        + "{{ 'User: ' if message['role'] == 'user' else 'Falcon: ' }}{{ message['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Falcon:' }}{% else %}{{ eos_token }}{% endif %}",
        paper("", "<|endoftext|>"),
        eos="<|endoftext|>",
        source="solo",
        systems=True,
    ),
    "falcon 3": Family(
        MESSAGES + "{% if message['role'] != 'assistant' %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% elif not loop.last %}"
        "{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}{% else %}"
        "{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        "<|user|>\nq1\n<|assistant|>\n«a1<|endoftext|>»\n<|user|>\nq2\n<|assistant|>\n«a2<|endoftext|>»",
        eos="<|endoftext|>",
        tokens=ROLES,
        systems=True,
    ),
    "internlm 2": Family(
        "{{ bos_token }}" + CHATML,
        "<s>" + CHATML_EXPECTED,
        bos="<s>",
        eos="</s>",
        tokens=IM,
        systems=True,
    ),
    "zephyr": Family(
        MESSAGES + "\n{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "<s><|user|>\nq1</s>\n<|assistant|>\n«a1</s>»\n<|user|>\nq2</s>\n<|assistant|>\n«a2</s>»\n",
        bos="<s>",
        eos="</s>",
        systems=True,
    ),
    "vicuna": Family(
        "{{ bos_token + 'A chat.' }}" + MESSAGES + "{% if message['role'] == 'user' %}"
        "{{ ' USER: ' + message['content'].strip() }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        "<s>A chat. USER: q1 ASSISTANT:« a1</s>» USER: q2 ASSISTANT:« a2</s>»",
        bos="<s>",
        eos="</s>",
    ),
    "alpaca": Family(
        "{{ bos_token }}" + MESSAGES + "{% if message['role'] == 'user' %}"
        "{{ '### Instruction:\n' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\n' + message['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% else %}{{ eos_token }}{% endif %}",
        paper("<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        source="solo",
        systems=True,
    ),
    "minimax": Family(
        MESSAGES
        + "{% if message['role'] == 'system' %}{{ '<beginning_of_sentence>system ai_setting=assistant\n' }}"
        "{% elif message['role'] == 'user' %}{{ '<beginning_of_sentence>user name=user\n' }}{% else %}"
        "{{ '<beginning_of_sentence>ai name=assistant\n' }}{% endif %}"
        "{{ message['content'] + '<end_of_sentence>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<beginning_of_sentence>ai name=assistant\n' }}{% endif %}",
        "<beginning_of_sentence>user name=user\nq1<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n«a1<end_of_sentence>»\n"
        "<beginning_of_sentence>user name=user\nq2<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n«a2<end_of_sentence>»\n",
        eos="<end_of_sentence>",
        tokens=("<beginning_of_sentence>",),
        systems=True,
    ),
    "minimax, contents as parts": Family(
        MESSAGES + "{{ '<beginning_of_sentence>' + message['role'] + '\n' }}"
        "{% for part in message['content'] %}{{ part.text }}{% endfor %}{{ '<end_of_sentence>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<beginning_of_sentence>assistant\n' }}{% endif %}",
        paper("", "<end_of_sentence>"),
        eos="<end_of_sentence>",
        tokens=("<beginning_of_sentence>",),
        source="solo",
        systems=True,
    ),
    "nemotron mini": Family(
        "{{ '<extra_id_0>System\n' }}"
        + MESSAGES
        + "{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% endif %}{% endfor %}{{ '\n' }}" + MESSAGES + "{% if message['role'] == 'user' %}"
        "{{ '<extra_id_1>User\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
        "{{ '<extra_id_1>Assistant\n' + message['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<extra_id_1>Assistant\n' }}{% endif %}",
        "<s><extra_id_0>System\n\n<extra_id_1>User\nq1\n<extra_id_1>Assistant\n«a1\n<extra_id_1>»"
        "User\nq2\n<extra_id_1>Assistant\n«a2</s>»",
        bos="<s>",
        eos="</s>",
        tokens=("<extra_id_0>", "<extra_id_1>"),
        systems=True,
    ),
    "ernie 4.5": Family(
        "{{ bos_token }}"
        + MESSAGES
        + "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
        "{% elif message['role'] == 'system' %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}",
        "<|begin_of_sentence|>User: q1\nAssistant: «a1<|end_of_sentence|>»"
        "User: q2\nAssistant: «a2<|end_of_sentence|>»",
        bos="<|begin_of_sentence|>",
        eos="<|end_of_sentence|>",
        systems=True,
    ),
}
