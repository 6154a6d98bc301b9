"""A clone of the same shape as the reference's repository, in words of its own, and what its texts are."""

from __future__ import annotations

from pathlib import Path

OPEN = "Look about, then speak.\nAsked: {question}\nLength {duration} sec, {{braces}}.\n"
CHOICE = "Look about, then pick a letter.\nAsked: {question}\nLength {duration} sec.\n"
NEXT = "Shown at {timestamps}.\nGo on or end.\n"
INVALID = "\nThat was no call. \nOnce more.\n"
SYSTEM = "You watch films."
TRACE_SYSTEM = "You look at pictures. Be brief."
FILES = {
    "time_r1/prompt/v4.py": f"""
OPEN_ONE = (
    "Look about, then speak.\\n"
    "Asked: {{question}}\\n"
    "Length {{duration}} sec, {{{{braces}}}}.\\n"
)
OPEN_ONE_MULTIPLE_CHOICE = {CHOICE!r}


def make_prompt(example):
    raise RuntimeError("nothing of the clone may run")


raise RuntimeError("nothing of the clone may run")
""",
    "time_r1/prompt/tool_response.py": f"RESPONSE = {NEXT!r}\n",
    "time_r1/environment/video_env.py": f"import nothing_there\nINVALID_CALL = ({INVALID!r})\nOTHER = 'x'\n",
    "time_r1/dataset/lazy_dataset.py": f"MOST = 2048\nDEFAULT_SYSTEM_PROMPT = {SYSTEM!r}\n",
    "time_r1/utils/video_tools.py": """
import os
MOST = int(os.environ.get("MOST", 8))


@register_tool("seek_video_frames", allow_overwrite=True)
class Seeker(BaseTool):
    description = ("Seeks frames. " "In seconds – häufig.")
    parameters = {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": ("What to seek. ")},
            "start_time": {"type": "number", "description": "From."},
            "end_time": {"type": "number", "description": "To."},
            "num_frames": {"type": "integer", "description": (f"How many (at most {MOST}, else {MOST}).")},
        },
        "required": ["query"],
    }
""",
    "time_r1/trainer/grpo_trainer_env.py": f"""
def get_visual_trace(batch, questions):
    messages = []
    messages.append({{"role": "system", "content": f{TRACE_SYSTEM!r}}})
    content = []
    content.append({{"type": "text", "text": f"Asked: {{question}}"}})
    messages.append({{"role": "user", "content": content}})
""",
}
LINE = (
    '{"type": "function", "function": {"name": "seek_video_frames", "description": "Seeks frames. In seconds – häufig."'
    ', "parameters": {"type": "object", "properties": {"query": {"type": "string", "description": "What to seek. "}, '
    '"start_time": {"type": "number", "description": "From."}, "end_time": {"type": "number", "description": "To."}, '
    '"num_frames": {"type": "integer", "description": "How many (at most 8, else 8)."}}, "required": ["query"]}}}'
)
WHOLE_SYSTEM = (
    f"{SYSTEM}\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{LINE}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def make_clone(root: Path) -> Path:
    """Write the clone below `root`."""
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root
