"""Who decides whether an open-ended answer is right: a rule, or a language model behind the OpenAI protocol."""

from timesearch.judge.client import JudgeClient, JudgeError, JudgeRefusedError, RuleJudge, make_judge

__all__ = ["JudgeClient", "JudgeError", "JudgeRefusedError", "RuleJudge", "make_judge"]
