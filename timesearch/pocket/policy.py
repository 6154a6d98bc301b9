"""The pocket policy: a Qwen3-VL of under two million parameters, with a tokenizer and processor of its own.

It is the same architecture, processor class and chat template that a large Qwen-VL goes through, so nothing downstream
knows that it is small. The tokenizer is byte-level BPE over the pocket prompts (any text can be encoded); the tools
block and the fixed parts of a tool call are single tokens, which keeps an episode near 150 tokens. In the hop world's
tokenizer they are words like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timesearch.pocket.hop_traces import RELATIONS
from timesearch.pocket.hops import HOP_SHAPES, TEXTS
from timesearch.pocket.senses import CHATTER, CLUE, MARKS, PLATE_BOX, TOOL_OF
from timesearch.pocket.senses import TEXTS as SENSES_TEXTS
from timesearch.pocket.senses_traces import SPOKEN
from timesearch.pocket.wordings import phrases
from timesearch.pocket.world import COLOURS, SHAPES
from timesearch.search.protocol import SearchProtocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

Parts = Callable[[str], tuple[str, ...]]
"""From a token to the names of what it is made of."""
PATCH = 32
"""Pixels along the side of one vision token: patches of 16, merged 2 x 2."""
FRAME = 64
"""Width and height of a cached pocket frame in pixels: four vision tokens."""
INIT_STD = 128**-0.5
"""Standard deviation of initial weights. The usual 0.02 is for wide models: at width 128, 200 steps of `Lookup` end at
67% right from there, and at 100% from here."""

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_MARKUP = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
_CALL = (
    '\n{"name": "seek_video_frames", "arguments": {"query": "',
    '", "start_time": ',
    ', "end_time": ',
    '"}}\n',
    "}}\n",
)
_JSON = ('\n{"name": "', '", "arguments": {"', "}}\n", '"}}\n')
_SCHEMA = (
    '{"type": "function", "function": {"name": "',
    '", "description": "',
    '", "parameters": {"type": "object", "properties": {"',
    '": {"type": "string", "description": "',
    '": {"type": "number", "description": "',
    '": {"type": "integer", "description": "',
    '"}, "',
    '"}}, "required": ["',
    '"]}, "return": {"type": "array", "items": {"type": "object", "additionalProperties": {}}, "description": "',
    '"]}',
)
"""Marks of any tool's JSON schema; the first opens it."""
# Words with their leading space, integers whole, and the tenth of a second with its unit, as in "112.5s".
_WORDS = r" ?\p{L}+|\p{N}{1,3}|\.\p{N}s(?!\p{L})| ?[^\s\p{L}\p{N}]+|\s"
# The same, but a name such as start_time is one word, and so are a key of a note (hop_traces), a time such as 12.5s,
# and what stands between two words of JSON. Hundreds stand apart: an hour's times are told by those of 100 seconds.
_HOP_WORDS = (
    r" ?[\p{L}_]+[>=@+?]?|\p{N}+(?=\p{N}{2})|\p{N}{1,2}\.\p{N}s(?!\p{L})|\p{N}{1,2}|\.\p{N}s(?!\p{L})"
    r"| ?[^\s\p{L}\p{N}_]+(?: [^\s\p{L}\p{N}_]+)*|\s"
)


def make_tokenizer(prompts: str = "pocket") -> PreTrainedTokenizerFast:
    """Train the tokenizer on everything that a pocket episode can say."""
    return _tokenizer(_corpus(prompts), 896, _WORDS, (*_MARKUP, *_CALL, tools_block()))


def make_hop_tokenizer(prompts: str = "pocket") -> PreTrainedTokenizerFast:
    """Train the tokenizer of the hop world.

    A tool's name, its arguments and what its description says are words like any other here: a schema that is worded
    anew is read by the words that it shares with others. What the chat template says around any schema, and JSON's own
    marks, are a token each. A shape's word without a space before it, as behind a key and in a query, is another token
    than the one with it, and than its keys (``star>``).
    """
    before, _, after = tools_block().partition(_SCHEMA[0])
    around = (before, after[after.index("</tools>") :])
    return _tokenizer(_hop_corpus(prompts), 2048, _HOP_WORDS, (*_MARKUP, *_JSON, *_SCHEMA, *around))


def make_senses_tokenizer(prompts: str = "pocket") -> PreTrainedTokenizerFast:
    """Train the tokenizer of the world of senses: words as in the hop world, and each tool's schema a token."""
    from timesearch.search.tools import TOOLS, schema_of

    schemas = [json.dumps(schema_of(tool), ensure_ascii=False) for tool in TOOLS]
    block = tools_block()
    before, after = block.split(json.dumps(schema_of(TOOLS[0]), ensure_ascii=False))
    fixed = (*_JSON, f'"box": {json.dumps(PLATE_BOX)}', before, after)
    return _tokenizer(_senses_corpus(prompts), 1536, _HOP_WORDS, (*_MARKUP, *schemas, *fixed))


def hop_parts(token: str) -> tuple[str, ...]:
    """What a token of the hop world is made of, as a name for each part; none where it is a word like any other.

    A key is its shape and its relation, a number its digits, a time those and its half second; one that begins with a
    zero is what hundreds are followed by.
    """
    if token.startswith("\u0120"):  # a space, in a byte-level BPE
        shape, relation = (token[1:-1], token[-1]) if token[-1] in RELATIONS else (token[1:], "")
        return (f"shape {shape}", f"relation {relation}") if shape in HOP_SHAPES else ()
    whole, _, rest = token.removesuffix("s").partition(".")
    if not whole.isdecimal() or not whole.isascii() or len(whole) > 3 or not (rest or token == whole):
        return ()
    hundreds, tens, units = tuple(whole.zfill(3))
    hundreds = "some" if len(whole) == 2 and tens == "0" else hundreds
    digits = (f"{hundreds} hundreds", f"{tens} tens", f"{units} units")
    return (*digits, f"{rest} tenths") if rest else (*digits, "number")


def _tokenizer(corpus: list[str], size: int, words: str, phrases: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` tokens, and `phrases` that are a token each."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(_SPECIAL[1:]),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        padding_side="left",
    )


def tools_block() -> str:
    """What the chat template puts after the system text to describe the tools."""
    import jinja2
    from trl.chat_template_utils import qwen3_vl_chat_template

    from timesearch.search.tools import schema_of, seek_video_frames

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    text = environment.from_string(qwen3_vl_chat_template).render(
        messages=[{"role": "system", "content": ""}], tools=[schema_of(seek_video_frames)]
    )
    return text.removeprefix("<|im_start|>system\n\n\n").removesuffix("<|im_end|>\n")


def _corpus(prompts: str) -> list[str]:
    """Texts whose words become tokens; each occurs often enough to be merged whole."""
    words = [
        *SearchProtocol.load(prompts).texts.values(),
        *(f"I need to see the {shape}. No {shape} here." for shape in SHAPES),
        *(f"The {shape} is {colour}." for shape in SHAPES for colour in COLOURS),
        *(f"What colour is the {shape}? What" for shape in SHAPES),
        *(f"{shape}|{colour}|" for shape in SHAPES for colour in COLOURS),
        "system\nuser\nassistant\n" * 3,
        "<answer>I don't know</answer> I can guess. I do not know. A an the in on at of frame frames empty nothing",
        "user\n\n\n",
        tools_block(),
    ]
    numbers = [f"{seconds}.{tenth}s," for seconds in range(152) for tenth in (0, 5)]
    return words * 8 + numbers * 4 + [f".{tenth}s" for tenth in range(10)] * 400


def _hop_corpus(prompts: str) -> list[str]:
    """Texts whose words become tokens, in the hop world."""
    words = [
        *SearchProtocol.load(prompts).texts.values(),
        *(text.format(shape=shape) for text in TEXTS.values() for shape in HOP_SHAPES),
        *(f'I see {shape} {shape}{relation}{shape} "{shape}"' for shape in HOP_SHAPES for relation in RELATIONS),
        "I see nothing. nothing, So I can guess. From" * 4,
        "<answer>I don't know</answer>",
        '\n{"name": "seek_video_frames", "arguments": {"query": "shape", "num_frames": 2}}\n',
        *(f'{{"query": "{shape}", "start_time": 1, "end_time": 2}}' for shape in HOP_SHAPES),
        *(f"={colour} {colour}</answer>" for colour in COLOURS),
        "system\nuser\nassistant\n" * 3,
        tools_block(),
        *(f"{phrase} {phrase}" for phrase in phrases()),
    ]
    # Hundreds are tokens apart: the ten above them bring what begins with a zero, such as 05.5s in 105.5s.
    numbers = [f"{seconds}, {seconds} {seconds}.{tenth}s," for seconds in range(110) for tenth in (0, 5)]
    return words * 8 + numbers * 8 + [f".{tenth}s" for tenth in range(10)] * 400


def _senses_corpus(prompts: str) -> list[str]:
    """Texts whose words become tokens, in the world of senses."""
    shapes, tools = dict.fromkeys((*SHAPES, *MARKS)), ("seek_video_frames", *TOOL_OF.values())
    words = [
        *SearchProtocol.load(prompts).texts.values(),
        *(text.format(shape=shape) for text in SENSES_TEXTS.values() for shape in SHAPES),
        *(f'I see {shape} {shape}{relation}{shape} "{shape}"' for shape in shapes for relation in RELATIONS),
        *(f"{said.format(shape=shape)}. It says {shape}." for said in (CLUE, *CHATTER) for shape in SHAPES),
        "I see it. I see nothing. It shows nothing. nothing, So what? I can guess. From plate= flash= plate? flash?"
        * 4,
        "<answer>I don't know</answer>",
        *(f'\n{{"name": "{name}", "arguments": {{"query": "shape", "num_frames": 1}}}}\n' for name in tools),
        f'"query": "{SPOKEN}"}}}}\n',
        *(f'{{"time": "1.0s", "query": "{shape}", "start_time": 1, "end_time": 2}}' for shape in SHAPES),
        *(f"={answer} {answer}</answer>" for answer in (*COLOURS, *MARKS)),
        "system\nuser\nassistant\n" * 3,
    ]
    numbers = [f"{seconds}, {seconds} {seconds}.{tenth}s," for seconds in range(100) for tenth in (0, 5)]
    parts = [f".{hundredth}s" for hundredth in ("00", "25", "50", "75")]
    return words * 8 + numbers * 8 + parts * 400


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLProcessor:
    """A Qwen3-VL processor that leaves FRAME x FRAME pictures as they are."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor
    from trl.chat_template_utils import qwen3_vl_chat_template

    vision = {"patch_size": PATCH // 2, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": PATCH * PATCH, "longest_edge": 16 * FRAME * FRAME}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**vision, size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**vision),
        chat_template=qwen3_vl_chat_template,
    )


def make_policy(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, layers: int = 3, parts: Parts | None = None
) -> Qwen3VLForConditionalGeneration:
    """An untrained policy; the same seed gives the same weights.

    Args:
        tokenizer: whose tokens it knows.
        seed: of the weights.
        layers: of the language model.
        parts: of a token; it begins as the sum of their vectors, so that what is learned of a part in one token holds
            for all that share it.
    """
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    identity = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": (len(tokenizer) + 63) // 64 * 64,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "initializer_range": INIT_STD,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "initializer_range": INIT_STD,
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 2,
            "patch_size": PATCH // 2,
            "out_hidden_size": 128,
            "num_position_embeddings": (FRAME // (PATCH // 2)) ** 2,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=identity("<|image_pad|>"),
        video_token_id=identity("<|video_pad|>"),
        vision_start_token_id=identity("<|vision_start|>"),
        vision_end_token_id=identity("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    if parts is not None:
        _compose(model.get_input_embeddings().weight.detach(), tokenizer, parts)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _compose(embeddings: torch.Tensor, tokenizer: PreTrainedTokenizerFast, parts: Parts) -> None:
    """Make the embedding of each token that has parts the sum of their vectors, as long as those of other tokens."""
    import torch

    vectors: dict[str, torch.Tensor] = {}
    for token, identity in sorted(tokenizer.get_vocab().items(), key=lambda each: each[1]):
        named = parts(token)
        for name in named:
            if name not in vectors:
                vectors[name] = torch.randn(embeddings.shape[1]) * INIT_STD
        if named:
            embeddings[identity] = torch.stack([vectors[name] for name in named]).sum(dim=0) / len(named) ** 0.5


def save_policy(model: Any, processor: Any, folder: Path | str) -> Path:
    """Write a whole checkpoint (weights as float32 safetensors, configuration, processor); files appear one by one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    model.save_pretrained(partial, safe_serialization=True)
    processor.save_pretrained(partial)
    for file in sorted(partial.iterdir()):
        file.replace(folder / file.name)
    partial.rmdir()
    return folder
